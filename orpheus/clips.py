"""The accepted forms of data (data/README.md) → clips."""

import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orpheus.audio import NEED_FFMPEG, ClipError
from orpheus.hub import is_hub_id
from orpheus.settings import Settings, UserError, first_reason, read_text
from orpheus.tables import TOKEN_COLUMNS, find_columns, read_json_rows, read_table

TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class Clip(NamedTuple):
    """One clip as its dataset describes it. Its audio is neither decoded nor checked yet."""

    source: str  # file and row, for messages
    audio: Path | bytes | None = None
    text: str | None = None
    voice: str | None = None
    pretokenized: dict | None = None  # codes, or input_ids and perhaps labels
    error: ClipError | None = None  # why the row cannot be used


@dataclass
class Clips:
    """The clips of a dataset. They can be iterated over once."""

    clips: Iterable[Clip]
    count: int | None  # None for a stream, whose length is unknown
    note: str | None = None  # how the table was read, if that was not obvious

    def __iter__(self) -> Iterator[Clip]:
        return iter(self.clips)


def read_clips(settings: Settings) -> Clips:
    """Reads the first `limit` clips of a dataset in any of the accepted forms.

    Raises `UserError` for a dataset that cannot be read as a whole. A row that cannot be used
    becomes a clip with an error.
    """
    path = Path(settings.dataset)
    for name in ("dataset_config", "dataset_revision"):
        if getattr(settings, name) and path.exists():
            raise UserError(f"{name} is for hub datasets, and {path} is local; set it to null")
    if os.path.isdir(path):
        clips = read_folder(path, settings)
    elif os.path.isfile(path):
        clips = read_manifest(path, settings)
    elif not is_hub_id(settings.dataset):
        message = "no such folder; give one of clips (data/README.md), or a hub id (owner/name)"
        raise UserError(f"{path}: {message}")
    else:
        clips = read_hub(settings)
    if settings.limit is not None:
        clips.clips = itertools.islice(clips.clips, settings.limit)
        clips.count = min(clips.count or settings.limit, settings.limit)
    return clips


def read_folder(folder: Path, settings: Settings) -> Clips:
    """AudioFolder, LJSpeech, parquet files, or audio files with a .txt beside each."""
    for name in TABLES:
        if (folder / name).is_file():
            return read_manifest(folder / name, settings)
    if files := sorted(path for path in folder.rglob("*.parquet") if path.is_file()):
        return read_parquet(files, folder, settings)
    paths = [path for path in folder.glob("[!.]*") if path.suffix.lower() in AUDIO_SUFFIXES]
    if not any(path.with_suffix(".txt").is_file() for path in paths):
        raise UserError(f"{folder}: {missing_table(folder)}")
    # 9.wav before 10.wav
    paths.sort(key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.stem)])
    return Clips(map(read_pair, paths), len(paths))


def missing_table(folder: Path) -> str:
    """What a folder lacks that is in none of the accepted forms, and the remedy."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    unread = [path.name for path in paths if path.suffix.lower() in NEED_FFMPEG]
    tables = [p.name for p in paths if p.suffix.lower() in (".csv", ".tsv", ".jsonl", ".xlsx")]
    message = f"no {', '.join(TABLES)}, no .parquet, and no audio file with a .txt beside it"
    if tables:
        name = printable(tables[0])
        return f"{message}; save {name} as metadata.csv with a header, such as file_name,text"
    if unread:
        return f"{message} that can be read; convert {printable(unread[0])} with ffmpeg to flac"
    if (folder / "state.json").is_file():
        return f"{message}; datasets' save_to_disk made it: write it with to_parquet instead"
    inner = sorted(path.parent for name in TABLES for path in folder.glob(f"*/{name}"))
    if inner:
        return f"{message}; {printable(str(inner[0]))} has a table: give it as --dataset"
    return f"{message} (data/README.md has the forms)"


def read_pair(audio: Path) -> Clip:
    """A clip of an audio file and the .txt beside it."""
    path, source = audio.with_suffix(".txt"), printable(audio.name)
    try:
        if not path.is_file():
            raise ClipError(f"no {path.name} beside it", "no text")
        return Clip(source, audio, check_text(read_text(path), "text"))
    except ClipError as error:
        return Clip(source, error=error)
    except UserError as error:  # the file cannot be read
        return Clip(source, error=ClipError(str(error), "text unreadable"))


def printable(name: str) -> str:
    """A file's name, which need not be valid UTF-8, as it can be printed and saved."""
    return name.encode(errors="replace").decode()


def read_manifest(path: Path, settings: Settings) -> Clips:
    """Clips of a csv, tsv, jsonl or parquet table. Its paths are relative to its folder."""
    if path.suffix.lower() in AUDIO_SUFFIXES:
        remedy = "set --dataset to a folder or a table (data/README.md)"
        raise UserError(f"{path}: a single audio file; {remedy}")
    if path.suffix == ".parquet":
        return read_parquet([path], path.parent, settings)
    text, note = read_text(path), None
    if path.suffix == ".jsonl":
        rows = list(read_json_rows(path, text))
    else:
        rows, note = read_table(path, text, settings)
    if not rows:
        raise UserError(f"{path}: no rows in it")
    columns = {name for _, row in rows for name in row if name is not None}
    return Clips(clips_of_rows(rows, columns, path, path.parent, settings), len(rows), note)


def read_parquet(files: list[Path], home: Path, settings: Settings) -> Clips:
    """Clips of one or more parquet files of the same columns, read a few rows at a time."""
    from pyarrow import ArrowException, parquet

    def read_rows() -> Iterator[dict]:
        try:
            for file in files:
                for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
                    yield from batch.to_pylist()
        except (OSError, ArrowException) as error:
            raise UserError(f"{file}: parquet that does not load: {first_reason(error)}") from None

    count, columns = 0, None
    for file in files:
        try:
            metadata = parquet.read_metadata(file)
            names = metadata.schema.to_arrow_schema().names
        except (OSError, ArrowException) as error:
            raise UserError(f"{file}: parquet that does not load: {first_reason(error)}") from None
        columns = columns or names
        if other := ", ".join(sorted({*names} ^ {*columns})):
            fault = f"its columns differ from those of {files[0].name}"
            raise UserError(f"{file}: {fault}: {other}; make them the same")
        count += metadata.num_rows
    if not count:
        raise UserError(f"{home}: no rows in it")
    table = files[0] if len(files) == 1 else home
    return Clips(clips_of_rows(enumerate(read_rows()), columns, table, home, settings), count)


def read_hub(settings: Settings) -> Clips:
    """Clips of a hub dataset. With `limit` it is streamed, to download no more than is used."""
    from datasets import Audio, load_dataset
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
        reason = first_reason(error.__cause__ or error)
        fault = "no such folder here, and it cannot be loaded from the hub"
        raise UserError(f"{name}: {fault}: {reason}") from None
    for column, feature in (table.features or {}).items():
        if isinstance(feature, Audio):  # soundfile decodes it; datasets would want torchcodec
            table = table.cast_column(column, Audio(decode=False))
    columns = table.column_names or next(iter(table), {})  # unknown for a streamed csv
    clips = clips_of_rows(enumerate(table), columns, Path(name), None, settings)
    return Clips(clips, getattr(table, "num_rows", None))


def clips_of_rows(
    rows: Iterable[tuple[int, dict]], columns, table: Path, home: Path | None, settings: Settings
) -> Iterator[Clip]:
    """Clips of (number, row) pairs, once it is settled which column holds what.

    `table` names the rows in messages; `home` is the folder of the audio files, if it is local.
    """
    found = find_columns(table, list(columns), settings)

    def read_row(number: int, row: dict) -> Clip:
        source = f"{printable(table.name)} row {number}"
        try:
            return clip_of_row(source, row, found, home, settings.absolute_paths)
        except ClipError as error:
            return Clip(source, error=error)

    return itertools.starmap(read_row, rows)


def clip_of_row(
    source: str, row: dict, columns: dict[str, str], home: Path | None, absolute_paths: bool
) -> Clip:
    """The clip that a row describes; `ClipError` for a row that cannot be used."""
    if None in row:
        raise ClipError("more columns than the header has; put a text with commas in quotes")
    audio = row.get(columns.get("audio"))
    if isinstance(audio, dict):
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, str) and audio:
        audio = find_audio(audio, home, absolute_paths)
    audio = audio if isinstance(audio, Path | bytes) else None
    text = check_text(row.get(columns.get("text")), columns.get("text"))
    voice = check_text(row.get(columns.get("voice")), columns.get("voice"), is_voice=True)
    if "tokens" not in columns:
        return Clip(source, audio, text, voice)
    if row.get(columns["tokens"]) is None:
        raise ClipError(f"no {columns['tokens']} in this row")
    return Clip(source, audio, text, voice, {n: row[n] for n in TOKEN_COLUMNS if n in row})


def check_text(value: Any, column: str | None, is_voice: bool = False) -> str | None:
    """A value as text; `ClipError` for what cannot be trained on. Only a text needs a letter."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ClipError(f"{column} holds {type(value).__name__}, not text", "no text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ClipError(f"{column} holds {value}, not text", "no text")
    if value is None:
        return None
    text, what = str(value), "voice" if is_voice else "text"
    if printable(text) != text:
        raise ClipError(f"the {what} holds half of a character (a lone surrogate)", "broken text")
    control = (c for c in text if unicodedata.category(c) == "Cc" and not c.isspace())
    if found := next(control, None):
        fault = f"the {what} holds a control character (U+{ord(found):04X})"
        raise ClipError(fault, "broken text")
    if text.strip() and not is_voice and not any(map(str.isalnum, text)):
        fault = f"nothing to speak in the text {text.strip()[:20]!r}: no letter or digit"
        raise ClipError(fault, "nothing to speak")
    return text


def find_audio(name: str, home: Path | None, absolute_paths: bool) -> Path:
    """The file that a row names; `ClipError` for one outside the dataset's folder.

    A name without a suffix is that of a file in wavs/, or beside the table.
    """
    path = Path(name.replace("\\", "/"))
    if home is None or (path.is_absolute() and absolute_paths):
        return path
    inside = os.path.abspath(home / path).startswith(os.path.join(os.path.abspath(home), ""))
    if not inside and not absolute_paths:
        fault = f"{path} is outside the dataset's folder; --absolute_paths allows it"
        raise ClipError(fault, "outside the folder")
    names = [str(path)]
    if not path.suffix:
        names[:0] = [f"{part}{path}{s}" for part in ("wavs/", "") for s in AUDIO_SUFFIXES]
    # macOS writes é as two characters, others as one
    names += [unicodedata.normalize(form, n) for form in ("NFC", "NFD") for n in names]
    return home / next((n for n in names if os.path.isfile(home / n)), path)
