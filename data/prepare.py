"""Clips and their texts → checked rows of ids for the trainer, and a doctor's report on them.

    python data/prepare.py my_voice                      # the report on a folder; no training
    python data/prepare.py owner/name --limit 100        # on a hub dataset
    python data/prepare.py --config data/demo/config.json

Takes the same --config and keys as finetune.py, and leaves the encoded clips in `cache_dir`, so
that data can be made ready before a GPU is rented. The accepted forms are in data/README.md.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import infer
from infer import FRAME_SAMPLES, SAMPLE_RATE, SLOTS, Mistake, Settings

# ---------------------------------------------------------------- clips

AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_path")
TEXT_COLUMNS = ("text", "sentence", "transcription", "normalized_text")
VOICE_COLUMNS = ("speaker", "source", "voice")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class Clip(NamedTuple):
    """One clip as its dataset tells of it; nothing is decoded or checked yet."""

    where: str  # file and row, for people
    audio: Path | bytes | None = None
    text: str | None = None
    voice: str | None = None
    made: dict | None = None  # codes, or input_ids and labels, tokenised elsewhere
    fault: str | None = None  # what is wrong with the row itself


def read_clips(settings: Settings) -> Iterable[Clip]:
    """The first `limit` clips of any accepted form. Faults of the whole are told here."""
    path = Path(settings.dataset)
    if path.is_dir():
        clips = read_folder(path, settings)
    elif path.is_file():
        clips = read_manifest(path, settings)
    elif settings.dataset.startswith((".", "/", "~")) or settings.dataset.count("/") > 1:
        raise Mistake(f"{path}: no such folder of clips; set --dataset to one (data/README.md)")
    else:
        clips = read_hub(settings)
    return itertools.islice(clips, settings.limit)


def read_folder(folder: Path, settings: Settings) -> Iterable[Clip]:
    """AudioFolder, LJSpeech, parquet files, or sound files with a .txt beside each."""
    for name in TABLES:
        if (folder / name).is_file():
            return read_manifest(folder / name, settings)
    if parquets := sorted(map(str, folder.rglob("*.parquet"))):
        return read_parquet(parquets, folder, settings)
    sounds = [p for p in folder.iterdir() if p.suffix.lower() in SOUNDS]
    if not any(sound.with_suffix(".txt").is_file() for sound in sounds):
        forms = f"{', '.join(TABLES)}, no .parquet, and no sound file with a .txt beside it"
        raise Mistake(f"{folder}: no {forms} (data/README.md has the forms)")
    sounds.sort(key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.stem)])
    return (Clip(str(p), p, read_beside(p.with_suffix(".txt"))) for p in sounds)


def read_beside(path: Path) -> str | None:
    return infer.read_text(path) if path.is_file() else None


def read_manifest(path: Path, settings: Settings) -> Iterable[Clip]:
    """Clips of a csv, jsonl or parquet table, paths relative to it; also LJSpeech's `id|text|…`."""
    if path.suffix == ".parquet":
        return read_parquet([str(path)], path.parent, settings)
    text = infer.read_text(path)
    if path.suffix == ".jsonl":
        rows = list(json_rows(path, text))
    elif "|" in text.split("\n", 1)[0]:
        parts = [line.strip("\r").split("|") for line in text.split("\n")]
        rows = [(n, {"file_name": p[0], "text": p[-1]}) for n, p in enumerate(parts, 1) if p[0]]
    else:
        rows = list(csv_rows(path, text))
    if not rows:
        raise Mistake(f"{path}: no rows in it")
    columns = {name for _, row in rows for name in row if name is not None}
    to_clip = clip_maker(columns, path.parent, settings, str(path))
    return (to_clip(n, row) for n, row in rows)


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """(line on which the row begins, row)."""
    table, begin = csv.DictReader(io.StringIO(text, newline="")), 1
    try:
        for row in table:
            yield begin + 1, row
            begin = table.line_num
    except csv.Error as error:
        raise Mistake(f"{path} line {begin + 1}: not a csv table: {error}") from None


def json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Mistake(f"{path} row {n}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise Mistake(f"{path} row {n}: must be one JSON object")
        yield n, row


def read_parquet(files: list[str], home: Path, settings: Settings) -> Iterator[Clip]:
    from datasets import Dataset

    try:
        table = Dataset.from_parquet(files)
    except (OSError, ValueError) as error:
        raise Mistake(f"{home}: parquet that does not load: {str(error).splitlines()[0]}") from None
    return read_dataset(table, home, settings, files[0] if len(files) == 1 else str(home))


def read_hub(settings: Settings) -> Iterator[Clip]:
    """A hub dataset; with `limit` it is streamed, so that no more is downloaded than is used."""
    from datasets import load_dataset

    where = settings.dataset
    try:
        table = load_dataset(
            where,
            settings.dataset_config,
            split=settings.dataset_split,
            revision=settings.dataset_revision,
            streaming=settings.limit is not None,
        )
    except (ValueError, OSError) as error:  # DatasetNotFoundError is an OSError
        reason = str(error).splitlines()[0]
        raise Mistake(f"{where}: no such folder here, and the hub's gives: {reason}") from None
    return read_dataset(table, None, settings, where)


def read_dataset(table, home: Path | None, settings: Settings, where: str) -> Iterator[Clip]:
    """Clips of a datasets.Dataset or IterableDataset, its audio left undecoded."""
    from datasets import Audio

    to_clip = clip_maker(table.column_names, home, settings, where)
    for name, feature in table.features.items():
        if isinstance(feature, Audio):
            table = table.cast_column(name, Audio(decode=False))
    return (to_clip(n, row) for n, row in enumerate(table))


def clip_maker(columns, home: Path | None, settings: Settings, where: str) -> Callable:
    """A function of (row number, row) → Clip, once it is settled which column holds what."""
    made = next((name for name in ("input_ids", "codes") if name in columns), None)
    audio = text = None
    if made != "input_ids":
        text = find_column(columns, settings.text_column, TEXT_COLUMNS, where)
    if made is None:
        audio = find_column(columns, settings.audio_column, AUDIO_COLUMNS, where)
    voice = settings.voice_column
    if voice or any(name in columns for name in VOICE_COLUMNS):
        voice = find_column(columns, voice, VOICE_COLUMNS, where)

    def to_clip(n: int, row: dict) -> Clip:
        sound, words, name, fault = row.get(audio), row.get(text), row.get(voice), None
        if None in row:
            fault = "more columns than the header has: a text with commas wants quotes"
        if isinstance(sound, dict):
            sound = sound.get("bytes") or sound.get("path")
        if isinstance(sound, str) and sound:
            sound, lost = find_sound(sound, home, settings.absolute_paths)
            fault = fault or lost
        if not isinstance(words, str | int | float | None):
            fault = f"{text} holds {type(words).__name__}, not text"
        elif words is not None and str(words).encode(errors="replace").decode() != str(words):
            fault = f"{text} holds half of a character (a lone surrogate)"
        told = {key: row[key] for key in ("input_ids", "labels", "codes") if key in row}
        if made and row.get(made) is None:
            told, fault = None, fault or f"no {made} in this row"
        return Clip(
            where=f"{where} row {n}",
            audio=sound if isinstance(sound, Path | bytes) else None,
            text=None if words is None else str(words),
            voice=None if name is None else str(name),
            made=told if made else None,
            fault=fault,
        )

    return to_clip


def find_column(columns, wanted: str | None, names: tuple[str, ...], where: str) -> str:
    """The column that a key names, or the first of the conventional names that is there."""
    for name in (wanted,) if wanted else names:
        if name in columns:
            return name
    there = ", ".join(sorted(map(str, columns)))
    raise Mistake(f"{where}: no column {wanted or ' or '.join(names)}; there are: {there}")


def find_sound(name: str, home: Path | None, anywhere: bool) -> tuple[Path, str | None]:
    """(the file that a row names, its fault). LJSpeech's ids are looked for in wavs/."""
    path = Path(name.replace("\\", "/"))
    if home is None or (path.is_absolute() and anywhere):
        return path, None
    inside = os.path.normpath(home / path).startswith(os.path.join(os.path.normpath(home), ""))
    if not inside and not anywhere:
        return path, f"{path} is outside the dataset's folder; --absolute_paths allows it"
    if not path.suffix:
        found = (Path("wavs", name + suffix) for suffix in SOUNDS)
        path = next((p for p in found if (home / p).is_file()), path)
    if not os.path.isfile(home / path):  # macOS writes é as two characters, others as one
        forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
        path = next((p for p in forms if os.path.isfile(home / p)), path)
    return home / path, None


# ---------------------------------------------------------------- one clip


class Measures(NamedTuple):
    """What the doctor looks at, one clip each."""

    where: str
    voice: str
    text: str
    digest: str = ""  # SHA-256 of the sound
    rate: int = SAMPLE_RATE  # Hz, before resampling
    channels: int = 1
    seconds: float = 0.0  # after trimming
    silence: float = 0.0  # seconds cut off at both ends
    level: float = -20.0  # dB, RMS of full scale
    clipped: float = 0.0  # share of samples at full scale
    offset: float = 0.0  # mean of the samples
    tokens: int = 0  # in its row


def edges(audio: np.ndarray, threshold: float) -> tuple[int, int]:
    """(first, last) sample of speech: 10 ms steps within `threshold` dB of the loudest one."""
    step = SAMPLE_RATE // 100
    steps = np.pad(audio, (0, -len(audio) % step)).reshape(-1, step)
    power = (steps.astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-threshold / 10))
    return (0, len(audio)) if not len(loud) else (loud[0] * step, (loud[-1] + 1) * step)


def trim(audio: np.ndarray, settings: Settings) -> np.ndarray:
    """The clip with at most `keep_silence` seconds of silence at either end; null keeps all."""
    if settings.keep_silence is None:
        return audio
    first, last = edges(audio, settings.silence_db)
    keep = int(settings.keep_silence * SAMPLE_RATE)
    return audio[max(first - keep, 0) : last + keep]


def read_clip(clip: Clip, settings: Settings) -> tuple[np.ndarray, Measures]:
    """(trimmed samples, measures); `Mistake` for a clip that cannot be used."""
    text = " ".join((clip.text or "").split())
    if clip.fault or not text or not clip.audio:
        raise Mistake(clip.fault or ("the text is empty" if not text else "no sound is named"))
    whole, rate, channels = infer.read_audio(clip.audio)
    audio = trim(whole, settings)
    rms = float(np.sqrt((audio.astype(np.float64) ** 2).mean()))
    if rms < 1e-5:
        raise Mistake(f"{clip.audio}: silent throughout")
    return audio, Measures(
        where=clip.where,
        voice=clip.voice or settings.voice or "",
        text=text,
        rate=rate,
        channels=channels,
        seconds=len(audio) / SAMPLE_RATE,
        silence=(len(whole) - len(audio)) / SAMPLE_RATE,
        level=20 * np.log10(rms),
        clipped=float((np.abs(whole) >= 0.999).mean()),
        offset=float(whole.mean()),
    )


# ---------------------------------------------------------------- codes, and their cache


def codec_digest(codec) -> str:
    """Tells one codec from another by its weights."""
    whole = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        whole.update(name.encode() + tensor.cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


def encode_clips(heard: list, codec, home: Path | None, threads) -> tuple[list, int]:
    """(codes of each (samples, measures), how many of them came from the cache).

    The cache is a small file a clip, named by its sound and renamed into place: runs side by side
    do not hurt each other, and one that was killed goes on where it was.
    """
    paths = [home / m.digest[:2] / f"{m.digest}.npy" if home else None for _, m in heard]
    codes = [np.load(path) if path and path.is_file() else None for path in paths]
    todo = [n for n, known in enumerate(codes) if known is None]
    sounds = [heard[n][0] for n in todo]
    if next(codec.parameters()).device.type == "cuda":
        made = encode_in_batches(codec, sounds)
    else:  # a batch gains nothing on a CPU, threads do
        made = threads.map(lambda sound: infer.encode(codec, [sound])[0], sounds)
    for n, new in zip(todo, made, strict=True):
        codes[n] = new
        if paths[n]:
            save_codes(paths[n], new)
    return codes, len(heard) - len(todo)


def encode_in_batches(codec, sounds: list[np.ndarray], size: int = 16) -> list[np.ndarray]:
    """Codes of each, encoded in batches of like length."""
    order = sorted(range(len(sounds)), key=lambda n: len(sounds[n]))
    codes = {}
    for batch in (order[n : n + size] for n in range(0, len(order), size)):
        codes |= zip(batch, infer.encode(codec, [sounds[n] for n in batch]), strict=True)
    return [codes[n] for n in range(len(sounds))]


def save_codes(path: Path, codes: np.ndarray) -> None:
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.save(file, codes.astype(np.int16))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Mistake(f"{path}: cannot be written: {error.strerror}; set --cache_dir") from None


# ---------------------------------------------------------------- rows


def make_row(prompt: list[int], codes: np.ndarray, ids, settings: Settings) -> dict:
    """input_ids: prompt, audio, EOS, EOA; labels: the same, −100 where there is no loss.

    `too_long` "truncate" cuts at a frame's edge and leaves the ends off: none learns to stop early.
    """
    ends = [ids.eos, ids.eoa]
    room = (settings.max_length - len(prompt) - len(ends)) // SLOTS  # frames
    if len(codes) > room and settings.too_long == "truncate":
        codes, ends = codes[: max(settings.max_length - len(prompt), 0) // SLOTS], []
    input_ids = np.concatenate([prompt, infer.codes_to_ids(codes, ids), ends]).astype(np.int64)
    labels = input_ids.copy()
    if settings.train_on == "audio":
        labels[: len(prompt)] = -100
    return {"input_ids": input_ids, "labels": labels}


def read_codes(codes, size: int) -> np.ndarray:
    """(frames, 7) codes in slot order from three SNAC levels of 1:2:4, or from a list in order."""
    try:
        if len(codes) == 3 and [len(level) for level in codes] == [
            len(codes[0]) * n for n in (1, 2, 4)
        ]:
            side = [np.asarray(level).reshape(len(codes[0]), -1) for level in codes]
            codes = np.concatenate(side, axis=1)[:, infer.LEVELS_TO_SLOTS]
        codes = np.asarray(codes, dtype=np.int64).reshape(-1, SLOTS)
    except (TypeError, ValueError, OverflowError):
        raise Mistake(f"codes are neither frames of {SLOTS} nor levels of 1:2:4") from None
    wrong = np.argwhere((codes < 0) | (codes >= size))
    if len(wrong) or not len(codes):
        told = f"code {codes[tuple(wrong[0])]} in frame {wrong[0][0]}" if len(wrong) else "no frame"
        raise Mistake(f"{told}: codes go from 0 to {size - 1}")
    return codes


def made_row(clip: Clip, tokenizer, ids, settings: Settings) -> tuple[dict, np.ndarray]:
    """(row, codes) of a clip that was tokenised elsewhere, checked slot by slot."""
    if "codes" in clip.made:
        codes = read_codes(clip.made["codes"], ids.codebook_size)
        prompt = infer.prompt_ids(tokenizer, ids, clip.text or "", clip.voice or settings.voice)
        return make_row(prompt, codes, ids, settings), codes
    try:
        row = np.asarray(clip.made["input_ids"], dtype=np.int64).reshape(-1)
        labels = clip.made.get("labels")
        labels = None if labels is None else np.asarray(labels, dtype=np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise Mistake("input_ids or labels are no list of numbers") from None
    for name, wanted in (("SOS", ids.sos), ("EOS", ids.eos)):
        if wanted not in row:
            raise Mistake(f"no {name} (id {wanted}) among its input_ids")
    begin, end = (int(np.flatnonzero(row == wanted)[0]) for wanted in (ids.sos, ids.eos))
    codes = infer.ids_to_codes(row[begin + 1 : end], ids)
    if labels is None:
        labels = np.where(np.arange(len(row)) <= begin, -100, row)
    if len(labels) != len(row):
        raise Mistake(f"{len(labels)} labels for {len(row)} input_ids")
    return {"input_ids": row, "labels": labels}, codes


def frames_of(seconds: float) -> int:
    return -(-round(seconds * SAMPLE_RATE) // FRAME_SAMPLES)


def hear(clip: Clip, settings: Settings) -> tuple | Mistake | None:
    """read_clip's samples and measures; its Mistake; None for a clip that was tokenised already.

    No more is encoded than a row can hold, and the four frames behind that the codec looks at.
    """
    try:
        if clip.made:
            return None
        audio, measures = read_clip(clip, settings)
    except Mistake as mistake:
        return mistake
    audio = audio[: (settings.max_length // SLOTS + 4) * FRAME_SAMPLES]
    return audio, measures._replace(digest=hashlib.sha256(audio.tobytes()).hexdigest())


def make_rows(clips: Iterable[Clip], settings: Settings, tokenizer, codec) -> tuple[list, "Report"]:
    """Rows (input_ids, labels, text) and the report. A faulty clip is left out and named.

    Clips go by in windows of 64, read by threads ahead of the codec: memory holds one window.
    """
    import torch
    from tqdm import tqdm

    ids = infer.read_speech_ids(tokenizer, codec.codebook_size)
    home = Path(settings.cache_dir, codec_digest(codec)) if settings.cache_dir else None
    report, rows, clips = Report(settings.dataset), [], iter(clips)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the clips go to threads instead
    with ThreadPoolExecutor(before) as threads, tqdm(unit=" clips", disable=None) as bar:
        while window := list(itertools.islice(clips, 64)):
            heard = list(threads.map(lambda clip: hear(clip, settings), window))
            sounds = [one for one in heard if isinstance(one, tuple)]
            codes, cached = encode_clips(sounds, codec, home, threads)
            report.cached += cached
            for clip, one in zip(window, heard, strict=True):
                known = codes.pop(0) if isinstance(one, tuple) else None
                add_row(rows, report, clip, one, known, tokenizer, ids, settings)
            bar.update(len(window))
            bar.set_postfix_str(f"{report.seconds / 3600:.2f} hours")
    torch.set_num_threads(before)
    return finish_rows(rows, report, settings), report


def add_row(rows, report: "Report", clip: Clip, heard, codes, tokenizer, ids, settings) -> None:
    """One clip's row, or the reason why there is none, into rows and report."""
    report.clips += 1
    try:
        if isinstance(heard, Mistake):
            raise heard
        if heard is None:
            row, codes = made_row(clip, tokenizer, ids, settings)
            text = clip.text or tokenizer.decode(row["input_ids"][row["labels"] == -100])
            digest = hashlib.sha256(codes.tobytes()).hexdigest()
            measures = Measures(clip.where, clip.voice or settings.voice or "", text, digest)
            measures = measures._replace(seconds=len(codes) * FRAME_SAMPLES / SAMPLE_RATE)
        else:
            measures = heard[1]
            prompt = infer.prompt_ids(tokenizer, ids, measures.text, measures.voice)
            row = make_row(prompt, codes, ids, settings)
    except Mistake as mistake:
        report.left_out.append(f"{clip.where}: {mistake}")
        return
    length, speech = len(row["input_ids"]), SLOTS * frames_of(measures.seconds)
    cut = ids.eos not in row["input_ids"] or length > settings.max_length
    report.lengths.append(max(length, speech + 8) if cut else length)
    if cut:
        kept = length <= settings.max_length and (row["labels"] != -100).any()
        fault = f"{clip.where}: {measures.seconds:.1f} s, {speech} audio tokens"
        (report.truncated if kept else report.dropped).append(fault)
        if not kept:
            return
    report.measures.append(measures._replace(tokens=length))
    rows.append(row | {"text": measures.text})


def finish_rows(rows: list[dict], report: "Report", settings: Settings) -> list[dict]:
    """The rows without those that `leave_out` names; the doctor's findings into the report."""
    if rows:
        found = examine(report.measures)
        out = np.zeros(len(rows), bool)
        for name in settings.leave_out:
            if name not in FINDINGS:
                raise infer.unknown_key(name, FINDINGS, "leave_out")
            out |= found[name]
        report.findings = {
            name: [report.measures[n].where for n in np.flatnonzero(which)]
            for name, which in found.items()
            if which.any()
        }
        for n in np.flatnonzero(out):
            names = ", ".join(name for name in settings.leave_out if found[name][n])
            report.left_out.append(f"{report.measures[n].where}: {names}")
        rows = [row for row, gone in zip(rows, out, strict=True) if not gone]
        report.measures = [m for m, gone in zip(report.measures, out, strict=True) if not gone]
    if not rows:
        first = (report.left_out + report.dropped + ["no clips"])[0]
        none = f"{settings.dataset}: no rows left of {report.clips} clips"
        raise Mistake(f"{none}; the first: {first}")
    ids = b"".join(row["input_ids"].tobytes() + row["labels"].tobytes() for row in rows)
    report.digest = hashlib.sha256(ids).hexdigest()
    return rows


# ---------------------------------------------------------------- the doctor

# name: (what it means, what to do). `leave_out` names those whose clips are not trained on.
FINDINGS = {
    "short": ("under 0.5 s", "join it with a neighbour"),
    "long": ("over 20 s: such clips teach a model not to stop", "cut it at a sentence"),
    "silence": ("over 0.5 s of silence at its ends", "none: cut to keep_silence"),
    "clipped": ("clipped: over 0.1 % of samples at full scale", "record it at a lower level"),
    "quiet": ("under -40 dB", "normalise it, or record it louder"),
    "offset": ("a DC offset over 0.01", "high-pass it at 20 Hz"),
    "narrow": ("sampled under 24 kHz: the voice will sound as dull", "find a better source"),
    "stereo": ("more than one channel", "none: mixed to mono"),
    "same_sound": ("the same sound as an earlier clip", "leave one of them out"),
    "same_text": ("the same text as an earlier clip of the voice", "none, if it is another take"),
    "digits": ("digits in the text", "write them as they are spoken"),
    "unspeakable": ("a link, a mail address or symbols in the text", "write what is spoken"),
    "pace": ("seconds per character far from the voice's own", "compare the text with the sound"),
    "loudness": ("over 10 dB from the voice's usual level", "normalise the clips"),
}


def outliers(values: np.ndarray, groups: np.ndarray, far: float = 5) -> np.ndarray:
    """Whose robust z-score within its group is over `far`: |x − median| / (1.4826 × MAD).

    Iglewicz and Hoaglin (1993) take 3.5; texts of few characters spread wider.
    """
    out = np.zeros(len(values), bool)
    for group in set(groups):
        mine = groups == group
        away = np.abs(values[mine] - np.median(values[mine]))
        if mine.sum() >= 8:
            out[mine] = away > far * max(1.4826 * np.median(away), 1e-3)
    return out


def repeats(keys: Iterable) -> np.ndarray:
    """Which keys were there before."""
    seen = set()
    return np.array([key in seen or bool(seen.add(key)) for key in keys])


def examine(measures: list[Measures]) -> dict[str, np.ndarray]:
    """Which clips each finding is about: (clips,) booleans by name of the finding."""
    m = {name: np.array([getattr(one, name) for one in measures]) for name in Measures._fields}
    voices, texts = m["voice"], m["text"]
    usual = {v: np.median(m["level"][voices == v]) for v in set(voices)}
    lengths = np.array([len(text) for text in texts])
    strange = re.compile(r"https?://|www\.|@|[#*_{}\[\]\\|^~=+]")
    found = {
        "short": m["seconds"] < 0.5,
        "long": m["seconds"] > 20,
        "silence": m["silence"] > 0.5,
        "clipped": m["clipped"] > 0.001,
        "quiet": m["level"] < -40,
        "offset": np.abs(m["offset"]) > 0.01,
        "narrow": m["rate"] < SAMPLE_RATE,
        "stereo": m["channels"] > 1,
        "same_sound": repeats(m["digest"]),
        "same_text": repeats(zip(voices, texts, strict=True)),
        "digits": np.array([bool(re.search(r"\d", text)) for text in texts]),
        "unspeakable": np.array([bool(strange.search(text)) for text in texts]),
        "pace": outliers(np.log(m["seconds"] / lengths), voices),
        "loudness": np.abs(m["level"] - np.array([usual[v] for v in voices])) > 10,
    }
    assert found.keys() == FINDINGS.keys()
    return found


# ---------------------------------------------------------------- the report


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

    @property
    def seconds(self) -> float:
        return sum(m.seconds for m in self.measures)

    @property
    def characters(self) -> int:
        return sum(len(m.text) for m in self.measures)

    @property
    def voices(self) -> dict[str, int]:
        return dict(Counter(m.voice for m in self.measures if m.voice).most_common())

    def tell(self, settings: Settings, full: bool = False) -> None:
        """In short; in full, with the worst few of every finding and the remedy."""
        voices = ", ".join(f"{name} {n}" for name, n in self.voices.items()) or "none named"
        rows, tokens = len(self.measures), sum(m.tokens for m in self.measures)
        made = f"{rows} of {self.clips} clips, {self.seconds / 3600:.3f} hours"
        print(f"data    {self.dataset}: {made}; voices: {voices}; {self.cached} from the cache")
        longest, keep = max(self.lengths), int(np.quantile(self.lengths, 0.99, method="higher"))
        told = f"the longest {longest:,} of max_length {settings.max_length:,}"
        print(f"rows    {tokens:,} tokens, {told}; max_length {keep:,} keeps 99 %")
        for title in ("dropped", "truncated", "left_out"):
            self.tell_some(title, getattr(self, title), "", 5)
        for name, (what, remedy) in FINDINGS.items():
            clips = self.findings.get(name, [])
            done = "left out" if name in settings.leave_out else "trained on"
            self.tell_some(f"{name}: {what}", clips, f"{done}; {remedy}", 3 if full else 0)

    def tell_some(self, title: str, clips: list[str], remedy: str, most: int) -> None:
        if not clips:
            return
        print(f"        {title}: {len(clips)}" + (f" ({remedy})" if remedy else ""))
        for clip in clips[:most]:
            print(f"          {clip}")
        if most and len(clips) > most:
            print(f"          … and {len(clips) - most} more, in {infer.SAVED_REPORT}")

    def save(self, folder: Path) -> None:
        """data_report.json: everything but the clips' own measures."""
        told = {k: v for k, v in vars(self).items() if k not in ("measures", "lengths")}
        told |= {"rows": len(self.measures), "voices": self.voices}
        told |= {"seconds": self.seconds, "characters": self.characters}  # the voice's pace
        told |= {"hours": self.seconds / 3600, "tokens": sum(m.tokens for m in self.measures)}
        text = json.dumps(told, indent=2, ensure_ascii=False)
        infer.write_text(folder / infer.SAVED_REPORT, text + "\n")


def draw_report(report: Report, path: Path) -> None:
    """A picture: how long the clips are, and seconds against characters by voice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.hist([m.seconds for m in report.measures], bins=40)
    left.set(xlabel="seconds", ylabel="clips", title=f"{report.dataset}: length of clips")
    for voice in report.voices or [""]:
        mine = [m for m in report.measures if m.voice == voice]
        points = [len(m.text) for m in mine], [m.seconds for m in mine]
        right.scatter(*points, s=8, alpha=0.5, label=voice)
    right.set(xlabel="characters", ylabel="seconds", title="pace: clips off the line are suspect")
    if report.voices:
        right.legend()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=100)
    os.replace(part, path)
    pyplot.close(figure)


# ---------------------------------------------------------------- command line


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--dataset")
    settings = infer.read_command_line(__doc__)
    clips = read_clips(settings)
    tokenizer = infer.load_tokenizer(infer.fetch(settings.model, infer.TOKENIZER_FILES))
    codec = infer.load_codec(settings.codec, infer.device())
    _, report = make_rows(clips, settings, tokenizer, codec)
    report.tell(settings, full=True)
    out = Path(settings.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    report.save(out)
    draw_report(report, out / "data_report.png")
    print(f"report  {out / infer.SAVED_REPORT} and data_report.png beside it")


if __name__ == "__main__":
    infer.run(main)
