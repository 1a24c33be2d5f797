"""A dataset in any of the accepted forms (data/README.md) → its clips."""

import fnmatch
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orpheus.audio import ClipError, pack_samples
from orpheus.files import is_hub_id
from orpheus.settings import DataSettings, UserError, read_text
from orpheus.tables import (
    LOOSE,
    SAVED,
    SOUNDS,
    TABLES,
    Table,
    builder_kinds,
    column_key,
    find_audio,
    match_columns,
    open_file,
    open_with_datasets,
    printable,
    readable,
    shorten,
    split_name,
)

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "codes", "codes_list")
PAIRED = (".normalized.txt", ".txt", ".lab", ".original.txt")
UNKNOWN = 10**12  # rows of a stream
PEEK = 1000  # rows whose texts decide whether texts begin with their voice
# Corpora in forms of their own: a pattern of their files, what it is, and what to do.
CORPORA = (
    ("*wav.scp", "Kaldi's wav.scp and text", "write metadata.csv from them"),
    ("*.trans.txt", "LibriSpeech's .trans.txt files", "write metadata.csv from them"),
    ("*transcript*.txt", "a list of transcripts, as MLS's", "write metadata.csv from it"),
    ("txt/*.txt", "texts apart from the recordings, as in VCTK", "put each .txt beside its own"),
    ("*.textgrid", "Praat's TextGrids", "write the text of each to a .txt beside its recording"),
    ("*.[sv][rt]t", "subtitles", "cut the recordings with data/cut.py"),
    ("*.tar", "tar files, as WebDataset has them", "unpack them"),
    ("*.zip", "zip files", "unpack them"),
    ("*.xls*", "a table of Excel", "save it as metadata.csv, in UTF-8"),
    ("*.json", "JSON files, one for each recording", "write metadata.csv from them"),
)


class Clip(NamedTuple):
    """One clip as its dataset describes it. Its audio is neither decoded nor checked yet."""

    source: str  # file and row, for messages
    audio: Path | bytes | None = None
    text: str | None = None
    voice: str | None = None
    pretokenized: dict | None = None  # codes, or input_ids and perhaps labels
    error: ClipError | None = None  # why the row cannot be used
    start: float = 0.0  # seconds, where the clip begins in its audio
    duration: float | None = None  # seconds; None: to the end


@dataclass
class Clips:
    """The clips of a dataset, always in the same order. They can be iterated over once."""

    clips: Iterable[Clip]
    count: int | None  # None where it is not known before they are read
    note: str | None = None  # how the dataset was read, where that was not obvious

    def __iter__(self) -> Iterator[Clip]:
        return iter(self.clips)


def read_clips(settings: DataSettings) -> Clips:
    """Return the first `limit` clips of a dataset in any of the accepted forms.

    A row that cannot be used becomes a clip with an error.
    Raises: `UserError` for a dataset that cannot be read as a whole.
    """
    table = open_table(settings)
    columns = find_columns(table, settings)
    prefixed = find_prefixes(table, columns, settings)
    wanted = [*columns.values(), *(name for name in TOKEN_COLUMNS if name in table.columns)]
    first, end = find_slice(table, settings.dataset_split)
    count = None if end in (None, UNKNOWN) else end - first
    if settings.limit is not None:
        count = min(settings.limit, settings.limit if count is None else count)
        end = first + count

    def read_row(source: str, row: dict) -> Clip:
        source = printable(source)
        try:
            clip = clip_of_row(source, row, columns, table.home, settings)
        except ClipError as error:
            return Clip(source, error=error)
        name, rest = split_prefix(clip.text or "") if prefixed else ("", None)
        if name:
            return clip._replace(text=rest, voice=name)
        return clip._replace(text=remove_voice(clip.text, clip.voice or settings.voice))

    rows = itertools.islice(table.read(list(dict.fromkeys(wanted))), first, end)
    return Clips(itertools.starmap(read_row, rows), count, "; ".join(table.notes) or None)


def find_slice(table: Table, split: str) -> tuple[int, int | None]:
    """Return (first, end) of the rows that a split such as `train[:10%]` names."""
    name, bracket, rows = split.partition("[")
    if not bracket:
        return 0, table.count
    from datasets import ReadInstruction

    try:
        if table.count is None and re.search("[%-]", rows):
            raise ValueError("its length is not known before it is read")
        whole = {name: UNKNOWN if table.count is None else table.count}
        part = ReadInstruction.from_spec(split).to_absolute(whole)[0]
    except (ValueError, AssertionError) as error:
        fault = f"dataset_split cannot be {split}: {error}"
        raise UserError(f"{table.name}: {fault}; give rows, as in train[:100]") from error
    return part.from_, part.to


# ---------------------------------------------------------------- where the rows are


def open_table(settings: DataSettings) -> Table:
    """Return the table of the dataset, or of that split of it, which the settings name."""
    path = Path(settings.dataset)
    if settings.dataset_revision and path.exists():
        raise UserError(f"dataset_revision is for hub datasets, and {path} is local; leave it out")
    if path.is_dir():
        return open_folder(path, settings)
    if path.is_file():
        return open_file(path, settings)
    if is_hub_id(settings.dataset):
        return open_hub(settings)
    message = "no such folder; give one of clips (data/README.md), or a hub id (owner/name)"
    raise UserError(f"{path}: {message}")


def open_folder(folder: Path, settings: DataSettings) -> Table:
    """Return the table of a folder: its own, that of a split below it, or its pairs of files."""
    split, readme = split_name(settings), folder / "README.md"
    described = readme.is_file() and "\nconfigs:" in readme.read_text("utf-8", "replace")
    if described or any((folder / name).is_file() for name in SAVED):
        return open_with_datasets(os.path.abspath(folder), settings, folder)
    if config := settings.dataset_config:
        if not (folder / config).is_dir():
            fault = f"no configuration {config}: no README.md names it, and no folder has its name"
            raise UserError(f"{folder}: {fault}")
        return open_folder(folder / config, settings.replace(dataset_config=None))
    inner = settings.replace(dataset_split=settings.dataset_split.replace(split, "train", 1))
    of_split = [name.replace("metadata", split) for name in TABLES]
    for name in (*TABLES, *of_split) if split == "train" else of_split:
        if (folder / name).is_file():
            return open_file(folder / name, inner)
    for place in (folder / split, folder / "data" / split):
        if any((place / name).is_file() for name in (*TABLES, *SAVED)):
            return open_folder(place, inner)
    files = list_files(folder)
    suffixes = {path.suffix.lower() for path in files}
    sounds = [path for path in files if path.suffix.lower() in SOUNDS]
    if suffixes & ({".parquet", ".arrow"} if sounds else {".parquet", ".arrow", ".json", ".jsonl"}):
        return open_with_datasets(os.path.abspath(folder), settings, folder)
    if (folder / split).is_dir():
        return open_folder(folder / split, inner)
    if split != "train":
        raise UserError(f"{folder}: no split {split}: neither a table nor a folder has its name")
    if any(map(find_text, sounds)):
        return open_pairs(folder, sounds)
    raise UserError(f"{folder}: {describe_folder(folder, files, len(sounds))}")


def list_files(folder: Path) -> list[Path]:
    """Return the files below a folder, but no hidden ones; 9.wav before 10.wav."""
    paths = [os.path.join(home, name) for home, _, names in os.walk(folder) for name in names]
    names = [os.path.relpath(path, folder) for path in paths]
    parts = {name: re.split("([0-9]+)", os.path.splitext(name)[0]) for name in names}
    names = [name for name in names if not re.search(r"(^|/)\.", name)]
    names.sort(key=lambda name: [int(s) if n % 2 else s for n, s in enumerate(parts[name])])
    return [folder / name for name in names]


def describe_folder(folder: Path, files: list[Path], sounds: int) -> str:
    """Return what is in a folder that has none of the accepted forms, and what to do."""
    names = [printable(str(path.relative_to(folder))) for path in files]
    for pattern, what, remedy in CORPORA:
        if any(fnmatch.fnmatchcase(name.lower(), pattern) for name in names):
            return f"it holds {what}; {remedy} (data/README.md)"
    tables = [name for name in names if name.lower().endswith((".csv", ".tsv", ".jsonl", ".list"))]
    if inner := [str(Path(name).parent) for name in tables if Path(name).stem == "metadata"]:
        return f"there are tables in {shorten(inner)}; choose one with --dataset_config"
    if tables:
        return f"no metadata.csv; give its table: --dataset {folder / tables[0]}"
    return f"{sounds} recordings, but no metadata.csv and no .txt beside any (data/README.md)"


def find_text(sound: Path) -> Path | None:
    """Return the file of a recording's text, beside it."""
    return next((path for path in map(sound.with_suffix, PAIRED) if path.is_file()), None)


def open_pairs(folder: Path, sounds: list[Path]) -> Table:
    """Return the table of recordings with a text beside each; several folders are the voices."""
    base = os.path.commonpath([path.parent for path in sounds])
    voices = {path: (*path.parent.relative_to(base).parts, None)[0] for path in sounds}
    names = sorted({*voices.values()} - {None})
    notes = [f"the folders are the voices ({shorten(names)})"] if len(names) > 1 else []

    def read(_):
        for sound in sounds:
            try:
                text = read_text(find_text(sound) or sound.with_suffix(".txt"))
            except UserError as error:
                text = ClipError(str(error), "no text")
            row = {"audio": sound, "text": text, "voice": voices[sound] if notes else None}
            yield str(sound.relative_to(folder)), row

    return Table(folder, folder, ["audio", "text", "voice"], read, len(sounds), notes)


def open_hub(settings: DataSettings) -> Table:
    """Return the table of a hub dataset: streamed with `limit`, else downloaded and read here."""
    from datasets import load_dataset_builder
    from huggingface_hub import snapshot_download

    name, revision = settings.dataset, settings.dataset_revision
    with readable(f"{name}: no such folder here, and on the hub it"):
        try:
            builder = load_dataset_builder(name, settings.dataset_config, revision=revision)
            files = builder.config.data_files.get(split_name(settings), [])
            # hf://datasets/owner/name@commit/data/train-0.parquet
            wanted = [re.sub("^hf://[^@]*@[^/]*/", "", file) for file in files]
            loose = builder_kinds(builder) & LOOSE
            how = {"allow_patterns": None if loose else [*wanted, "README.md"]}
        except ConnectionError:  # there may be what an earlier run downloaded
            loose, how = True, {"local_files_only": True}
        if loose or settings.limit is None:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, **how)
            return open_folder(Path(folder), settings)
    return open_with_datasets(name, settings, None, revision=revision)


# ---------------------------------------------------------------- what columns hold


def find_columns(table: Table, settings: DataSettings) -> dict[str, str]:
    """Return the column of each kind that the table has: text, audio, voice, start, tokens, …

    Raises: `UserError` for a table without a column that it needs.
    """
    found, there = {}, ", ".join(sorted(map(str, table.columns)))
    tokens = next((n for n in ("input_ids", "codes", "codes_list") if n in table.columns), None)
    needed = {None: ("audio", "text"), "input_ids": ()}.get(tokens, ("text",))
    for kind in ("audio", "text", "voice", "start", "end", "duration", "rate"):
        chosen = getattr(settings, f"{kind}_column", None)
        names = match_columns(kind, table.columns)
        if chosen:
            key = column_key(chosen)
            names = [name for name in table.columns if name == chosen or column_key(name) == key]
        if names:
            found[kind] = names[0]
            if kind == "voice" and column_key(names[0]) not in ("speaker", "voice", "source"):
                table.notes.append(f"column {names[0]} has the voices")
        elif chosen or kind in needed:
            fault = f"no column {chosen}" if chosen else f"no column is known to hold the {kind}"
            remedy = "" if chosen else f"; name it with --{kind}_column"
            raise UserError(f"{table.name}: {fault}; there are: {there}{remedy}")
    if "start" in found and not tokens and not found.keys().isdisjoint({"end", "duration"}):
        table.notes.append(f"column {found['start']} is where clips begin in their recordings")
    return found | ({"tokens": tokens} if tokens else {})


# ---------------------------------------------------------------- voices before the texts


def split_prefix(text: str) -> tuple[str, str]:
    """Return (voice, rest) of a text such as `tara: one day`, and ("", text) of another."""
    match = re.match(r"\s*([^\s:][^:.,;!?]{0,39}):\s+(?=\S)", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def find_prefixes(table: Table, columns: dict[str, str], settings: DataSettings) -> bool:
    """Return whether the texts begin with the voices that no column names; adds notes.

    That is so if all of the first thousand texts begin with a name and a colon, and names recur.
    Raises: `UserError` for a table without rows.
    """
    wanted = [columns[kind] for kind in ("text", "voice", "tokens") if kind in columns][:2]
    rows = [row for _, row in itertools.islice(table.read(wanted), PEEK)]
    if not rows:
        raise UserError(f"{table.name}: no rows in it")
    pairs = [(row.get(columns.get("text")), row.get(columns.get("voice"))) for row in rows]
    pairs = [pair for pair in pairs if isinstance(pair[0], str) and pair[0].strip()]
    names = [split_prefix(text)[0] for text, _ in pairs]
    voices = list(dict.fromkeys(names))
    few = 1 if " " in "".join(voices) else 8  # a few clips may each have a voice of one word
    unnamed = all(names) and not any(voice for _, voice in pairs)
    if unnamed and 0 < len(voices) <= max(few, len(names) // 2):
        table.notes.append(f"the texts begin with their voices ({shorten(voices)})")
        return True
    if any(remove_voice(text, voice or settings.voice) != text for text, voice in pairs):
        table.notes.append("texts begin with their own voice, which is taken off")
    return False


def remove_voice(text: str | None, voice) -> str | None:
    """Return a text without `voice:` before it."""
    name, colon, rest = (text or "").partition(":")
    same = name.strip().lower() == str(voice).strip().lower()
    return rest if colon and voice and same else text


# ---------------------------------------------------------------- a row


def clip_of_row(
    source: str, row: dict, columns: dict[str, str], home: Path | None, settings: DataSettings
) -> Clip:
    """Return the clip that a row describes. Raises: `ClipError` for one that cannot be used."""
    if None in row:
        raise ClipError("more columns than the header has; put a text with commas in quotes")
    values = {kind: row.get(name) for kind, name in columns.items()}
    text = check_text(values.get("text"), columns.get("text"))
    voice = check_text(values.get("voice"), columns.get("voice"), is_voice=True)
    if "tokens" not in values:
        audio = read_sound(values, home, settings.absolute_paths)
        return Clip(source, audio, text, voice, None, None, *read_segment(values, columns))
    if values["tokens"] is None:
        raise ClipError(f"no {columns['tokens']} in this row")
    return Clip(source, None, text, voice, {n: row[n] for n in TOKEN_COLUMNS if n in row})


def check_text(value: Any, column: str | None, is_voice: bool = False) -> str | None:
    """Return a value as text. Raises: `ClipError` for what cannot be spoken."""
    if isinstance(value, ClipError):
        raise value
    if is_voice and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ClipError(f"{column} holds {type(value).__name__}, not text", "no text")
    text, what = str(value), "voice" if is_voice else "text"
    control = (c for c in text if unicodedata.category(c) == "Cc" and not c.isspace())
    if found := next(control, None):
        fault = f"the {what} holds a control character (U+{ord(found):04X})"
        raise ClipError(fault, "broken text")
    if text.strip() and not is_voice and not any(map(str.isalnum, text)):
        fault = f"nothing to speak in the text {text.strip()[:20]!r}: no letter or digit"
        raise ClipError(fault, "nothing to speak")
    return text


def read_sound(values: dict, home: Path | None, absolute_paths: bool) -> Path | bytes | None:
    """Return a row's audio: a path, or the bytes of a file, which samples are made into."""
    audio, rate = values.get("audio"), values.get("rate")
    if isinstance(audio, dict):
        rate = audio.get("sampling_rate", audio.get("sample_rate", rate))
        samples = audio.get("array")
        audio = samples if samples is not None else audio.get("bytes") or audio.get("path")
    if isinstance(audio, str) and audio:
        return find_audio(audio, home, absolute_paths)
    if not isinstance(audio, list | np.ndarray):
        return audio if isinstance(audio, Path | bytes) else None
    if not rate:
        raise ClipError("samples without their rate; add a column sampling_rate", "no sound")
    return pack_samples(audio, rate)


def read_segment(values: dict, columns: dict[str, str]) -> tuple[float, float | None]:
    """Return (start, duration) in seconds of the part of a recording that a row names."""
    times = {}
    for kind in ("start", "end", "duration"):
        if values.get(kind) not in (None, ""):
            try:
                for part in str(values[kind]).split(":"):  # 1:02.5 or 62.5
                    times[kind] = 60 * times.get(kind, 0) + float(part)
            except ValueError:
                raise ClipError(f"{columns[kind]} is {values[kind]!r}, not seconds") from None
            times[kind] /= 1000 if column_key(columns[kind]).endswith("ms") else 1
    if "start" not in times or len(times) == 1:
        return 0.0, None
    start = times["start"]
    duration = times["end"] - start if "end" in times else times["duration"]
    if not (start >= 0 and 0 < duration < math.inf):
        raise ClipError(f"no segment of {duration:g} s at {start:g} s: end comes before start")
    return start, duration
