"""The accepted forms of data (data/README.md) → clips."""

import csv
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orpheus.settings import Settings, UserError, read_text

AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_path")
TEXT_COLUMNS = ("text", "sentence", "transcription", "normalized_text")
VOICE_COLUMNS = ("speaker", "voice", "source")
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
            raise UserError(
                f"{name} is of a hub dataset, and {path} is a local one; set it to null"
            )
    if os.path.isdir(path):
        clips, count, note = read_folder(path, settings)
    elif os.path.isfile(path):
        clips, count, note = read_manifest(path, settings)
    elif settings.dataset.startswith((".", "/", "~")) or settings.dataset.count("/") > 1:
        raise UserError(f"{path}: no such folder of clips; set --dataset to one (data/README.md)")
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
        raise UserError(f"{folder}: no {forms} (data/README.md has the forms)")
    sounds.sort(key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.stem)])
    return Clips(map(read_pair, sounds), len(sounds))


def read_pair(sound: Path) -> Clip:
    """A sound and the .txt beside it."""
    path, where = sound.with_suffix(".txt"), printable(sound.name)
    try:
        if not path.is_file():
            raise UserError(f"no {path.name} beside it")
        text = read_text(path)
    except UserError as mistake:
        return Clip(where, sound, fault=str(mistake))
    return Clip(where, sound, text, fault=find_text_fault(text))


def printable(name: str) -> str:
    """The name of a file, which may hold bytes that are no UTF-8, for print and JSON."""
    return name.encode(errors="replace").decode()


def read_manifest(path: Path, settings: Settings) -> Clips:
    """Clips of a csv, tsv, jsonl or parquet table, whose paths are relative to it."""
    if path.suffix.lower() in SOUNDS:
        raise UserError(f"{path}: one sound; set --dataset to a folder or a table (data/README.md)")
    if path.suffix == ".parquet":
        return read_parquet([str(path)], path.parent, settings)
    text = read_text(path)
    if path.suffix == ".jsonl":
        rows, note = list(json_rows(path, text)), None
    else:
        rows, settings, note = read_table(path, text, settings)
    if not rows:
        raise UserError(f"{path}: no rows in it")
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
        raise UserError(f"{path}: holds NUL bytes, as UTF-16 does; save it as UTF-8")
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
    raise UserError(f"{path}: the first line is no header with known columns ({columns}); {remedy}")


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
        raise UserError(f"{path}: {width} columns and no header to name them; {remedy}")
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
            raise UserError(f"{path}: {fault}; {remedy}")
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
            raise UserError(f"{path}: two columns are named {twice[0]}; rename one of them")
        for row in table:
            yield begin + 1, row
            begin = skipped + table.line_num
    except csv.Error as error:
        remedy = 'quote a field as a whole, and double the quotes in it: "a ""b"" c"'
        raise UserError(f"{path} line {begin + 1}: not a csv table: {error}; {remedy}") from None


def json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {n}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} row {n}: must be one JSON object")
        yield n, row


def read_parquet(files: list[str], home: Path, settings: Settings) -> Clips:
    from datasets import Dataset, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import parquet

    disable_progress_bars()  # nothing is downloaded here
    try:
        columns = {file: set(parquet.read_schema(file).names) for file in files}
        same = all(names == columns[files[0]] for names in columns.values())
        rows = sum(parquet.read_metadata(file).num_rows for file in files)
        table = Dataset.from_parquet(files) if same and rows else None
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise UserError(f"{home}: parquet that does not load: {reason}") from None
    for file, names in columns.items():
        if other := ", ".join(sorted(names ^ columns[files[0]])):
            fault = f"its columns differ from those of {Path(files[0]).name}"
            raise UserError(f"{file}: {fault}: {other}; make them the same")
    if not rows:
        raise UserError(f"{home}: no rows in it")
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
        raise UserError(f"{name}: no such folder here, and the hub's gives: {reason}") from None
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
    raise UserError(f"{where}: no column {wanted or ' or '.join(names)}; there are: {there}")


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
