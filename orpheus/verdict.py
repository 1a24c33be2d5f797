"""Whether a dataset is ready to train on: the doctor's verdict, and a run's warning of few clips.

The README of github.com/canopyai/Orpheus-TTS has, under "Finetune Model": "You should start to see
high quality results after ~50 examples but for best results, aim for 300 examples/speaker". It
counts clips, and says nothing of their length: the verdict shows minutes without judging by them.
"""

import math
from collections import Counter, defaultdict

from orpheus.batching import FEW_STEPS
from orpheus.doctor import IMPORTANT, Report
from orpheus.settings import Settings

GOOD_CLIPS, BEST_CLIPS = 50, 300  # of a voice, by the README above
LOOK_FIRST = 0.1  # share of clips left out, or with findings, that comes before training: a choice


def measure_voices(report: Report) -> dict[str, tuple[int, float]]:
    """(clips, seconds) of each voice's kept clips; those without a voice name are under ""."""
    lengths = defaultdict(list)
    for clip in report.measures:
        lengths[clip.voice].append(clip.sound.seconds)
    return {voice: (len(seconds), sum(seconds)) for voice, seconds in lengths.items()}


def describe_few_clips(report: Report) -> str:
    """Which voices have under GOOD_CLIPS clips, with the source; empty if none has."""
    sizes = {voice: clips for voice, (clips, _) in measure_voices(report).items()}
    voice = min(sizes, key=sizes.get)
    if sizes[voice] >= GOOD_CLIPS:
        return ""
    few = sum(clips < GOOD_CLIPS for clips in sizes.values())
    subject = f"{few} of {len(sizes)} voices have under {GOOD_CLIPS} clips, " if few > 1 else ""
    name = voice or "the voice without a name"
    count = f"{sizes[voice]} clip{'s' if sizes[voice] > 1 else ''}"
    results = f"good results from about {GOOD_CLIPS} of a voice, the best from {BEST_CLIPS}"
    return f"{subject}{name} has {'only ' if few > 1 else ''}{count} (Orpheus's README: {results})"


def warn_of_few_clips(report: Report) -> None:
    """Prints a training run's warning of voices with too few clips."""
    if shortage := describe_few_clips(report):
        print(f"warning  {shortage}")


def count_suspects(report: Report) -> tuple[int, str]:
    """(kept clips with findings in IMPORTANT, the names of these, the most frequent first)."""
    kept = {clip.describe() for clip in report.measures}
    found = {name: kept.intersection(report.findings.get(name, ())) for name in IMPORTANT}
    counts = Counter({name: len(clips) for name, clips in sorted(found.items()) if clips})
    return len(set().union(*found.values())), ", ".join(name for name, _ in counts.most_common())


def describe_size(report: Report) -> str:
    """Minutes of each voice, and optimiser steps of a pass."""
    minutes = {voice: seconds / 60 for voice, (_, seconds) in measure_voices(report).items()}
    size = ", ".join(
        f"{length:.1f} min {f'of {voice}' if voice else 'without a voice name'}"
        for voice, length in minutes.items()
    )
    if len(minutes) > 4:
        size = f"{len(minutes)} voices of {min(minutes.values()):.1f} min or more"
    steps = report.steps_per_epoch
    return f"{size}, {steps} step{'s' if steps > 1 else ''} a pass"


def give_verdict(report: Report, settings: Settings) -> str:
    """What to do before training, or that the data is ready for it, in a line."""
    suspects, names = count_suspects(report)
    intended = sum(report.reasons[name.replace("_", " ")] for name in settings.leave_out)
    left_out = report.reasons.total() - intended
    shortage, first = describe_few_clips(report), []
    if left_out > LOOK_FIRST * report.clips:
        first.append(f"see why {left_out} of {report.clips} clips are left out")
    if suspects > LOOK_FIRST * len(report.measures):
        first.append(f"look at {suspects} with findings ({names})")
    if shortage:
        remedy = "raise limit" if report.clips == settings.limit else "get more"
        first.append(f"{remedy}: {shortage}")
    size = describe_size(report)
    if first:
        return f"{size}; before you train, {' and '.join(first)}"
    ready = [f"ready to train{advise_epochs(report, settings)}"]
    if suspects:
        ready.append(f"{suspects} to look at ({names})")
    if min(clips for clips, _ in measure_voices(report).values()) < BEST_CLIPS:
        ready.append(f"{BEST_CLIPS} clips of a voice would be best")
    return f"{size}: {'; '.join(ready)}"


def advise_epochs(report: Report, settings: Settings) -> str:
    """The passes over the data that a run needs if the settings give it under FEW_STEPS steps."""
    steps = math.ceil(report.steps_per_epoch * settings.num_train_epochs)
    if settings.max_steps > 0 or steps >= FEW_STEPS:
        return ""
    enough = math.ceil(FEW_STEPS / report.steps_per_epoch)
    given = f"{settings.num_train_epochs:g} would be {steps} steps"
    return f" with --num_train_epochs {enough} or more ({given})"
