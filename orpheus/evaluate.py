"""Make a page that compares a voice with its recordings, the codec, the base and other models.

python -m orpheus.evaluate --model outputs/anna          # → outputs/anna/evaluation.html
python -m orpheus.evaluate --model outputs/anna --model outputs/anna/checkpoint-100 --blind
python -m orpheus.evaluate --model outputs/anna --file lines.csv    # other texts, and recordings

The page is one file with the sounds in it: a table of scores, and below it every text as each of
them says it. Its texts are those that the run held out, and general English ones. Scores need
optional packages, which are named where they are missing:
pip install faster-whisper jiwer resemblyzer 'setuptools<81' speechmos onnxruntime
"""

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from orpheus.audio import measure_clip
from orpheus.clips import read_clips
from orpheus.codec import decode_stream, encode
from orpheus.files import is_adapter, make_folder, write_text
from orpheus.rows import row_text
from orpheus.runs import SAVED_REPORT
from orpheus.scoring import Judge, load_judges, measure
from orpheus.settings import (
    Parser,
    Settings,
    SpeakingSettings,
    UserError,
    read_json,
    read_text,
    run,
)
from orpheus.tokens import SAMPLE_RATE, TAG, read_texts
from orpheus.voice import Voice, load_voice

TEXTS = Path(__file__).with_name("evaluation_texts.txt")
PAGE = Path(__file__).with_name("evaluate.html")
REFERENCES = 20  # recordings from training, whose mean embedding is the voice to be compared with
CODEC = "codec"  # the recordings through the codec: the best that a model of it can do
# Of each score its heading, what it is multiplied by, and its decimals.
COLUMNS = {
    "wer": ("word errors, %", 100, 1),
    "cer": ("character errors, %", 100, 1),
    "likeness": ("likeness", 1, 2),
    "mos": ("DNSMOS", 1, 2),
    "ended": ("ended, %", 100, 0),
    "pace": ("pace", 1, 2),
    "silence": ("silence, s", 1, 2),
}


class Line(NamedTuple):
    """A text to say, the set of texts that it belongs to, and its recording, if there is one."""

    text: str
    kind: str = "given"  # or held-out, or general
    recording: Path | bytes | None = None


@dataclasses.dataclass
class Sound:
    """What one speaker makes of a line."""

    speaker: str
    line: Line
    audio: np.ndarray  # (samples,) at 24 kHz
    seed: int | None = None  # of a model's sampling
    ended: bool | None = None  # whether a model ended it by itself
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Corpus:
    """What a run's dataset gives to the evaluation."""

    held_out: list[Line] = dataclasses.field(default_factory=list)  # of the voice
    references: list[Path | bytes] = dataclasses.field(default_factory=list)  # trained on
    others: list[tuple[str, Line]] = dataclasses.field(default_factory=list)  # by another voice
    tags: set[str] = dataclasses.field(default_factory=set)


# ---------------------------------------------------------------- texts and recordings


def read_corpus(voice: Voice) -> Corpus:
    """Return what the dataset of a voice's run holds.

    Raises:
        UserError: If the dataset cannot be read.
    """
    report, settings, corpus = read_json(voice.home / SAVED_REPORT), voice.settings, Corpus()
    held_out = set(report.get("held_out_texts", ()))
    left_out = {clip.partition(": ")[0] for clip in [*report["left_out"], *report["dropped"]]}
    for clip in read_clips(settings):
        text, name = row_text(clip, settings)
        corpus.tags |= set(TAG.findall(text))
        if clip.error or not clip.audio or clip.source in left_out:
            continue
        line = Line(text, "held-out", clip.audio)
        if name != (voice.name or ""):
            if not corpus.others or corpus.others[0][0] == name:
                corpus.others.append((name, line))
        elif text in held_out:
            corpus.held_out.append(line)
        elif len(corpus.references) < REFERENCES:
            corpus.references.append(clip.audio)
    return corpus


def general_texts(tags: set[str]) -> list[Line]:
    """Return the lines of evaluation_texts.txt, and one for each other emotion tag of a corpus."""
    texts = [text for text in read_text(TEXTS).splitlines() if text and text[0] != "#"]
    known = {tag for text in texts for tag in TAG.findall(text)}
    texts += [f"Well, this is how it goes. {tag}" for tag in sorted(tags - known)]
    return [Line(text, "general") for text in texts]


def spread(items: list, count: int) -> list:
    """Return at most `count` of the items, evenly spread over them."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]


def read_lines(file: str, settings: Settings) -> list[Line]:
    """Return the texts of a file; of a table also their recordings.

    Raises:
        UserError: For a table with a row that cannot be used.
    """
    if Path(file).suffix.lower() not in (".csv", ".tsv", ".jsonl", ".parquet"):
        return [Line(text) for text in read_texts(Path(file))]
    table = {"dataset": file, "limit": None, "absolute_paths": True}
    table |= dict.fromkeys(("audio_column", "text_column", "voice_column"))
    clips = list(read_clips(settings.replace(**table)))
    if faulty := next((clip for clip in clips if clip.error or not clip.text), None):
        raise UserError(f"{file}: {faulty.source}: {faulty.error or 'it has no text'}")
    return [Line(clip.text, recording=clip.audio) for clip in clips]


def choose_lines(voice: Voice, file: str | None, count: int) -> tuple[list[Line], Corpus, list]:
    """Return the lines to say, the corpus, and notes on what is lacking.

    Args:
        file: texts that take the place of the held-out and general ones.
        count: of the held-out texts, at most.
    """
    corpus, notes = Corpus(), []
    if voice.home:
        try:
            corpus = read_corpus(voice)
        except UserError as error:
            notes.append(f"The run's recordings cannot be read: {error}.")
    if file:
        lines = read_lines(file, voice.settings)
        recordings = [line.recording for line in lines if line.recording]
        corpus.references = corpus.references or recordings[:REFERENCES]
        return lines, corpus, notes
    lines = spread(corpus.held_out, count)
    if not lines:
        notes.append("No recording was held out, so there are no rows of recordings.")
    if (language := voice.settings.language) == "en":
        return lines + general_texts(corpus.tags), corpus, notes
    if not lines:
        raise UserError(f"no texts in the language {language!r} to say: give some with --file")
    notes.append(f"The general texts are English and the voice speaks {language!r}: left out.")
    return lines, corpus, notes


# ---------------------------------------------------------------- speakers


def recorded_sounds(lines: list[Line], corpus: Corpus, voice: Voice) -> Iterator[Sound]:
    """Yield the recordings, trimmed as for training, the same through the codec, another voice."""
    lines = [line for line in lines if line.recording]
    recordings = [
        Sound("recordings", line, measure_clip(line.recording, voice.settings)[0]) for line in lines
    ]
    yield from recordings
    for sound in recordings:
        codes = encode(voice.codec, [sound.audio])[0]
        yield Sound(CODEC, sound.line, np.concatenate([*decode_stream(voice.codec, codes, seed=0)]))
    for name, line in spread(corpus.others, len(lines)):
        line = line._replace(kind=lines[0].kind)
        audio, _ = measure_clip(line.recording, voice.settings)
        yield Sound(f"another voice: {name}", line, audio)


def spoken_sounds(name: str, voice: Voice, lines: list[Line], seeds: int) -> Iterator[Sound]:
    """Yield every line as a voice says it, with each of the seeds."""
    texts = list(dict.fromkeys(line.text for line in lines))
    for seed in range(voice.settings.seed, voice.settings.seed + seeds):
        speech = dict(zip(texts, voice.replace(seed=seed).speak(texts), strict=True))
        for line in lines:
            yield Sound(name, line, speech[line.text].audio, seed, speech[line.text].ended)


def model_sounds(voice: Voice, models: list[str], options: dict, lines, seeds) -> Iterator[Sound]:
    """Yield the lines as the base says them, as the voice does, and as each other model does.

    The base of a LoRA is its own model with the LoRA switched off.
    """
    if is_adapter(voice.folder):
        with voice.model.disable_adapter():
            yield from spoken_sounds("base", voice, lines, seeds)
    elif voice.home and voice.settings.full_finetuning:
        base = load_voice(voice.settings.model, voice=voice.name, **options)
        yield from spoken_sounds("base", base, lines, seeds)
    yield from spoken_sounds("fine-tune" if voice.home else str(voice.folder), voice, lines, seeds)
    for model in models:
        yield from spoken_sounds(model, load_voice(model, **options), lines, seeds)


# ---------------------------------------------------------------- figures


def bootstrap(
    values: np.ndarray, weights: np.ndarray, texts: list[str], draws: int = 2000
) -> tuple[float, float, float]:
    """Return a weighted mean and its 95 % interval, by the percentile bootstrap over texts.

    Texts are drawn, each with all of its values, since the values of one text with several seeds
    are no independent samples (a cluster bootstrap: Davison and Hinkley, 1997, section 3.8).

    Args:
        values, weights: (n,), one for each sound; some weight is above 0.
        texts: of the n sounds.
    """
    groups = np.unique(texts, return_inverse=True)[1]
    sums = np.stack([np.bincount(groups, weights * values), np.bincount(groups, weights)])
    chosen = np.random.default_rng(0).integers(sums.shape[1], size=(draws, sums.shape[1]))
    means = np.divide(*sums[:, chosen].sum(axis=2))
    return float(np.divide(*sums.sum(axis=1))), *np.quantile(means, [0.025, 0.975]).tolist()


def summarize(sounds: list[Sound]) -> dict[str, tuple[float, float, float]]:
    """Return the mean of each score and the ends of its interval; errors weigh by length."""
    figures = {}
    for name in COLUMNS:
        scored = [sound for sound in sounds if name in sound.scores]
        if scored:
            spoken = [TAG.sub(" ", sound.line.text).split() for sound in scored]
            sizes = {"wer": map(len, spoken), "cer": (len(" ".join(words)) for words in spoken)}
            weights = np.array([*sizes.get(name, [1] * len(scored))], dtype=float)
            values = np.array([sound.scores[name] for sound in scored], dtype=float)
            figures[name] = bootstrap(values, weights, [sound.line.text for sound in scored])
    return figures


def make_table(sounds: list[Sound]) -> list[list[str]]:
    """Return the cells of the table: a heading, then a row for each set of texts and speaker."""
    groups = {}
    for sound in sounds:
        groups.setdefault((sound.line.kind, sound.speaker), []).append(sound)
    order = ["given", "held-out", "general"]
    rows = sorted(groups.items(), key=lambda group: order.index(group[0][0]))  # keeps speakers
    figures = {key: summarize(sounds) for key, sounds in rows}
    names = [name for name in COLUMNS if any(name in row for row in figures.values())]

    def cell(name, values):
        _, factor, digits = COLUMNS[name]
        mean, low, high = (f"{factor * value:.{digits}f}" for value in values)
        return f"{mean} ({low} to {high})"

    table = [["texts", "speaker", "sounds", *(COLUMNS[name][0] for name in names)]]
    for key, row in figures.items():
        cells = [cell(name, row[name]) if name in row else "" for name in names]
        table.append([*key, str(len(groups[key])), *cells])
    return table


def format_markdown(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


# ---------------------------------------------------------------- the page


def encode_flac(audio: np.ndarray) -> str:
    """Return (samples,) as a data URI: FLAC is lossless, and plays in every current browser."""
    file = io.BytesIO()
    soundfile.write(file, audio, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_page(title: str, sounds: list[Sound], notes: list[str], blind: bool) -> str:
    """Return the page's HTML. Of every text, each speaker's first sound is in it."""
    texts = {}
    for sound in sounds:
        texts.setdefault(sound.line.text, {}).setdefault(sound.speaker, sound)
    lines = []
    for text, speakers in texts.items():
        cells = [
            {
                "name": name,
                "audio": encode_flac(sound.audio),
                "scores": ", ".join(f"{key} {value:.2f}" for key, value in sound.scores.items()),
            }
            for name, sound in speakers.items()
        ]
        lines.append({"text": text, "cells": cells})
    table = make_table(sounds)
    page = {"title": title, "blind": blind, "table": table, "notes": notes, "lines": lines}
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    return read_text(PAGE).replace("DATA", data, 1)


def score_sounds(sounds: Iterator[Sound], pace: float | None, judges: list[Judge]) -> list[Sound]:
    """Return all sounds with their scores, and show how far it has come."""
    scored = []
    for sound in tqdm(sounds, unit=" sounds", disable=None, leave=False):
        ended = {} if sound.ended is None else {"ended": float(sound.ended)}
        sound.scores = ended | measure(sound.audio, sound.line.text, pace, judges)
        scored.append(sound)
    return scored


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", metavar="…", action="append", help="run to evaluate, then other models")
    add("--voice", metavar="NAME", help="voice name (the run's first)")
    add("--file", metavar="FILE", help="texts in place of the held-out and general ones: a text "
        "file, or a table with recordings")  # fmt: skip
    add("--texts", metavar="N", type=int, default=50, help="held-out texts, at most (50)")
    add("--seeds", metavar="N", type=int, default=3, help="how often a model says a text (3)")
    add("--blind", action="store_true", help="hide the names until a click")
    add("--whisper", metavar="…", help="faster-whisper's model: a size or a folder (base)")
    add("--out", metavar="FILE", help="page to write (evaluation.html in the run's folder)")
    arguments, options = parser.parse("codec", *SpeakingSettings.model_fields)
    options |= {"best_of": 1} | ({"voice": arguments.voice} if arguments.voice else {})
    model, *models = arguments.model or [None]
    voice = load_voice(model, **options)
    options = {"codec": voice.settings.codec} | options
    out = Path(arguments.out or (voice.home or Path()) / "evaluation.html")
    make_folder(str(out.parent), "out")  # so that a page which cannot be written is told first
    lines, corpus, notes = choose_lines(voice, arguments.file, arguments.texts)
    judges, missing = load_judges(arguments.whisper, corpus.references)
    notes += [f"Not scored: {', '.join(missing)}."] if missing else []
    for note in notes:
        print(f"note     {note}")

    def all_sounds():
        yield from recorded_sounds(lines, corpus, voice)
        yield from model_sounds(voice, models, options, lines, max(1, arguments.seeds))

    sounds = score_sounds(all_sounds(), voice.pace, judges)
    title = f"{voice.folder.resolve().name}, voice {voice.name or 'without a name'}"
    write_text(out, make_page(title, sounds, notes, arguments.blind))
    print(format_markdown(make_table(sounds)))
    print(f"page     {out}")


if __name__ == "__main__":
    run(main)
