"""Who says what in an evaluation: texts and recordings, the codec, models, other programs' wavs."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orpheus.audio import measure_clip, read_audio
from orpheus.clips import read_clips
from orpheus.comparison import CODEC
from orpheus.files import write_text
from orpheus.hub import MODEL_FILES, fetch, find_base, is_adapter
from orpheus.options import overrides, read_texts
from orpheus.runs import SAVED_REPORT
from orpheus.settings import SPEAKING, UserError, read_json, read_text
from orpheus.tokens import TAG

TEXTS = Path(__file__).with_name("evaluation_texts.txt")
REFERENCES = 20  # recordings from training, whose mean embedding is the voice that is compared with


class Line(NamedTuple):
    """A text to say, its kind, and its recording, if there is one."""

    text: str
    kind: str = "given"  # or held-out, or a heading of evaluation_texts.txt
    recording: Path | bytes | None = None


class Sound(NamedTuple):
    """What a speaker makes of a line."""

    line: Line
    audio: np.ndarray  # (samples,) at 24 kHz
    seed: int | None = None  # of a model's sampling
    ended: bool | None = None  # whether a model ended it by itself; None if that is not known


class Speaker(NamedTuple):
    """A row of the table."""

    name: str
    count: int  # of its sounds
    sounds: Iterator[Sound]  # made as they are asked for


@dataclasses.dataclass
class Corpus:
    """What a run's dataset gives to the evaluation."""

    held_out: list[Line] = dataclasses.field(default_factory=list)  # of the voice
    references: list[Path | bytes] = dataclasses.field(default_factory=list)  # trained on
    others: dict[str, list[Line]] = dataclasses.field(default_factory=dict)  # by other voices
    tags: set[str] = dataclasses.field(default_factory=set)


# ---------------------------------------------------------------- texts and recordings


def read_general(tags: set[str]) -> list[Line]:
    """The lines of evaluation_texts.txt, and one for each of the `tags` that they do not have."""
    lines, kind = [], ""
    for line in read_text(TEXTS).splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line:
            lines.append(Line(line, kind))
    known = {tag for line in lines for tag in TAG.findall(line.text)}
    lines += [Line(f"Well, this is how it goes. {tag}", "tags") for tag in sorted(tags - known)]
    return lines


def read_corpus(info, voice: str | None) -> Corpus:
    """The recordings and texts of a run's dataset; `UserError` if the dataset cannot be read."""
    from orpheus.rows import row_text

    report, settings, corpus = read_json(info.home / SAVED_REPORT), info.settings, Corpus()
    held_out = set(report.get("held_out_texts", ()))
    left_out = {clip.partition(": ")[0] for clip in [*report["left_out"], *report["dropped"]]}
    for clip in read_clips(settings):
        text, name = row_text(clip, settings)
        corpus.tags |= set(TAG.findall(text))
        if clip.error or clip.source in left_out:
            continue
        line = Line(text, "held-out", clip.audio)
        if name != (voice or ""):
            if clip.audio:
                corpus.others.setdefault(name, []).append(line)
        elif text in held_out:
            corpus.held_out.append(line)
        elif clip.audio and len(corpus.references) < REFERENCES:
            corpus.references.append(clip.audio)
    return corpus


def spread(lines: list, count: int) -> list:
    """At most `count` of `lines`, evenly spread over them."""
    return [lines[n * len(lines) // count] for n in range(count)] if len(lines) > count else lines


def choose_lines(info, voice, arguments, notes: list[str]) -> tuple[list[Line], Corpus]:
    """The lines to say, and the corpus; `notes` gets what it lacks.

    Texts of --file take the place of the others.
    """
    corpus = Corpus()
    if info.home:
        try:
            corpus = read_corpus(info, voice)
        except UserError as error:
            notes.append(f"The run's recordings cannot be read: {error}.")
    if arguments.file:
        texts, recordings = read_texts([], arguments.file)
        corpus.references = corpus.references or recordings
        return [Line(t, "given", r) for t, r in zip_longest(texts, recordings)], corpus
    held_out = spread(corpus.held_out, arguments.texts)
    if not any(line.recording for line in held_out):
        notes.append("No recording is held out: there is no row of recordings, and no floor.")
    if (language := info.settings.language) == "en":
        return held_out + read_general(corpus.tags), corpus
    notes.append(f"The general texts are English, the voice's language is {language}: left out.")
    return held_out, corpus


# ---------------------------------------------------------------- speakers


def recorded(lines: list[Line], settings) -> Iterator[Sound]:
    """The recordings of lines, trimmed as for training."""
    for line in lines:
        yield Sound(line, measure_clip(line.recording, settings)[0])


def decoded(lines: list[Line], settings, codec) -> Iterator[Sound]:
    """The recordings through the codec."""
    from orpheus.codec import decode_stream, encode

    for sound in recorded(lines, settings):
        codes = encode(codec, [sound.audio])[0]
        yield sound._replace(audio=np.concatenate([*decode_stream(codec, codes, seed=0)]))


def read_wavs(lines: list[Line], folder: Path) -> Iterator[Sound]:
    """The sounds that another program made of the lines of texts.txt, 001.wav for the first."""
    for n, line in enumerate(lines, 1):
        if (path := folder / f"{n:03}.wav").is_file():
            yield Sound(line, read_audio(path)[0])


def fingerprint(info, voice: str | None) -> str:
    """A digest of all that decides how a model speaks a text: weights, voice, settings, codec."""
    folders = [info.folder, *([find_base(info.folder)] if is_adapter(info.folder) else [])]
    files = [path for folder in folders for path in sorted(folder.resolve().iterdir())]
    files = [path for path in files if path.match("*.safetensors") or path.match("*config.json")]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    names = (*SPEAKING, "codec", "weights", "bf16", "fp16")
    settings = [getattr(info.settings, name) for name in names]
    return hashlib.sha256(repr((stats, voice, settings)).encode()).hexdigest()[:12]


def spoken(
    info, voice: str | None, lines: list[Line], seeds: int, codec, folder: Path
) -> Iterator[Sound]:
    """Lines of different texts as a model speaks them, with each seed.

    What `folder` holds is not spoken again.

    The model is loaded once the first sound is missing. ended.json lists the wavs that are whole,
    and whether the model ended them by itself.
    """
    from orpheus.generation import save_speech, synthesize
    from orpheus.run_info import load_run
    from orpheus.scoring import BY_ITSELF

    name = re.sub(r"[^A-Za-z0-9._-]", "_", info.folder.resolve().name)
    folder = folder / f"{name}-{fingerprint(info, voice)}"
    ended = read_json(folder / "ended.json") if (folder / "ended.json").is_file() else {}
    model = None
    names = {line.text: hashlib.sha256(line.text.encode()).hexdigest()[:12] for line in lines}
    for seed in range(info.settings.seed, info.settings.seed + seeds):
        paths = {text: folder / f"{seed}-{name}.wav" for text, name in names.items()}
        missing = [t for t, path in paths.items() if path.name not in ended or not path.is_file()]
        if missing:
            model = model or load_run(info)
            settings = info.settings.replace(seed=seed)
            speech = synthesize(missing, *model, codec, settings, voice, info.pace)
        for line in lines:
            path = paths[line.text]
            if line.text in missing:
                rows = save_speech(speech, path, keep=False, quiet=True)[1]
                ended[path.name] = all(row.end == BY_ITSELF for row in rows)
                write_text(folder / "ended.json", json.dumps(ended, indent=1))
            yield Sound(line, read_audio(path)[0], seed, ended[path.name])


def list_recorded(lines, corpus: Corpus, settings, codec) -> list[Speaker]:
    """Speakers without a model: the recordings, the same through the codec, and another voice."""
    recordings = [line for line in lines if line.recording]
    if not recordings:
        return []
    count = len(recordings)
    speakers = [
        Speaker("recordings", count, recorded(recordings, settings)),
        Speaker(CODEC, count, decoded(recordings, settings, codec)),
    ]
    if corpus.others:
        name, others = next(iter(corpus.others.items()))
        others = [line._replace(kind=recordings[0].kind) for line in spread(others, count)]
        speakers.append(Speaker(f"another voice: {name}", len(others), recorded(others, settings)))
    return speakers


def list_models(info, voice, lines, codec, arguments, out: Path, notes: list[str]) -> list[Speaker]:
    """Speakers of the lines: the base, the models of --model, and the folders of --wavs."""
    from orpheus.run_info import choose_voice, load_run_info

    models = [("fine-tune" if info.home else str(info.folder), info, voice)]
    if info.home:
        try:
            base = fetch(info.settings.model, MODEL_FILES)
            models.insert(0, ("base", dataclasses.replace(info, folder=base), voice))
        except UserError as error:
            notes.append(f"There is no row of the base: {error}.")
    for model in (arguments.model or ())[1:]:
        other = load_run_info(model, overrides(arguments), config=arguments.config)
        other.settings = other.settings.replace(best_of=1)
        models.append((model, other, choose_voice(arguments.voice or voice, other)))
    speakers = []
    for name, model, model_voice in models:
        sounds = spoken(model, model_voice, lines, arguments.seeds, codec, out / "spoken")
        speakers.append(Speaker(name, len(lines) * arguments.seeds, sounds))
    for folder in arguments.wavs or ():
        count = sum((Path(folder) / f"{n + 1:03}.wav").is_file() for n in range(len(lines)))
        if not count:
            raise UserError(f"{folder}: no 001.wav …, one for each line of {out / 'texts.txt'}")
        speakers.append(Speaker(folder, count, read_wavs(lines, Path(folder))))
    return speakers
