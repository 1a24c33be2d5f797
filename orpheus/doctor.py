"""What is found in a dataset, the report on it, and whether it is ready to train on."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import rcParams
from matplotlib.figure import Figure

from orpheus.audio import ClipError, Sound
from orpheus.clips import printable
from orpheus.files import atomic_file, write_text
from orpheus.runs import SAVED_REPORT
from orpheus.settings import Settings, UserError
from orpheus.tokens import SAMPLE_RATE, TAG, count_pieces

# name: what it means; what to do. Clips with a finding that `leave_out` names are not trained on.
FINDINGS = {
    "short": "under 0.5 s; join it with a neighbour",
    "long": "over 20 s: such clips teach a model not to stop; cut it at a sentence",
    "silence": "over 0.5 s of silence at its ends; nothing to do: cut to keep_silence",
    "clipped": "over 0.1 % of samples at or over full scale; record it at a lower level",
    "quiet": "under -40 dB; normalise it, or record it louder",
    "offset": "a DC offset over 0.01; high-pass it at 20 Hz",
    "narrow": "sampled under 16 kHz: the voice will sound dull; find a better source",
    "no_highs": "sampled at 16 to 24 kHz: highs above half of that are missing; fine",
    "stereo": "more than one channel; nothing to do: mixed to mono",
    "cancelling": "channels that cancel each other: one was taken; listen to it",
    "same_sound": "the same sound as an earlier clip; leave one of them out",
    "same_text": "the same text as an earlier clip of the voice; fine, if it is another take",
    "digits": "digits in the text; write them as they are spoken",
    "markup": "markup that is neither an emotion tag nor speech; write the tag, or nothing",
    "unspeakable": "a link, a mail address or symbols in the text; write what is spoken",
    "pace": "seconds per character far from the voice's own; compare the text with the sound",
    "loudness": "over 10 dB from the voice's usual level; normalise the clips",
    "rare_tag": "an emotion tag that occurs under ten times; record more of it, or remove it",
    "alphabet": "a character that the tokenizer splits; give much more data, or other letters",
}
# Findings that a training run prints, too, unless their clips are left out: those with a remedy.
IMPORTANT = ["long", "clipped", "quiet", "narrow", "digits", "markup", "unspeakable", "pace"]
IMPORTANT += ["loudness", "rare_tag", "alphabet"]
RARE = 10  # an emotion tag that occurs less often is hardly learnt
# Orpheus's eight tags, by the words that people write for them in brackets of any kind.
MEANT = {
    "laugh|giggl|haha": "<laugh>",
    "chuckl|snicker": "<chuckle>",
    "sigh": "<sigh>",
    "cough|throat": "<cough>",
    "sniff": "<sniffle>",
    "groan|moan": "<groan>",
    "yawn": "<yawn>",
    "gasp": "<gasp>",
}
TAG_WORDS = "|".join(MEANT)
NOISES = f"{TAG_WORDS}|applau|breath|cries|crying|[ei][nx]hal|music|nois|paus|silen|sob|whisper"
HTML = "[abipsu]|br|div|em|font|hr|li|mark|small|span|strong|su[bp]|tt|ul"
MARKUP = re.compile(
    rf"</?(?!\w+>)[^\W\d][^<>]*>|</\w+>|<(?:{HTML})>|<\w*(?:{TAG_WORDS})\w*>|\[[^\[\]]*\]|\*\w[^*]*\*"
    rf"|[({{](?:\w+ly )?(?:{NOISES})[^(){{}}]*[)}}]|&(?:#x?)?\w+;",
    re.IGNORECASE,
)


def find_markup(text: str) -> list[str]:
    """Return the markup in a text that is neither an emotion tag nor speech.

    `<laughs>` is taken for `<laugh>`, but words of the user's own, as `<sneeze>`, are tags as well.
    """
    return [found for found in MARKUP.findall(text) if found not in MEANT.values()]


def what_is_meant(markup: str) -> str:
    """Return the tag or the character that a piece of markup stands for; empty if it is unknown."""
    if markup[0] == "&":
        return html.unescape(markup).replace(markup, "")
    return next((tag for words, tag in MEANT.items() if re.search(words, markup, re.I)), "")


ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
COLUMNS = {"source": str, "voice": str, "text": str, "tokens": int} | Sound.__annotations__
COLUMNS = {name: ARROW_TYPES[kind] for name, kind in COLUMNS.items()}


class MeasuredClips:
    """The measures of clips, as the columns of an Arrow table, which may be mapped from a file."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[SimpleNamespace]:
        for batch in self.table.to_batches(1000):
            for row in batch.to_pylist():
                sound = Sound(*(row[name] for name in Sound._fields))
                yield SimpleNamespace(**row, sound=sound)

    def take(self, numbers: np.ndarray) -> "MeasuredClips":
        return MeasuredClips(self.table.take(pa.array(numbers)))

    def array(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    def texts(self) -> Iterator[str]:
        for chunk in self.table["text"].iterchunks():
            yield from chunk.to_pylist()

    def groups(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """Return (clips,) numbers of a column's values, and the values, in their first order."""
        column = self.table[name].dictionary_encode().combine_chunks()
        return column.indices.to_numpy(), column.dictionary


def find_outliers(values: np.ndarray, groups: np.ndarray, limit: float = 5) -> np.ndarray:
    """Return how far each robust z-score within its group is over `limit`.

    The score is |x − median| / (1.4826 × MAD). Iglewicz and Hoaglin (1993) take 3.5; 5 spares clips
    that are merely slow. Groups of fewer than eight have no outliers.
    """
    excess = np.zeros(len(values))
    for group in np.unique(groups):
        members = groups == group
        distance = np.abs(values[members] - np.median(values[members]))
        if members.sum() >= 8:
            excess[members] = distance / max(1.4826 * np.median(distance), 1e-3) - limit
    return excess


def find_repeats(keys: np.ndarray) -> np.ndarray:
    """Return whether each key occurred earlier."""
    repeated = np.ones(len(keys))
    repeated[np.unique(keys, return_index=True)[1]] = 0
    return repeated


def count_tags(texts: Iterable[str]) -> Counter:
    """Return how often each emotion tag occurs, the most frequent first."""
    return Counter(dict(Counter(tag for x in texts for tag in TAG.findall(x)).most_common()))


def examine(clips: MeasuredClips, tags: Counter, pieces: dict[str, int]) -> dict[str, np.ndarray]:
    """Return how far each clip exceeds the limit of each finding, (clips,) by name; found above 0.

    `pieces` are the characters that the tokenizer splits, as `count_pieces` returns them.
    """
    voices, names = clips.groups("voice")
    seconds, level, rate = map(clips.array, ("seconds", "level", "rate"))
    characters = pc.utf8_length(clips.table["text"]).to_numpy()
    cancelling = clips.array("cancelling")
    usual = np.array([np.median(level[voices == n]) for n in range(len(names))])
    split = f"[{re.escape(''.join(pieces))}]" if pieces else "(?!)"

    def count(pattern: str) -> list[int]:
        return [len(re.findall(pattern, text)) for text in clips.texts()]

    excess = {
        "short": 0.5 - seconds,
        "long": seconds - 20,
        "silence": clips.array("silence") - 0.5,
        "clipped": clips.array("clipped") - 0.001,
        "quiet": -40 - level,
        "offset": np.abs(clips.array("offset")) - 0.01,
        "narrow": 16_000 - rate,
        "no_highs": np.where(rate < 16_000, 0, SAMPLE_RATE - rate),
        "stereo": (clips.array("channels") - 1) * ~cancelling,
        "cancelling": cancelling,
        "same_sound": find_repeats(clips.groups("digest")[0]),
        "same_text": find_repeats(clips.groups("text")[0] * len(names) + voices),
        "digits": count(r"\d"),
        "markup": [len(find_markup(text)) for text in clips.texts()],
        "unspeakable": count(r"https?://|www\.|@|[#*_{}\[\]\\|^~=+]"),
        # 10 characters for the breath before a clip
        "pace": find_outliers(np.log(seconds / (characters + 10)), voices),
        "loudness": np.abs(level - usual[voices]) - 10,
        "rare_tag": [max([0, *(RARE - tags[t] for t in TAG.findall(x))]) for x in clips.texts()],
        "alphabet": count(split),
    }
    return {name: np.asarray(values, dtype=float) for name, values in excess.items()}


@dataclass
class Report:
    """What went into the rows, what was left out and why, and what the doctor found."""

    dataset: str
    clips: int = 0
    cached: int = 0  # encoded in an earlier run
    digest: str = ""  # SHA-256 over the rows' ids and labels, in order
    prompts: list[str] = field(default_factory=list)  # of the first rows, with their special tokens
    dropped: list[str] = field(default_factory=list)  # over max_length
    truncated: list[str] = field(default_factory=list)  # cut to max_length
    left_out: list[str] = field(default_factory=list)  # faulty, or named by leave_out
    findings: dict[str, list[str]] = field(default_factory=dict)  # clips by finding
    suspects: int = 0  # kept clips with a finding in IMPORTANT
    important: Counter = field(default_factory=Counter)  # these findings, by their kept clips
    measures: MeasuredClips | None = None  # of the rows, in their order
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
        return float(self.measures.array("seconds").sum())

    @property
    def characters(self) -> int:
        """Characters of their texts."""
        return pc.sum(pc.utf8_length(self.measures.table["text"])).as_py() or 0

    @property
    def voices(self) -> dict[str, int]:
        """Clips by voice, the most frequent voice first."""
        counts = {voice: clips for voice, (clips, _) in self.measure_voices().items() if voice}
        return dict(Counter(counts).most_common())

    def measure_voices(self) -> dict[str, tuple[int, float]]:
        """Return (clips, seconds) of each voice; clips without a voice name are under ""."""
        groups, names = self.measures.groups("voice")
        clips, seconds = np.bincount(groups), np.bincount(groups, self.measures.array("seconds"))
        sizes = zip(clips.tolist(), seconds.tolist(), strict=True)
        return dict(zip(names.to_pylist(), sizes, strict=True))

    def add_left_out(self, source: str, error: UserError) -> None:
        """Records a clip that is left out, and why."""
        self.left_out.append(f"{source}: {printable(str(error))}")
        self.reasons[getattr(error, "reason", "broken row")] += 1

    def add_findings(self, leave_out: list[str], tokenizer) -> np.ndarray:
        """Examine the measured clips, and leave out those with findings that `leave_out` names.

        Returns (clips,), True for the clips that are kept. `measures` then holds those alone.
        """
        clips = self.measures
        self.tags, self.pieces = count_tags(clips.texts()), count_pieces(clips.texts(), tokenizer)
        excess = examine(clips, self.tags, self.pieces)
        for name, values in excess.items():
            worst_first = np.argsort(-values, kind="stable")[: (values > 0).sum()]
            if len(worst_first):
                self.findings[name] = [describe(clip, name) for clip in clips.take(worst_first)]
        found = {name: values > 0 for name, values in excess.items()}
        kept = ~np.any([np.zeros(len(clips), bool), *(found[name] for name in leave_out)], axis=0)
        for n, clip in zip(np.flatnonzero(~kept), clips.take(np.flatnonzero(~kept)), strict=True):
            names = [name for name in leave_out if found[name][n]]
            self.add_left_out(clip.source, ClipError(", ".join(names), names[0].replace("_", " ")))
        important = {name: found[name] & kept for name in sorted(IMPORTANT)}
        self.suspects = int(np.any([*important.values()], axis=0).sum())
        counts = Counter({name: int(mask.sum()) for name, mask in important.items() if mask.any()})
        self.important = Counter(dict(counts.most_common()))
        if not kept.all():
            self.measures = clips.take(np.flatnonzero(kept))
        return kept

    def print_summary(self, settings: Settings, full: bool = False) -> None:
        """Print what a training run shows; in full, every finding with its worst clips."""
        path = f": {Path(settings.output_dir) / SAVED_REPORT}"
        print(f"data     {self.summary()}{path if self.reasons and not full else ''}")
        if self.note:
            print(f"  note  {self.note}")
        if full:
            self.print_rows(settings)
            print_clips("dropped", self.dropped, 5)
            print_clips("left out", self.left_out, 5)
        print_clips("cut to max_length", self.truncated, 5 * full)
        for name, meaning in FINDINGS.items():
            left_out = name in settings.leave_out
            if full or (name in IMPORTANT and not left_out):
                clips = self.findings.get(name, [])
                shown = 3 * (full and len(clips) < self.clips / 2)  # no list of nearly all clips
                action = "left out" if left_out else "trained on"
                print_clips(f"{name}, {action}: {meaning}", clips, shown)

    def summary(self) -> str:
        """Return a line of clips, length, voices, and how many clips are left out and why."""
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
        """Prints the first prompts, the rows' lengths, and what each way of batching uses."""
        for prompt in self.prompts:
            print(f"prompt   {prompt}")
        longest = max(self.lengths)
        enough = int(np.quantile(self.lengths, 0.99, method="higher"))
        tokens = self.measures.array("tokens").sum()
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

    def save(self, folder: Path) -> None:
        """Write data_report.json: everything but the measures and lengths of each clip."""
        values = {k: v for k, v in vars(self).items() if k not in ("measures", "lengths")}
        values |= {"rows": len(self.measures), "voices": self.voices, "seconds": self.seconds}
        values |= {"characters": self.characters, "hours": self.seconds / 3600}
        values["tokens"] = int(self.measures.array("tokens").sum())
        write_text(folder / SAVED_REPORT, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def print_clips(title: str, clips: list[str], shown: int) -> None:
    """Print how many clips there are under a title, and the first `shown` of them."""
    if clips:
        print(f"  {len(clips):4}  {title}")
        for clip in clips[:shown]:
            print(f"          {clip}")
        if 0 < shown < len(clips):
            print(f"          … and {len(clips) - shown} more, in {SAVED_REPORT}")


def describe(clip: SimpleNamespace, finding: str) -> str:
    """Return a clip as a line of the report under a finding."""
    sound = clip.sound
    line = f"{clip.source}: {sound.seconds:.1f} s, {sound.level:.0f} dB, {clip.text[:50]!r}"
    markup = find_markup(clip.text) if finding == "markup" else []
    meant = [f"{found} → {what_is_meant(found)}".removesuffix(" → ") for found in markup]
    return ": ".join([line, *filter(None, [", ".join(meant)])])


def check_leave_out(settings: Settings) -> None:
    """Raise a UserError for a name in `leave_out` that is not a finding's."""
    for name in settings.leave_out:
        if name not in FINDINGS:
            fault = f"no finding is named {name[:80]!r}; there are {', '.join(FINDINGS)}"
            raise UserError(f"leave_out: {fault}")


def draw_report(report: Report, path: Path) -> None:
    """Draws how long the clips are, and their seconds over their characters by voice."""
    rcParams["text.parse_math"] = False  # a voice or a folder may be named $x
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seconds = report.measures.array("seconds")
    left.hist(seconds, bins=40)
    left.set(xlabel="seconds", ylabel="clips", title=f"{report.dataset}: length of clips")
    characters = pc.utf8_length(report.measures.table["text"]).to_numpy()
    voices, names = report.measures.groups("voice")
    for n, voice in enumerate(names.to_pylist()):
        right.scatter(characters[voices == n], seconds[voices == n], s=8, alpha=0.5, label=voice)
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


def describe_few_clips(report: Report) -> str:
    """Return which voices have under GOOD_CLIPS clips, with the source; empty if none has."""
    sizes = {voice: clips for voice, (clips, _) in report.measure_voices().items()}
    voice = min(sizes, key=sizes.get)
    few = sum(clips < GOOD_CLIPS for clips in sizes.values())
    if not few:
        return ""
    subject = f"{few} of {len(sizes)} voices have under {GOOD_CLIPS} clips, " if few > 1 else ""
    has = f"{voice or 'the voice without a name'} has {'only ' if few > 1 else ''}{sizes[voice]}"
    results = f"good results from about {GOOD_CLIPS} of a voice, the best from {BEST_CLIPS}"
    return f"{subject}{has} clip{'s'[: sizes[voice] > 1]} (Orpheus's README: {results})"


def warn_of_few_clips(report: Report) -> None:
    """Print a training run's warning of voices with too few clips."""
    if shortage := describe_few_clips(report):
        print(f"warning  {shortage}")


def describe_size(report: Report) -> str:
    """Return the minutes of each voice, and the optimiser steps of a pass."""
    minutes = {voice: seconds / 60 for voice, (_, seconds) in report.measure_voices().items()}
    names = {voice: f"of {voice}" if voice else "without a voice name" for voice in minutes}
    size = ", ".join(f"{length:.1f} min {names[voice]}" for voice, length in minutes.items())
    if len(minutes) > 4:
        size = f"{len(minutes)} voices of {min(minutes.values()):.1f} min or more"
    return f"{size}, {report.steps_per_epoch} step{'s'[: report.steps_per_epoch > 1]} a pass"


def give_verdict(report: Report, settings: Settings) -> str:
    """Return what to do before training, or that the data is ready for it, in a line."""
    names = ", ".join(report.important)
    intended = sum(report.reasons[name.replace("_", " ")] for name in settings.leave_out)
    left_out = report.reasons.total() - intended
    size, shortage, first = describe_size(report), describe_few_clips(report), []
    if left_out > LOOK_FIRST * report.clips:
        first.append(f"see why {left_out} of {report.clips} clips are left out")
    if report.suspects > LOOK_FIRST * len(report.measures):
        first.append(f"look at {report.suspects} with findings ({names})")
    if shortage:
        remedy = "raise limit" if report.clips == settings.limit else "get more"
        first.append(f"{remedy}: {shortage}")
    if first:
        return f"{size}; before you train, {' and '.join(first)}"
    ready, steps = "ready to train", math.ceil(report.steps_per_epoch * settings.num_train_epochs)
    if settings.max_steps <= 0 and steps < FEW_STEPS:
        enough = math.ceil(FEW_STEPS / report.steps_per_epoch)
        given = f"{settings.num_train_epochs:g} would be {steps} steps"
        ready += f" with --num_train_epochs {enough} or more ({given})"
    if report.suspects:
        ready += f"; {report.suspects} to look at ({names})"
    if min(clips for clips, _ in report.measure_voices().values()) < BEST_CLIPS:
        ready += f"; {BEST_CLIPS} clips of a voice would be best"
    return f"{size}: {ready}"
