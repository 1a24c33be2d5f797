"""What is found in a dataset, the report on it, and whether it is ready to train on."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orpheus.audio import ClipError, Sound
from orpheus.clips import printable
from orpheus.files import atomic_file, write_text
from orpheus.runs import SAVED_REPORT
from orpheus.settings import Settings, UserError
from orpheus.tokens import SAMPLE_RATE, TAG, count_pieces

# name: (what it means, what to do). Clips with a finding that `leave_out` names are not trained on.
FINDINGS = {
    "short": ("under 0.5 s", "join it with a neighbour"),
    "long": ("over 20 s: such clips teach a model not to stop", "cut it at a sentence"),
    "silence": ("over 0.5 s of silence at its ends", "nothing to do: cut to keep_silence"),
    "clipped": ("over 0.1 % of samples at or over full scale", "record it at a lower level"),
    "quiet": ("under -40 dB", "normalise it, or record it louder"),
    "offset": ("a DC offset over 0.01", "high-pass it at 20 Hz"),
    "narrow": ("sampled under 16 kHz: the voice will sound dull", "find a better source"),
    "no_highs": ("sampled at 16 to 24 kHz: highs above half of that are missing", "fine"),
    "stereo": ("more than one channel", "nothing to do: mixed to mono"),
    "cancelling": ("channels that cancel each other: one was taken", "fine, if it sounds right"),
    "same_sound": ("the same sound as an earlier clip", "leave one of them out"),
    "same_text": ("the same text as an earlier clip of the voice", "fine, if it is another take"),
    "digits": ("digits in the text", "write them as they are spoken"),
    "unspeakable": ("a link, a mail address or symbols in the text", "write what is spoken"),
    "pace": ("seconds per character far from the voice's own", "compare the text with the sound"),
    "loudness": ("over 10 dB from the voice's usual level", "normalise the clips"),
    "rare_tag": ("an emotion tag that occurs under ten times", "record more of it, or remove it"),
    "alphabet": (
        "a character that the tokenizer splits into pieces",
        "give much more data, or write the text in letters that the base knows",
    ),
}
# Findings that a training run prints, too, unless their clips are left out: those with a remedy.
IMPORTANT = {"long", "clipped", "quiet", "narrow", "digits", "unspeakable", "pace", "loudness"}
IMPORTANT |= {"rare_tag", "alphabet"}


class Measures(NamedTuple):
    """What the doctor examines of a clip."""

    source: str  # file and row, for messages
    voice: str
    text: str
    sound: Sound = Sound()
    tokens: int = 0  # in its row

    def describe(self) -> str:
        """The clip in a line of the report."""
        sound = self.sound
        return f"{self.source}: {sound.seconds:.1f} s, {sound.level:.0f} dB, {self.text[:50]!r}"


def find_outliers(values: np.ndarray, groups: np.ndarray, limit: float = 5) -> np.ndarray:
    """How far each robust z-score within its group, |x − median| / (1.4826 × MAD), is over `limit`.

    Iglewicz and Hoaglin (1993) take 3.5; 5 spares clips that are merely slow. Groups of fewer than
    eight have no outliers.
    """
    excess = np.zeros(len(values))
    for group in set(groups):
        members = groups == group
        distance = np.abs(values[members] - np.median(values[members]))
        if members.sum() >= 8:
            excess[members] = distance / max(1.4826 * np.median(distance), 1e-3) - limit
    return excess


def find_repeats(keys: Iterable) -> list[bool]:
    """Whether each key occurred earlier."""
    seen = set()
    return [key in seen or bool(seen.add(key)) for key in keys]


RARE = 10  # an emotion tag that occurs less often is hardly learnt


def count_tags(texts: Iterable[str]) -> Counter:
    """How often each emotion tag occurs, the most frequent first."""
    tags = Counter(tag for text in texts for tag in TAG.findall(text))
    return Counter(dict(tags.most_common()))


def examine(measures: list[Measures], pieces: dict[str, int]) -> dict[str, np.ndarray]:
    """How far each clip exceeds the limit of each finding, (clips,) by name; found if above 0.

    `pieces` are the characters that the tokenizer splits, as `count_pieces` returns them.
    """
    sound = {
        name: np.array([getattr(clip.sound, name) for clip in measures]) for name in Sound._fields
    }
    voices = np.array([clip.voice for clip in measures])
    texts = [clip.text for clip in measures]
    lengths = np.array([len(text) for text in texts])
    median_level = {v: np.median(sound["level"][voices == v]) for v in set(voices)}
    voice_level = np.array([median_level[voice] for voice in voices])
    tags = count_tags(texts)
    unspeakable = re.compile(r"https?://|www\.|@|[#*_{}\[\]\\|^~=+]")
    excess = {
        "short": 0.5 - sound["seconds"],
        "long": sound["seconds"] - 20,
        "silence": sound["silence"] - 0.5,
        "clipped": sound["clipped"] - 0.001,
        "quiet": -40 - sound["level"],
        "offset": np.abs(sound["offset"]) - 0.01,
        "narrow": 16_000 - sound["rate"],
        "no_highs": np.where(sound["rate"] < 16_000, 0, SAMPLE_RATE - sound["rate"]),
        "stereo": (sound["channels"] - 1) * ~sound["cancelling"],
        "cancelling": sound["cancelling"],
        "same_sound": find_repeats(sound["digest"]),
        "same_text": find_repeats(zip(voices, texts, strict=True)),
        "digits": [len(re.findall(r"\d", text)) for text in texts],
        "unspeakable": [len(unspeakable.findall(text)) for text in texts],
        # 10 characters for the breath before a clip
        "pace": find_outliers(np.log(sound["seconds"] / (lengths + 10)), voices),
        "loudness": np.abs(sound["level"] - voice_level) - 10,
        "rare_tag": [max((RARE - tags[t] for t in TAG.findall(text)), default=0) for text in texts],
        "alphabet": [sum(character in pieces for character in text) for text in texts],
    }
    assert excess.keys() == FINDINGS.keys()
    return {name: np.asarray(values, dtype=float) for name, values in excess.items()}


@dataclass
class Report:
    """What went into the rows, what was left out and why, and what the doctor found."""

    dataset: str
    clips: int = 0
    cached: int = 0  # encoded in an earlier run
    digest: str = ""  # SHA-256 over the rows' ids and labels, in order
    dropped: list[str] = field(default_factory=list)  # over max_length
    truncated: list[str] = field(default_factory=list)  # cut to max_length
    left_out: list[str] = field(default_factory=list)  # faulty, or named by leave_out
    findings: dict[str, list[str]] = field(default_factory=dict)  # clips by finding
    measures: list[Measures] = field(default_factory=list)  # of the rows, in their order
    lengths: list[int] = field(default_factory=list)  # tokens of every clip, dropped ones too
    reasons: Counter = field(default_factory=Counter)  # clips left out or dropped, in few words
    note: str | None = None  # how the table was read, where that was not obvious
    tags: Counter = field(default_factory=Counter)  # emotion tags, of the measured clips
    pieces: dict[str, int] = field(default_factory=dict)  # tokens of characters that are split
    held_out: int = 0  # rows kept from training
    held_out_texts: list[str] = field(default_factory=list)  # their texts
    slots_used: dict[str, float] = field(default_factory=dict)  # share, by batching
    steps_per_epoch: int = 0  # optimiser steps of a pass, on one GPU

    @property
    def seconds(self) -> float:
        """Seconds of the clips that are kept."""
        return sum(clip.sound.seconds for clip in self.measures)

    @property
    def characters(self) -> int:
        """Characters of their texts."""
        return sum(len(clip.text) for clip in self.measures)

    @property
    def voices(self) -> dict[str, int]:
        """Clips by voice, the most frequent voice first."""
        return dict(Counter(clip.voice for clip in self.measures if clip.voice).most_common())

    def add_left_out(self, source: str, error: UserError) -> None:
        """Records a clip that is left out, and why."""
        self.left_out.append(f"{source}: {printable(str(error))}")
        self.reasons[getattr(error, "reason", "broken row")] += 1

    def add_findings(self, leave_out: list[str], tokenizer) -> np.ndarray:
        """Examines the measured clips, and records those with findings that `leave_out` names.

        Returns (clips,), True for the clips that are kept. `measures` then holds those alone.
        """
        texts = [clip.text for clip in self.measures]
        self.tags, self.pieces = count_tags(texts), count_pieces(texts, tokenizer)
        excess = examine(self.measures, self.pieces)
        kept = np.ones(len(self.measures), dtype=bool)
        for name, values in excess.items():
            worst_first = np.argsort(-values, kind="stable")[: (values > 0).sum()]
            if len(worst_first):
                self.findings[name] = [self.measures[n].describe() for n in worst_first]
            if name in leave_out:
                kept &= values <= 0
        for n in np.flatnonzero(~kept):
            names = [name for name in leave_out if excess[name][n] > 0]
            error = ClipError(", ".join(names), names[0].replace("_", " "))
            self.add_left_out(self.measures[n].source, error)
        self.measures = [clip for clip, keep in zip(self.measures, kept, strict=True) if keep]
        return kept

    def print_summary(self, settings: Settings, full: bool = False) -> None:
        """What a training run prints; in full, every finding with its worst clips and remedy."""
        path = f": {Path(settings.output_dir) / SAVED_REPORT}"
        print(f"data     {self.summary()}{path if self.reasons and not full else ''}")
        if self.note:
            print(f"  note  {self.note}")
        if full:
            self.print_rows(settings)
        for title in ("dropped", "truncated", "left_out") if full else ():
            self.print_clips(title, getattr(self, title), 5)
        if not full:
            self.print_clips("cut to max_length", self.truncated, 0)
        for name, (meaning, remedy) in FINDINGS.items():
            left_out = name in settings.leave_out
            if not full and (left_out or name not in IMPORTANT):
                continue
            clips = self.findings.get(name, [])
            shown = 3 if full and len(clips) < self.clips / 2 else 0  # no list of nearly all clips
            action = "left out" if left_out else "trained on"
            self.print_clips(f"{name}, {meaning}; {action}; {remedy}", clips, shown)

    def summary(self) -> str:
        """One line: clips, length, voices, and how many clips are left out for which reasons."""
        rows, voices = len(self.measures), self.voices
        length = f"{self.seconds / 3600:.2f} h"
        if self.seconds < 360:
            length = f"{self.seconds / 60:.1f} min"
        names = "voices " + ", ".join(f"{name} {count}" for name, count in voices.items())
        if len(voices) < 2:
            names = f"voice {next(iter(voices))}" if voices else "no voice named (--voice NAME)"
        elif len(voices) > 4:
            names = f"{len(voices)} voices"
        if voices and (unnamed := rows - sum(voices.values())):
            names += f", {unnamed} without a voice name"
        line = f"{self.dataset}: {rows} of {self.clips} clips, {length}, {names}"
        if not self.reasons:
            return line
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{line}; {self.reasons.total()} left out ({reasons})"

    def print_rows(self, settings: Settings) -> None:
        """Prints the lengths of the rows, and the share of slots that each way of batching uses."""
        tokens, longest = sum(clip.tokens for clip in self.measures), max(self.lengths)
        enough = int(np.quantile(self.lengths, 0.99, method="higher"))
        line = f"{tokens:,} tokens, the longest {longest:,} of max_length {settings.max_length:,}"
        if enough < longest:
            line += f"; max_length {enough:,} would keep 99 %"
        print(f"rows     {line}; {self.cached} from the cache")
        used = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.slots_used.items())
        chosen = f"{settings.batching} is chosen; {self.held_out} rows held out"
        print(f"batches  {used} of their slots used; {chosen}")
        for name, counts in (("tags", self.tags), ("pieces", self.pieces)):
            if counts:  # pieces: the tokens of every character that is split
                shown = ", ".join(f"{key} {count}" for key, count in list(counts.items())[:40])
                print(f"{name:9}{shown}{', …' if len(counts) > 40 else ''}")

    def print_clips(self, title: str, clips: list[str], shown: int) -> None:
        """Prints how many clips there are under a title, and the first `shown` of them."""
        if not clips:
            return
        print(f"  {len(clips):4}  {title}")
        for clip in clips[:shown]:
            print(f"          {clip}")
        if 0 < shown < len(clips):
            print(f"          … and {len(clips) - shown} more, in {SAVED_REPORT}")

    def save(self, folder: Path) -> None:
        """Writes data_report.json: everything but the measures and lengths of each clip."""
        values = {k: v for k, v in vars(self).items() if k not in ("measures", "lengths")}
        values |= {"rows": len(self.measures), "voices": self.voices}
        values |= {"seconds": self.seconds, "characters": self.characters}  # the voice's pace
        tokens = sum(clip.tokens for clip in self.measures)
        values |= {"hours": self.seconds / 3600, "tokens": tokens}
        write_text(folder / SAVED_REPORT, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def check_leave_out(settings: Settings) -> None:
    """`UserError` for a name in `leave_out` that is not a finding's."""
    if unknown := set(settings.leave_out) - FINDINGS.keys():
        name, names = min(unknown)[:80], ", ".join(FINDINGS)
        raise UserError(f"leave_out: no finding is named {name!r}; there are {names}")


def draw_report(report: Report, path: Path) -> None:
    """Draws how long the clips are, and their seconds over their characters by voice."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a voice or a folder may be named $x
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist([clip.sound.seconds for clip in report.measures], bins=40)
    left.set(xlabel="seconds", ylabel="clips", title=f"{report.dataset}: length of clips")
    for voice in report.voices or [""]:
        clips = [clip for clip in report.measures if clip.voice == voice]
        points = [len(clip.text) for clip in clips], [clip.sound.seconds for clip in clips]
        right.scatter(*points, s=8, alpha=0.5, label=voice)
    right.set(xlabel="characters", ylabel="seconds", title="pace: clips off the line are suspect")
    if 0 < len(report.voices) <= 20:
        right.legend()
    with atomic_file(path) as part:
        figure.savefig(part, dpi=100, format="png")


# ---------------------------------------------------------------- the verdict

# The README of github.com/canopyai/Orpheus-TTS has, under "Finetune Model": "You should start to
# see high quality results after ~50 examples but for best results, aim for 300 examples/speaker".
# It counts clips, and says nothing of their length: nor does the verdict judge by minutes.
GOOD_CLIPS, BEST_CLIPS = 50, 300  # of a voice
LOOK_FIRST = 0.1  # share of clips left out, or with findings, that comes before training: a choice
FEW_STEPS = 50  # a run of fewer optimiser steps prints a warning; our choice


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
