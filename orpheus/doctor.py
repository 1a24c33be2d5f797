"""Findings about a dataset, and the report on them."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orpheus.audio import whole_file, write_text
from orpheus.clips import printable
from orpheus.encoding import Measures
from orpheus.runs import SAVED_REPORT
from orpheus.settings import Settings
from orpheus.tokens import SAMPLE_RATE

# name: (what it means, what to do). `leave_out` names those whose clips are not trained on.
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
    "same_sound": ("the same sound as an earlier clip", "leave one of them out"),
    "same_text": ("the same text as an earlier clip of the voice", "fine, if it is another take"),
    "digits": ("digits in the text", "write them as they are spoken"),
    "unspeakable": ("a link, a mail address or symbols in the text", "write what is spoken"),
    "pace": ("seconds per character far from the voice's own", "compare the text with the sound"),
    "loudness": ("over 10 dB from the voice's usual level", "normalise the clips"),
}
# Findings that a training run prints, too: they concern clips that it trains on, and have a remedy.
IMPORTANT = {"long", "clipped", "quiet", "narrow", "digits", "unspeakable", "pace", "loudness"}
# What a fault's message says: its few words in a count of the clips that are left out.
REASONS = {
    "silent throughout": "silent",
    "the text is empty": "no text",
    "beside it": "no text",
    "cannot be read as UTF-8": "text not UTF-8",
    "not text": "no text",
    " in the text": "nothing to speak",
    "lone surrogate": "broken text",
    "control character": "broken text",
    "no sound is named": "no sound",
    "does not exist": "no such file",
    "is a folder": "no such file",
    "outside the dataset": "outside the folder",
    "cut short": "cut short",
    "cut it into sentences": "too long",
    "far over full scale": "far over full scale",
    "not numbers": "unreadable",
    "no samples": "unreadable",
    "not audio": "unreadable",
    "not read here": "unreadable",
    "more columns": "broken row",
    "same_sound": "same sound",
}


def outliers(values: np.ndarray, groups: np.ndarray, far: float = 5) -> np.ndarray:
    """By how much each robust z-score within its group, |x − median| / (1.4826 × MAD), is over far.

    Iglewicz and Hoaglin (1993) take 3.5; 5 spares the merely slow.
    """
    over = np.zeros(len(values))
    for group in set(groups):
        mine = groups == group
        away = np.abs(values[mine] - np.median(values[mine]))
        if mine.sum() >= 8:
            over[mine] = away / max(1.4826 * np.median(away), 1e-3) - far
    return over


def repeats(keys: Iterable) -> list[bool]:
    """Which keys were there before."""
    seen = set()
    return [key in seen or bool(seen.add(key)) for key in keys]


def examine(measures: list[Measures]) -> dict[str, np.ndarray]:
    """How far each clip is over a finding's limit, (clips,) by name; found where above 0."""
    m = {name: np.array([getattr(one, name) for one in measures]) for name in Measures._fields}
    voices, texts = m["voice"], m["text"]
    usual = {v: np.median(m["level"][voices == v]) for v in set(voices)}
    lengths = np.array([len(text) for text in texts])
    strange = re.compile(r"https?://|www\.|@|[#*_{}\[\]\\|^~=+]")
    found = {
        "short": 0.5 - m["seconds"],
        "long": m["seconds"] - 20,
        "silence": m["silence"] - 0.5,
        "clipped": m["clipped"] - 0.001,
        "quiet": -40 - m["level"],
        "offset": np.abs(m["offset"]) - 0.01,
        "narrow": 16_000 - m["rate"],
        "no_highs": np.where(m["rate"] < 16_000, 0, SAMPLE_RATE - m["rate"]),
        "stereo": m["channels"] - 1,
        "same_sound": repeats(m["digest"]),
        "same_text": repeats(zip(voices, texts, strict=True)),
        "digits": [len(re.findall(r"\d", text)) for text in texts],
        "unspeakable": [len(strange.findall(text)) for text in texts],
        "pace": outliers(np.log(m["seconds"] / (lengths + 10)), voices),  # 10: a breath
        "loudness": np.abs(m["level"] - np.array([usual[v] for v in voices])) - 10,
    }
    assert found.keys() == FINDINGS.keys()
    return {name: np.asarray(over, dtype=float) for name, over in found.items()}


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
    held_out: int = 0  # rows kept from training
    split: tuple[list, list] = ((), ())  # the rows to train on, and those held out
    slots_used: dict[str, float] = field(default_factory=dict)  # share, by batching

    @property
    def seconds(self) -> float:
        return sum(m.seconds for m in self.measures)

    @property
    def characters(self) -> int:
        return sum(len(m.text) for m in self.measures)

    @property
    def voices(self) -> dict[str, int]:
        return dict(Counter(m.voice for m in self.measures if m.voice).most_common())

    def add_left_out(self, where: str, fault: str) -> None:
        self.left_out.append(f"{where}: {printable(fault)}")
        names = [words for part, words in REASONS.items() if part in fault]
        self.reasons[names[0] if names else fault if fault in FINDINGS else "broken row"] += 1

    def tell(self, settings: Settings, full: bool = False) -> None:
        """What a training run prints; in full, every finding with its worst clips and remedy."""
        path = f": {Path(settings.output_dir) / SAVED_REPORT}"
        print(f"data     {self.summary()}{path if self.reasons and not full else ''}")
        if self.note:
            print(f"  note  {self.note}")
        if full:
            self.tell_rows(settings)
        for title in ("dropped", "truncated", "left_out") if full else ():
            self.tell_some(title, getattr(self, title), 5)
        if not full:
            self.tell_some("cut to max_length", self.truncated, 0)
        for name, (what, remedy) in FINDINGS.items():
            left_out = name in settings.leave_out
            if not full and (left_out or name not in IMPORTANT):
                continue
            clips = self.findings.get(name, [])
            most = 3 if full and len(clips) < self.clips / 2 else 0  # it is all of them: no list
            done = "left out" if left_out else "trained on"
            self.tell_some(f"{name}, {what}; {done}; {remedy}", clips, most)

    def summary(self) -> str:
        """One line: clips, length, voices, and how many clips are left out for which reasons."""
        rows, voices = len(self.measures), self.voices
        length = f"{self.seconds / 3600:.2f} h"
        if self.seconds < 360:
            length = f"{self.seconds / 60:.1f} min"
        spoken = "voices " + ", ".join(f"{name} {count}" for name, count in voices.items())
        if len(voices) < 2:
            spoken = f"voice {next(iter(voices))}" if voices else "no voice named"
        elif len(voices) > 4:
            spoken = f"{len(voices)} voices"
        line = f"{self.dataset}: {rows} of {self.clips} clips, {length}, {spoken}"
        if not self.reasons:
            return line
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{line}; {self.reasons.total()} left out ({reasons})"

    def tell_rows(self, settings: Settings) -> None:
        """The lengths of the rows and what each way of batching makes of them."""
        tokens, longest = sum(m.tokens for m in self.measures), max(self.lengths)
        enough = int(np.quantile(self.lengths, 0.99, method="higher"))
        line = f"{tokens:,} tokens, the longest {longest:,} of max_length {settings.max_length:,}"
        if enough < longest:
            line += f"; max_length {enough:,} would keep 99 %"
        print(f"rows     {line}; {self.cached} from the cache")
        used = ", ".join(f"{name} {100 * part:.1f} %" for name, part in self.slots_used.items())
        chosen = f"{settings.batching} is chosen; {self.held_out} rows held out"
        print(f"batches  {used} of their slots used; {chosen}")

    def tell_some(self, title: str, clips: list[str], most: int) -> None:
        if not clips:
            return
        print(f"  {len(clips):4}  {title}")
        for clip in clips[:most]:
            print(f"          {clip}")
        if most and len(clips) > most:
            print(f"          … and {len(clips) - most} more, in {SAVED_REPORT}")

    def save(self, folder: Path) -> None:
        """data_report.json: everything but the clips' own measures."""
        told = {k: v for k, v in vars(self).items() if k not in ("measures", "lengths", "split")}
        told |= {"rows": len(self.measures), "voices": self.voices}
        told |= {"seconds": self.seconds, "characters": self.characters}  # the voice's pace
        told |= {"hours": self.seconds / 3600, "tokens": sum(m.tokens for m in self.measures)}
        text = json.dumps(told, indent=2, ensure_ascii=False)
        write_text(folder / SAVED_REPORT, text + "\n")


def draw_report(report: Report, path: Path) -> None:
    """A picture: how long the clips are, and seconds against characters by voice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["text.parse_math"] = False  # a voice or a folder may be named $x
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.hist([m.seconds for m in report.measures], bins=40)
    left.set(xlabel="seconds", ylabel="clips", title=f"{report.dataset}: length of clips")
    for voice in report.voices or [""]:
        mine = [m for m in report.measures if m.voice == voice]
        points = [len(m.text) for m in mine], [m.seconds for m in mine]
        right.scatter(*points, s=8, alpha=0.5, label=voice)
    right.set(xlabel="characters", ylabel="seconds", title="pace: clips off the line are suspect")
    if 0 < len(report.voices) <= 20:
        right.legend()
    with whole_file(path) as part:
        figure.savefig(part, dpi=100, format="png")
    pyplot.close(figure)
