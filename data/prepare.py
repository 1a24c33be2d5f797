"""Clips and their texts → checked rows of ids for the trainer, and a doctor's report on them.

    python data/prepare.py my_voice                      # the report on a folder; no training
    python data/prepare.py owner/name --limit 100        # on a hub dataset
    python data/prepare.py --config data/demo/config.json

Takes the same --config and keys as finetune.py, and leaves the encoded clips in `cache_dir`, so
that data can be made ready before a GPU is rented. The accepted forms are in data/README.md.
"""

import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from bisect import bisect_left, insort
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
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class Clip(NamedTuple):
    """One clip as its dataset tells of it; nothing is decoded or checked yet."""

    where: str  # file and row, for people
    audio: Path | bytes | None = None
    text: str | None = None
    voice: str | None = None
    made: dict | None = None  # codes, or input_ids and labels, tokenised elsewhere
    fault: str | None = None  # what is wrong with the row itself


class Clips(NamedTuple):
    """The clips of a dataset, to be gone through once."""

    each: Iterable[Clip]
    count: int | None  # None for a stream, whose end nobody knows
    note: str | None = None  # how the table was read, where that was not obvious


def read_clips(settings: Settings) -> Clips:
    """The first `limit` clips of any accepted form. Faults of the whole are told here."""
    path = Path(settings.dataset)
    for name in ("dataset_config", "dataset_revision"):
        if getattr(settings, name) and path.exists():
            raise Mistake(f"{name} is of a hub dataset, and {path} is a local one; set it to null")
    if os.path.isdir(path):
        clips, count, note = read_folder(path, settings)
    elif os.path.isfile(path):
        clips, count, note = read_manifest(path, settings)
    elif settings.dataset.startswith((".", "/", "~")) or settings.dataset.count("/") > 1:
        raise Mistake(f"{path}: no such folder of clips; set --dataset to one (data/README.md)")
    else:
        clips, count, note = read_hub(settings)
    if settings.limit is not None:
        clips = itertools.islice(clips, settings.limit)
        count = min(count or settings.limit, settings.limit)
    return Clips(clips, count, note)


def read_folder(folder: Path, settings: Settings) -> Clips:
    """AudioFolder, LJSpeech, parquet files, or sound files with a .txt beside each."""
    for name in TABLES:
        if (folder / name).is_file():
            return read_manifest(folder / name, settings)
    if parquets := sorted(str(p) for p in folder.rglob("*.parquet") if p.is_file()):
        return read_parquet(parquets, folder, settings)
    sounds = [p for p in folder.iterdir() if p.suffix.lower() in SOUNDS and p.name[0] != "."]
    if not any(sound.with_suffix(".txt").is_file() for sound in sounds):
        forms = f"{', '.join(TABLES)}, no .parquet, and no sound file with a .txt beside it"
        raise Mistake(f"{folder}: no {forms} (data/README.md has the forms)")
    sounds.sort(key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.stem)])
    return Clips(map(read_pair, sounds), len(sounds))


def read_pair(sound: Path) -> Clip:
    """A sound and the .txt beside it."""
    path, where = sound.with_suffix(".txt"), printable(sound.name)
    try:
        if not path.is_file():
            raise Mistake(f"no {path.name} beside it")
        text = infer.read_text(path)
    except Mistake as mistake:
        return Clip(where, sound, fault=str(mistake))
    return Clip(where, sound, text, fault=find_text_fault(text))


def printable(name: str) -> str:
    """The name of a file, which may hold bytes that are no UTF-8, for print and JSON."""
    return name.encode(errors="replace").decode()


def read_manifest(path: Path, settings: Settings) -> Clips:
    """Clips of a csv, tsv, jsonl or parquet table, whose paths are relative to it."""
    if path.suffix.lower() in SOUNDS:
        raise Mistake(f"{path}: one sound; set --dataset to a folder or a table (data/README.md)")
    if path.suffix == ".parquet":
        return read_parquet([str(path)], path.parent, settings)
    text = infer.read_text(path)
    if path.suffix == ".jsonl":
        rows, note = list(json_rows(path, text)), None
    else:
        rows, settings, note = read_table(path, text, settings)
    if not rows:
        raise Mistake(f"{path}: no rows in it")
    columns = {name for _, row in rows for name in row if name is not None}
    to_clip = clip_maker(columns, path.parent, settings, path)
    return Clips(itertools.starmap(to_clip, rows), len(rows), note)


def column_key(name) -> str:
    """A column's name as it is compared: `File Name` is file_name."""
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def read_table(path: Path, text: str, settings: Settings) -> tuple[list, Settings, str | None]:
    """Rows of a table separated by commas, semicolons, tabs or bars, with a header or LJSpeech's.

    The separator is the one that splits the first line into the most columns with known names.
    Returns the rows as (line, row), the settings to read them with, and a note for the report.
    """
    if "\0" in text:
        raise Mistake(f"{path}: holds NUL bytes, as UTF-16 does; save it as UTF-8")
    header = text.lstrip("\n").split("\n", 1)[0]
    known = {*AUDIO_COLUMNS, *TEXT_COLUMNS, *VOICE_COLUMNS}
    known |= {"input_ids", "labels", "codes"}
    known |= {settings.audio_column, settings.text_column, settings.voice_column}

    def count_known(separator: str) -> tuple[int, int]:
        cells = [cell.strip('" ') for cell in header.split(separator)]
        return len(known & {*cells, *map(column_key, cells)}), len(cells)

    separator = max(",;\t|", key=count_known)
    least = 2 if "|" in header else 1  # the first line may be a row whose text has one such word
    if count_known(separator)[0] >= least:
        return list(csv_rows(path, text, separator)), settings, None
    if "|" in header:
        return read_ljspeech(path, text, settings)
    if not text.strip():
        return [], settings, None
    remedy = "add one such as file_name,text (data/README.md)"
    columns = ", ".join(cell.strip() for cell in header.split(separator))[:80]
    raise Mistake(f"{path}: the first line is no header with known columns ({columns}); {remedy}")


def read_ljspeech(path: Path, text: str, settings: Settings) -> tuple[list, Settings, str | None]:
    """Rows of LJSpeech's `id|text` or `id|text|normalised text`, which has no header.

    A third column is the normalised text if it resembles the second; it could also be a voice.
    """
    columns = ("file_name", "text", "normalized_text")
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    lines = [(n, [cell.strip() for cell in line.split("|")]) for n, line in lines]
    width = Counter(len(cells) for _, cells in lines).most_common(1)[0][0]
    remedy = "add a header line such as file_name|text|voice"
    if width > len(columns):
        raise Mistake(f"{path}: {width} columns and no header to name them; {remedy}")
    rows = []
    for n, cells in lines:
        row = dict(zip(columns, cells, strict=False))
        rows.append((n, row | ({None: cells[width:]} if len(cells) > width else {})))
    if width < len(columns) or not any(row.get("normalized_text") for _, row in rows):
        return rows, settings, None
    chosen = settings.text_column
    if chosen is None:
        if resemblance(cells[1:3] for _, cells in lines if len(cells) == width) < 0.5:
            fault = "the third column does not resemble the second, so it may be voices or texts"
            remedy += ", or set --text_column to text (the second) or normalized_text (the third)"
            raise Mistake(f"{path}: {fault}; {remedy}")
        chosen = "normalized_text"
    place = {"text": "second", "normalized_text": "third"}.get(chosen)
    note = f"{path.name} has no header; its {place} column holds the texts" if place else None
    return rows, dataclasses.replace(settings, text_column=chosen), note


def resemblance(pairs: Iterable[list[str]], most: int = 200) -> float:
    """The mean similarity of two texts, 0 to 1, over up to `most` of the pairs."""
    pairs = [[text.lower() for text in pair] for pair in pairs]
    pairs = pairs[:: -(-len(pairs) // most)]
    ratios = [difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs]
    return float(np.mean(ratios))


def csv_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, dict]]:
    """(line on which the row begins, row). Between bars, quotes are characters like others."""
    table = text.lstrip("\n")  # DictReader would take an empty line for the header
    skipped = len(text) - len(table)
    spaced = f"{separator} " in table.split("\n", 1)[0]
    table = csv.DictReader(
        io.StringIO(table, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL,
        skipinitialspace=spaced,
        strict=True,
    )
    begin = skipped + 1
    try:
        names = Counter(column_key(name) for name in table.fieldnames if name.strip())
        if twice := [name for name, count in names.items() if count > 1]:
            raise Mistake(f"{path}: two columns are named {twice[0]}; rename one of them")
        for row in table:
            yield begin + 1, row
            begin = skipped + table.line_num
    except csv.Error as error:
        remedy = 'quote a field as a whole, and double the quotes in it: "a ""b"" c"'
        raise Mistake(f"{path} line {begin + 1}: not a csv table: {error}; {remedy}") from None


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


def read_parquet(files: list[str], home: Path, settings: Settings) -> Clips:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import parquet

    try:
        columns = {file: set(parquet.read_schema(file).names) for file in files}
        same = all(names == columns[files[0]] for names in columns.values())
        rows = sum(parquet.read_metadata(file).num_rows for file in files)
        table = Dataset.from_parquet(files) if same and rows else None
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise Mistake(f"{home}: parquet that does not load: {reason}") from None
    for file, names in columns.items():
        if other := ", ".join(sorted(names ^ columns[files[0]])):
            fault = f"its columns differ from those of {Path(files[0]).name}"
            raise Mistake(f"{file}: {fault}: {other}; make them the same")
    if not rows:
        raise Mistake(f"{home}: no rows in it")
    return read_dataset(table, home, settings, Path(files[0]) if len(files) == 1 else home)


def read_hub(settings: Settings) -> Clips:
    """A hub dataset; with `limit` it is streamed, so that no more is downloaded than is used."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    name = settings.dataset
    try:
        table = load_dataset(
            name,
            settings.dataset_config,
            split=settings.dataset_split,
            revision=settings.dataset_revision,
            streaming=settings.limit is not None,
        )
    except (ValueError, OSError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise Mistake(f"{name}: no such folder here, and the hub's gives: {reason}") from None
    return read_dataset(table, None, settings, Path(name))


def read_dataset(table, home: Path | None, settings: Settings, where: Path) -> Clips:
    """Clips of a datasets.Dataset or IterableDataset, its audio left undecoded."""
    from datasets import Audio

    columns = table.column_names or next(iter(table), {})  # a streamed csv does not tell them
    to_clip = clip_maker(columns, home, settings, where)
    for name, feature in (table.features or {}).items():
        if isinstance(feature, Audio):
            table = table.cast_column(name, Audio(decode=False))
    return Clips(itertools.starmap(to_clip, enumerate(table)), getattr(table, "num_rows", None))


def clip_maker(columns, home: Path | None, settings: Settings, where: Path) -> Callable:
    """A function of (row number, row) → Clip, once it is settled which column holds what."""
    columns = list(columns)
    made = next((name for name in ("input_ids", "codes") if name in columns), None)
    audio = text = None
    if made != "input_ids":
        text = find_column(columns, settings.text_column, TEXT_COLUMNS, where)
    if made is None:
        audio = find_column(columns, settings.audio_column, AUDIO_COLUMNS, where)
    voice = settings.voice_column
    if voice or not {column_key(name) for name in columns}.isdisjoint(VOICE_COLUMNS):
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
        fault = fault or find_value_fault(words, text) or find_value_fault(name, voice)
        fault = fault or find_text_fault(str(words or ""))
        fault = fault or find_text_fault(str(name or ""), "voice", bare=True)
        told = {key: row[key] for key in ("input_ids", "labels", "codes") if key in row}
        if made and row.get(made) is None:
            told, fault = None, fault or f"no {made} in this row"
        return Clip(
            where=f"{printable(where.name)} row {n}",
            audio=sound if isinstance(sound, Path | bytes) else None,
            text=None if words is None else str(words),
            voice=None if name is None else str(name),
            made=told if made else None,
            fault=fault,
        )

    return to_clip


def find_value_fault(value, column: str) -> str | None:
    """Why a value of a text's or a voice's column is no text; a number is one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        return f"{column} holds {type(value).__name__}, not text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{column} holds {value}, not text"
    return None


def find_text_fault(text: str, what: str = "text", bare: bool = False) -> str | None:
    """Why a text cannot be trained on; None where it can. A `bare` one may hold no letter."""
    if printable(text) != text:
        return f"the {what} holds half of a character (a lone surrogate)"
    control = (c for c in text if unicodedata.category(c) == "Cc" and not c.isspace())
    if found := next(control, None):
        return f"the {what} holds a control character (U+{ord(found):04X})"
    if text.strip() and not bare and not any(map(str.isalnum, text)):
        return f"nothing to speak in the {what} {text.strip()[:20]!r}: no letter or digit"
    return None


def find_column(columns, wanted: str | None, names: tuple[str, ...], where: Path) -> str:
    """The column that a key names, or the first of the conventional names that is there."""
    keys = {column_key(name): name for name in columns}
    for name in (wanted,) if wanted else names:
        if name in columns:
            return name
        if column_key(name) in keys:
            return keys[column_key(name)]
    there = ", ".join(sorted(map(str, columns)))
    raise Mistake(f"{where}: no column {wanted or ' or '.join(names)}; there are: {there}")


def find_sound(name: str, home: Path | None, anywhere: bool) -> tuple[Path, str | None]:
    """(the file that a row names, its fault). An id stands for a sound here or in wavs/."""
    path = Path(name.replace("\\", "/"))
    if home is None or (path.is_absolute() and anywhere):
        return path, None
    inside = os.path.abspath(home / path).startswith(os.path.join(os.path.abspath(home), ""))
    if not inside and not anywhere:
        return path, f"{path} is outside the dataset's folder; --absolute_paths allows it"
    if not path.suffix:
        found = (Path(sub, f"{path}{suffix}") for sub in ("wavs", "") for suffix in SOUNDS)
        path = next((p for p in found if os.path.isfile(home / p)), path)
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
    digest: str = ""  # SHA-256 of the sound as it is encoded
    rate: int = SAMPLE_RATE  # Hz, before resampling
    channels: int = 1
    seconds: float = 0.0  # after trimming
    silence: float = 0.0  # seconds cut off at both ends
    level: float = -20.0  # dB, RMS of full scale
    clipped: float = 0.0  # share of samples at full scale
    offset: float = 0.0  # mean of the samples
    tokens: int = 0  # in its row

    def told(self) -> str:
        return f"{self.where}: {self.seconds:.1f} s, {self.level:.0f} dB, {self.text[:50]!r}"


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


def measure(source: Path | bytes, settings: Settings) -> tuple[np.ndarray, dict]:
    """(trimmed samples, what Measures says of them); `Mistake` for a sound of no use."""
    whole, rate, channels = infer.read_audio(source)
    audio = trim(whole, settings)
    rms = float(np.sqrt((audio.astype(np.float64) ** 2).mean()))
    if rms < 1e-4:  # -80 dB
        raise Mistake(f"{'its audio' if isinstance(source, bytes) else source}: silent throughout")
    return audio, {
        "digest": hashlib.sha256(audio.tobytes()).hexdigest(),
        "rate": rate,
        "channels": channels,
        "seconds": len(audio) / SAMPLE_RATE,
        "silence": (len(whole) - len(audio)) / SAMPLE_RATE,
        "level": 20 * np.log10(rms),
        "clipped": float((np.abs(whole) >= 0.999).mean()),
        "offset": float(whole.mean()),
    }


# ---------------------------------------------------------------- codes, and their cache


@dataclass
class Heard:
    """What is known of a clip's sound once it is read, and its codes as soon as they are made."""

    sound: dict  # fields of Measures
    codes: np.ndarray | None = None  # (frames, 7)
    audio: np.ndarray | None = None  # (samples,), as long as there are no codes
    row: dict | None = None  # input_ids and labels that were made elsewhere
    entry: Path | None = None  # its file in the cache
    cached: bool = False


def open_cache(settings: Settings) -> Path | None:
    """The folder for what this codec makes of sounds trimmed in this way.

    A file a clip, named by the bytes of its sound and renamed into place once it is whole: runs
    side by side do not hurt each other, and one that was killed goes on where it was.
    """
    if settings.cache_dir is None:
        return None
    make_folder(settings.cache_dir, "cache_dir")
    trimming = settings.keep_silence, settings.silence_db
    digest = hashlib.sha256(repr((trimming, Measures._fields)).encode())
    folder = infer.fetch(settings.codec, infer.CODEC_FILES)
    try:
        for name in infer.CODEC_FILES:
            digest.update((folder / name).read_bytes())
        home = Path(settings.cache_dir, digest.hexdigest()[:16])
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set --cache_dir, or --codec to a SNAC codec's folder"
        raise Mistake(f"{error.filename}: {error.strerror}; {remedy}") from None
    return home


def make_folder(path: str, name: str) -> None:
    """Makes a folder and tries to write into it; `Mistake` names the key that it comes from."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        remedy = f"set --{name} to a folder that can be written"
        raise Mistake(f"{path}: {error.strerror}; {remedy}") from None


def find_entry(audio: Path | bytes, home: Path | None) -> Path | None:
    """Where the cache keeps a sound; None without a cache, or for a file that cannot be read."""
    if home is None or not (isinstance(audio, bytes) or os.path.isfile(audio)):
        return None
    try:
        with io.BytesIO(audio) if isinstance(audio, bytes) else open(audio, "rb") as file:
            return home / f"{hashlib.file_digest(file, 'sha256').hexdigest()}.json"
    except OSError:  # infer.read_audio tells it
        return None


SOUND_TYPES = {name: type(value) for name, value in Measures._field_defaults.items()}
del SOUND_TYPES["tokens"]  # of the row, not of the sound


def read_entry(entry: Path, room: int, size: int) -> Heard | None:
    """What the cache has of a sound; None where that is of no use, and is made again.

    It has no file, or one that is torn or of another shape, or fewer frames than a row could take.
    """
    try:
        sound = json.loads(entry.read_bytes())
        codes = read_codes(sound.pop("codes"), size)
        if {name: type(value) for name, value in sound.items()} != SOUND_TYPES:
            return None
        frames = frames_of(sound["seconds"])
    except (OSError, ValueError, OverflowError, RecursionError):
        return None
    except (AttributeError, KeyError, TypeError):  # JSON, but no object with a list of codes
        return None
    finite = all(math.isfinite(v) for v in sound.values() if not isinstance(v, str))
    whole = min(frames, room) <= len(codes) <= frames
    return Heard(sound, codes, cached=True) if finite and whole else None


def hear(clip: Clip, settings: Settings, home: Path | None, ids) -> Heard | Mistake:
    """A clip with its codes from the cache or its own row; else with its samples.

    No more is encoded than a row can hold, and the four frames behind that the codec looks at.
    """
    room = settings.max_length // SLOTS  # frames
    try:
        if clip.fault:
            raise Mistake(clip.fault)
        if clip.made:
            return hear_made(clip.made, ids)
        if not clip.audio or not (clip.text or "").strip():
            raise Mistake("no sound is named" if (clip.text or "").strip() else "the text is empty")
        entry = find_entry(clip.audio, home)
        if entry and (known := read_entry(entry, room, ids.codebook_size)):
            return known
        audio, sound = measure(clip.audio, settings)
    except Mistake as mistake:
        return mistake
    return Heard(sound, audio=audio[: (room + 4) * FRAME_SAMPLES], entry=entry)


def windows(clips: Iterable[Clip], work: Callable, threads, size: int = 64) -> Iterator:
    """(clips, what `work` made of each), `size` at a time; threads are at the next ones already."""
    clips = iter(clips)
    parts = iter(lambda: list(itertools.islice(clips, size)), [])
    begun = ((part, threads.map(work, part)) for part in parts)
    for (part, made), _ in itertools.pairwise(itertools.chain(begun, [None])):
        yield part, list(made)


def hear_all(
    clips: Clips, settings: Settings, ids, codec=None
) -> Iterator[tuple[Clip, Heard | Mistake]]:
    """Every clip with its codes, in order. Memory holds the sound of two windows.

    The codec is loaded, unless one is given, and a progress bar begun, for the first clip that has
    to be encoded.
    """
    from tqdm import tqdm

    home, bar, done, hours = open_cache(settings), None, 0, 0.0
    with contextlib.ExitStack() as closing:
        threads = closing.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0))))
        work = functools.partial(hear, settings=settings, home=home, ids=ids)
        for window, heard in windows(clips.each, work, threads):
            new = [one for one in heard if isinstance(one, Heard) and one.codes is None]
            if new and bar is None:
                codec = codec or infer.load_codec(settings.codec, infer.device())
                bar = tqdm(total=clips.count, initial=done, unit=" clips", disable=None)
                closing.callback(bar.close)
                begun = time.monotonic()
            for one in encode_new(new, codec, settings.max_length // SLOTS, threads):
                hours += one.sound["seconds"] / 3600
                speed = 60 * hours / (time.monotonic() - begun)
                bar.set_postfix_str(f"{speed:.2f} hours of audio a minute", refresh=False)
                bar.update()
            done += len(window)
            if bar is not None:
                bar.update(done - bar.n)
            yield from zip(window, heard, strict=True)


def encode_new(new: list[Heard], codec, room: int, threads) -> Iterator[Heard]:
    """Puts at most `room` frames of codes into each, and into the cache; each as it is done."""
    if not new:
        return
    for one, codes in zip(new, encode(codec, [one.audio for one in new], threads), strict=True):
        one.codes, one.audio = codes[:room], None
        if one.entry:
            text = json.dumps(one.sound | {"codes": one.codes.ravel().tolist()})
            infer.write_text(one.entry, text)
        yield one


def encode(codec, sounds: list[np.ndarray], threads, size: int = 16) -> Iterator[np.ndarray]:
    """Codes of each, in order: on a GPU in batches of like length, on a CPU by a thread each.

    A batch gains nothing on a CPU, and several threads for one clip cost more than they bring.
    """
    import torch

    if next(codec.parameters()).device.type == "cuda":
        order, codes = sorted(range(len(sounds)), key=lambda n: len(sounds[n])), {}
        for batch in (order[n : n + size] for n in range(0, len(order), size)):
            codes |= zip(batch, infer.encode(codec, [sounds[n] for n in batch]), strict=True)
        yield from (codes[n] for n in range(len(sounds)))
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from threads.map(lambda sound: infer.encode(codec, [sound])[0], sounds)
    finally:
        torch.set_num_threads(before)


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


def whole_numbers(values) -> np.ndarray:
    """An int64 array; a ValueError for anything that is not a whole number, or a ragged list."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(array.dtype)
    return array.astype(np.int64)


def read_codes(codes, size: int) -> np.ndarray:
    """(frames, 7) codes in slot order from three SNAC levels of 1:2:4, or from a list in order."""
    try:
        if len(codes) == 3 and [len(level) for level in codes] == [
            len(codes[0]) * n for n in (1, 2, 4)
        ]:
            codes = infer.levels_to_slots([np.asarray(level) for level in codes])
        codes = whole_numbers(codes).reshape(-1, SLOTS)
    except (TypeError, ValueError, OverflowError):
        raise Mistake(f"codes are neither frames of {SLOTS} nor levels of 1:2:4") from None
    wrong = np.argwhere((codes < 0) | (codes >= size))
    if len(wrong) or not len(codes):
        told = f"code {codes[tuple(wrong[0])]} in frame {wrong[0][0]}" if len(wrong) else "no frame"
        raise Mistake(f"{told}: codes go from 0 to {size - 1}")
    return codes


def hear_made(made: dict, ids) -> Heard:
    """A clip that was tokenised elsewhere, checked slot by slot."""
    row = None if "codes" in made else check_row(made, ids)
    if row:
        speech = row["input_ids"].tolist()
        codes = infer.ids_to_codes(speech[speech.index(ids.sos) + 1 : speech.index(ids.eos)], ids)
        if not len(codes):
            raise Mistake("no frame between its SOS and EOS")
        check_labels(**row)
    else:
        codes = read_codes(made["codes"], ids.codebook_size)
    digest = hashlib.sha256(codes.tobytes()).hexdigest()
    sound = {"digest": digest, "seconds": len(codes) * FRAME_SAMPLES / SAMPLE_RATE}
    return Heard(sound, codes, row=row)


def check_row(made: dict, ids) -> dict:
    """input_ids and labels as arrays; without labels, the loss is on all that follows SOS."""
    try:
        row = whole_numbers(made["input_ids"]).reshape(-1)
        labels = made.get("labels")
        labels = None if labels is None else whole_numbers(labels).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise Mistake("input_ids or labels are not a list of whole numbers") from None
    most = ids.audio + SLOTS * ids.codebook_size
    if (wrong := np.flatnonzero((row < 0) | (row >= most))).size:
        place = f"id {row[wrong[0]]} at position {wrong[0]} of its input_ids"
        raise Mistake(f"{place}: ids go from 0 to {most - 1}")
    for name, wanted in (("SOS", ids.sos), ("EOS", ids.eos)):
        if wanted not in row:
            raise Mistake(f"no {name} (id {wanted}) among its input_ids")
    if labels is None:
        labels = np.where(np.arange(len(row)) <= np.argmax(row == ids.sos), -100, row)
    if len(labels) != len(row):
        raise Mistake(f"{len(labels)} labels for {len(row)} input_ids")
    return {"input_ids": row, "labels": labels}


def check_labels(input_ids: np.ndarray, labels: np.ndarray) -> None:
    """`Mistake` for a label that is neither −100 nor the id at its place, or if all are −100."""
    if (wrong := np.flatnonzero((labels != -100) & (labels != input_ids))).size:
        place = f"label {labels[wrong[0]]} at position {wrong[0]}"
        raise Mistake(f"{place} is neither -100 nor the input id there, {input_ids[wrong[0]]}")
    if (labels == -100).all():
        raise Mistake("every label is -100: the row trains nothing")


def frames_of(seconds: float) -> int:
    return -(-round(seconds * SAMPLE_RATE) // FRAME_SAMPLES)


def make_rows(clips: Clips, settings: Settings, tokenizer, codec=None) -> tuple[list, "Report"]:
    """Rows (input_ids, labels, text) and the report. A faulty clip is left out and named.

    `codec` is settings.codec, where the caller has loaded it already.
    """
    if unknown := set(settings.leave_out) - FINDINGS.keys():
        told = f"no finding is named {min(unknown)[:80]!r}; there are {', '.join(FINDINGS)}"
        raise Mistake(f"leave_out: {told}")
    config = infer.fetch(settings.codec, infer.CODEC_FILES) / "config.json"
    size = infer.read_json(config).get("codebook_size")
    if not isinstance(size, int):
        raise Mistake(f"{config}: no codebook_size: not a SNAC codec")
    ids = infer.read_speech_ids(tokenizer, size)
    report, rows = Report(printable(settings.dataset), note=clips.note), []
    for clip, heard in hear_all(clips, settings, ids, codec):
        add_row(rows, report, clip, heard, tokenizer, ids, settings)
    return finish_rows(rows, report, settings), report


def add_row(rows: list, report: "Report", clip: Clip, heard, tokenizer, ids, settings) -> None:
    """One clip's row, or the reason why there is none, into rows and report."""
    report.clips += 1
    text = " ".join((clip.text or "").split())
    voice = " ".join((clip.voice or settings.voice or "").split())
    try:
        if isinstance(heard, Mistake):
            raise heard
        row = heard.row
        if row:
            text = text or tokenizer.decode(row["input_ids"][row["labels"] == -100])
        else:
            prompt = infer.prompt_ids(tokenizer, ids, text, voice)
            row = make_row(prompt, heard.codes, ids, settings)
    except Mistake as mistake:
        report.add_left_out(clip.where, str(mistake))
        return
    report.cached += heard.cached
    measures = Measures(clip.where, voice, text, **heard.sound, tokens=len(row["input_ids"]))
    length, cut = measures.tokens, ids.eos not in row["input_ids"]
    if cut or length > settings.max_length:  # what it would take: prompt, codes and two ends
        prompt = int(np.argmax(row["input_ids"] == ids.sos)) + 1
        length = max(length, prompt + SLOTS * frames_of(measures.seconds) + 2)
    report.lengths.append(length)
    if length > settings.max_length:
        kept = cut and prompt < len(row["input_ids"]) <= settings.max_length
        fault = f"{clip.where}: {length:,} tokens, {measures.seconds:.1f} s"
        (report.truncated if kept else report.dropped).append(fault)
        report.reasons["too long"] += not kept
        if not kept:
            return
    report.measures.append(measures)
    rows.append(row | {"text": text})


def finish_rows(rows: list[dict], report: "Report", settings: Settings) -> list[dict]:
    """The rows without those that `leave_out` names; the doctor's findings into the report."""
    if rows:
        found, out = examine(report.measures), np.zeros(len(rows), bool)
        for name, over in found.items():
            worst = np.argsort(-over, kind="stable")[: (over > 0).sum()]
            if len(worst):
                report.findings[name] = [report.measures[n].told() for n in worst]
            out |= (over > 0) & (name in settings.leave_out)
        for n in np.flatnonzero(out):
            names = ", ".join(name for name in settings.leave_out if found[name][n] > 0)
            report.add_left_out(report.measures[n].where, names)
        rows = [row for row, gone in zip(rows, out, strict=True) if not gone]
        report.measures = [m for m, gone in zip(report.measures, out, strict=True) if not gone]
    if not rows:
        first = (report.left_out + report.dropped + ["no clips"])[0]
        none = f"{settings.dataset}: no rows left of {report.clips} clips"
        remedy = "see data/README.md"
        if report.dropped and not report.left_out:
            remedy = f"raise max_length, which is {settings.max_length}"
        raise Mistake(f"{none}; the first: {first}; {remedy}")
    whole = hashlib.sha256()
    for row in rows:
        whole.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    report.digest = whole.hexdigest()
    report.split = train, held = split_rows(rows, settings)
    report.held_out = len(held)
    report.slots_used = slots_used([len(row["input_ids"]) for row in train], settings)
    return rows


# ---------------------------------------------------------------- batches


def split_rows(rows: list[dict], settings: Settings) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows held out): a text stands on one side alone, whoever speaks it."""
    texts = sorted({row["text"] for row in rows})
    count = min(round(settings.held_out * len(texts)), len(texts) - 1)
    chosen = np.random.default_rng(settings.seed).permutation(len(texts))[:count]
    aside = {texts[n] for n in chosen}
    held = [row for row in rows if row["text"] in aside]
    return [row for row in rows if row["text"] not in aside], held


def length_batches(lengths: list[int], size: int, seed: int) -> list[int]:
    """Row numbers in an order in which every `size` neighbours are of like length.

    Rows are shuffled, sorted by length within pools of 32 batches, and the batches shuffled again;
    all of it from `seed` alone, so that a resumed run meets the same batches.
    """
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(lengths)).tolist()
    pools = [order[n : n + 32 * size] for n in range(0, len(order), 32 * size)]
    ordered = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
    batches = [ordered[n : n + size] for n in range(0, len(ordered), size)]
    last = batches.pop() if len(batches[-1]) < size else []  # a short batch stays at the end
    draw.shuffle(batches)
    if batches:  # the longest first: what does not fit in memory shows in the first step
        longest = max(range(len(batches)), key=lambda n: lengths[batches[n][-1]])
        batches.insert(0, batches.pop(longest))
    return [row for batch in batches for row in batch] + last


def count_packed(lengths: list[int], room: int) -> int:
    """How many rows of `room` tokens TRL's packing makes: the longest first, each where it fits
    best. (A test asks TRL; importing it here would take seconds.)
    """
    left = []  # of the rows begun, ascending
    for length in sorted(lengths, reverse=True):
        best = bisect_left(left, length)
        insort(left, (left.pop(best) if best < len(left) else room) - length)
    return len(left)


def count_padded(lengths: list[int], size: int, seed: int) -> int:
    """The slots of one epoch's batches of `size` rows, each padded to its longest."""
    order = length_batches(lengths, size, seed)
    batches = [[lengths[row] for row in order[n : n + size]] for n in range(0, len(order), size)]
    return sum(len(batch) * max(batch) for batch in batches)


def slots_used(lengths: list[int], settings: Settings) -> dict[str, float]:
    """Share of the slots of a run's batches that hold a token of a row, by `batching`."""
    longest, size = settings.max_length, settings.trainer["per_device_train_batch_size"][0]
    slots = {
        "pack": count_packed(lengths, longest) * longest,
        "pad": count_padded(lengths, size, settings.seed),
        "pad_to_max": len(lengths) * longest,
    }
    return {name: sum(lengths) / count for name, count in slots.items()}


# ---------------------------------------------------------------- the doctor

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
        path = f": {Path(settings.output_dir) / infer.SAVED_REPORT}"
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
            print(f"          … and {len(clips) - most} more, in {infer.SAVED_REPORT}")

    def save(self, folder: Path) -> None:
        """data_report.json: everything but the clips' own measures."""
        told = {k: v for k, v in vars(self).items() if k not in ("measures", "lengths", "split")}
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
    with infer.whole_file(path) as part:
        figure.savefig(part, dpi=100, format="png")
    pyplot.close(figure)


# ---------------------------------------------------------------- command line


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--dataset")
    settings = infer.read_command_line(__doc__)
    infer.check_names(settings)
    out = Path(settings.output_dir)
    clips = read_clips(settings)
    make_folder(settings.output_dir, "output_dir")
    tokenizer = infer.load_tokenizer(infer.fetch(settings.model, infer.TOKENIZER_FILES))
    _, report = make_rows(clips, settings, tokenizer)
    report.tell(settings, full=True)
    if (out / infer.SAVED_CONFIG).is_file():  # a run is there, whose report names its voices
        out /= "doctor"
    report.save(out)
    draw_report(report, out / "data_report.png")
    print(f"report   {out / infer.SAVED_REPORT} and data_report.png beside it")


if __name__ == "__main__":
    infer.run(main)
