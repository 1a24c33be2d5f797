"""Tables of text, JSON and parquet → rows of values by column."""

import contextlib
import csv
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orpheus.audio import NEED_FFMPEG, ClipError
from orpheus.settings import DataSettings, UserError, read_text

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", *NEED_FFMPEG)
PLACES = ("", "wavs", "wav", "audio", "audios", "clips")  # of recordings, below their table
QUOTED = re.compile('^"((?:[^"]|"")*)"$')
# What columns hold, by their names in lower case without signs; earlier patterns are preferred.
COLUMNS = {
    "audio": r"audio filename path audiopath file(path)? (audio|wav|sound|clip|recording|speech)"
    r"(file)?s?(name|path)? (audio)?(array|samples|waveform|values) id|utt(erance)?id|key",
    "text": r"text sentence transcription normalizedtext transcripts? (text|transcript(ion)?)?"
    r"normali[sz]ed(text|transcript(ion)?)? (raw|original)text|text(raw|original)|utterance|words",
    "voice": r"speaker voice (speaker|spk|voice|narrator|reader)name (speaker|spkr?|voice|client|"
    r"narrator|reader|talker|actor|singer)s?(id|no|num|number|label|code|key|index|idx)?s? source",
    "start": r"(segment|audio|clip)?(start|begin|offset)(time)?(s|sec|secs|seconds|ms)?",
    "end": r"(segment|audio|clip)?(end|stop)(time)?(s|sec|secs|seconds|ms)?",
    "duration": r"(segment|audio|clip)?(duration|dur)(s|sec|secs|seconds|ms)?",
    "rate": r"(audio)?(sampl(e|ing))?(rate|freq|frequency)(hz)?|sr|fs",
}


class Table(NamedTuple):
    """A dataset as rows of values. `read` gives (source, row) of some columns, repeatedly."""

    name: str | Path  # for messages
    home: Path | None  # folder of the recordings, if it is local
    columns: list[str]
    read: Callable[[list[str]], Iterator[tuple[str, dict]]]
    count: int | None
    notes: list[str]  # what was not obvious


def column_key(name: str) -> str:
    """Return a column's name as it is compared: File Name and file-name are filename."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def match_columns(kind: str, names: list[str]) -> list[str]:
    """Return the columns that hold `kind` by their names, the preferred one first."""
    patterns = COLUMNS[kind].split()
    return [name for p in patterns for name in names if re.fullmatch(p, column_key(name))]


def find_audio(name: str, home: Path | None, absolute_paths: bool) -> Path:
    """Return the file that a row names, from the table's folder or one for recordings in it.

    Its suffix may be missing or another. Raises: `ClipError` for one outside the folder.
    """
    path = Path(name.replace("\\", "/"))
    if home is None or (path.is_absolute() and absolute_paths):
        return path
    inside = os.path.abspath(home / path).startswith(os.path.join(os.path.abspath(home), ""))
    if not inside and not absolute_paths:
        fault = f"{path} is outside the dataset's folder; --absolute_paths allows it"
        raise ClipError(fault, "outside the folder")
    endings = ["", *SOUNDS, *map(str.upper, SOUNDS)]
    places = [place for place in PLACES if os.path.isdir(home / place)]
    for form in ("NFC", "NFD"):  # macOS writes é as two characters, others as one
        file = unicodedata.normalize(form, str(path))
        stems = [file, os.path.splitext(file)[0]] if file.lower().endswith(SOUNDS) else [file]
        for place, stem, ending in itertools.product(places, stems, endings):
            found = os.path.join(home, place, stem + ending)
            if os.path.isfile(found):
                return Path(found)
    return home / path


def open_json(path: Path) -> Table:
    """Return the table of a file with a JSON object on each line, or with a list of them.

    The json builder of datasets takes texts that look like dates for dates, and fails where a
    column is empty in the first 10 MB.
    """
    is_list = read_text(path).lstrip().startswith("[")

    def read(_):
        number = 1
        try:
            with open(path, encoding="utf-8-sig") as file:
                for number, row in enumerate(json.load(file) if is_list else file, 1):
                    if is_list or row.strip():
                        yield f"{path.name} row {number}", dict(row if is_list else json.loads(row))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} row {number}: not an object in JSON: {error}") from error

    names = Counter(name for _, row in read(None) for name in row)
    return Table(path, path.parent, list(names), read, sum(1 for _ in read(None)), [])


def open_text_table(path: Path, settings: DataSettings) -> Table:
    """Return the table of lines with commas, semicolons, tabs or bars, with a header or LJSpeech's.

    The separator is the one that splits the first line into the most columns with known names.
    """
    header = read_text(path).lstrip("\n").partition("\n")[0]
    chosen = {settings.audio_column, settings.text_column, settings.voice_column}

    def count_known(separator: str) -> tuple[int, int]:
        names = [cell.strip('" ') for cell in header.split(separator)]
        known = {name for kind in COLUMNS for name in match_columns(kind, names)}
        return len(known | chosen.intersection(names)), len(names)

    separator = max(",;\t|", key=count_known)
    has_header = count_known(separator)[0] > ("|" in header)  # LJSpeech's text may be a known name
    if not has_header and "|" not in header:
        remedy = "add one such as file_name,text, or set --audio_column and --text_column"
        fault = f"no header with known columns in the first line ({header[:80].strip()})"
        raise UserError(f"{path}: {fault}; {remedy}" if header else f"{path}: no rows in it")
    separator = separator if has_header else "|"
    quoting, notes = choose_quoting(path, separator)
    if has_header:
        columns = next(read_cells(path, separator, quoting))[1]
    else:
        columns, notes = find_ljspeech(path, settings.text_column)
    keys = Counter(column_key(name) for name in columns if name)
    if twice := [name for name, times in keys.items() if times > 1]:
        raise UserError(f"{path}: two columns are named {twice[0]}; rename one of them")

    def read(_):
        for line, cells in itertools.islice(read_cells(path, separator, quoting), has_header, None):
            row = dict(zip(columns, cells, strict=False))
            if any(cells[len(columns) :]):
                row[None] = cells[len(columns) :]
            if "written" in columns:  # LJSpeech's text, where there is no normalized one
                row["normalized_text"] = row.get("normalized_text") or row.get("written")
            yield f"{path.name} row {line}", row

    return Table(path, path.parent, columns, read, sum(1 for _ in read(None)), notes)


def find_ljspeech(path: Path, text_column: str | None) -> tuple[list[str], list[str]]:
    """Return the columns of `id|text` or `id|text|normalized text`, and notes.

    A third column is the normalized text if it resembles the second. It could also be a voice.
    """
    widths = Counter(len(cells) for _, cells in read_cells(path, "|", csv.QUOTE_NONE))
    width = widths.most_common(1)[0][0]
    rows = (row for _, row in read_cells(path, "|", csv.QUOTE_NONE) if row[width - 1 :] > [""])
    pairs = [(row[1].lower(), row[-1].lower()) for row in itertools.islice(rows, 200)]
    remedy = "add a header line such as file_name|text|voice"
    if width > 3:
        fault = f"{width} columns and no header to name them"
        raise UserError(f"{path}: {fault}; {remedy} (GPT-SoVITS: file_name|voice|language|text)")
    if width == 2 or not pairs:
        return ["file_name", "text"], []
    likeness = np.mean([SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs])
    if text_column is None and likeness < 0.5:
        fault = "the third column does not resemble the second, so it may be voices or texts"
        remedy += "; or set --text_column to text (the second) or normalized_text"
        raise UserError(f"{path}: {fault}; {remedy}")
    note = f"{path.name} has no header; its {{}} column holds the texts"
    if text_column == "text":
        return ["file_name", "text", "other"], [note.format("second")]
    return ["file_name", "written", "normalized_text"], [note.format("third")]


def read_cells(path: Path, separator: str, quoting: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which a row begins, its cells)."""
    dialect = {"delimiter": separator, "quoting": quoting, "skipinitialspace": True, "strict": True}
    with open(path, encoding="utf-8-sig") as file:
        rows, line = csv.reader(file, **dialect), 1
        try:
            for cells in rows:
                first, line = line, rows.line_num + 1
                cells = [cell.strip() for cell in cells]
                if quoting == csv.QUOTE_NONE and separator != "|":  # some cells may be quoted well
                    cells = [QUOTED.sub(lambda m: m[1].replace('""', '"'), c) for c in cells]
                if any(cells):
                    yield first, cells
        except csv.Error as error:
            remedy = 'quote a field as a whole, and double the quotes in it: "a ""b"" c"'
            raise UserError(f"{path} line {line}: not a csv table: {error}; {remedy}") from error


def choose_quoting(path: Path, separator: str) -> tuple[int, list[str]]:
    """Return how csv is to read the quotes of a table, and notes.

    They may be ordinary characters, as in Common Voice, and always are between bars. A quote that
    opens in one row and closes in another would then take all between them into one cell.
    """
    if separator == "|":
        return csv.QUOTE_NONE, []
    try:
        for line, cells in read_cells(path, separator, csv.QUOTE_MINIMAL):
            swallowing = [cell for cell in cells if "\n" in cell and separator in cell]
            for part in re.split(f'[\n"{separator}]+', "\n".join(swallowing)):
                found = part.strip() and find_audio(part.strip(), path.parent, True)
                if found and (found.suffix.lower() in SOUNDS or os.path.isfile(found)):
                    fault = "a quote that opens in this row takes in the rows after it"
                    raise UserError(f"{path} line {line}: {fault}; double it, or remove it")
        return csv.QUOTE_MINIMAL, []
    except UserError:
        widths = {len(cells) for _, cells in read_cells(path, separator, csv.QUOTE_NONE)}
        if len(widths) > 1 and separator != "\t":
            raise
        return csv.QUOTE_NONE, [f"quotes in {path.name} are read as ordinary characters"]


@contextlib.contextmanager
def readable(name: str):
    """Raise errors about files that are damaged, missing or unlike each other as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).partition("Example of usage")[0].split())[:300]
        remedy = "; set --dataset_config" if "config" in reason.lower() else ""
        raise UserError(f"{name}: cannot be read: {reason}{remedy}") from error


def open_parquet(files: list[str], home: Path, name: str) -> Table:
    """Return the table of parquet files, of which neither a whole file nor many rows are held."""
    from pyarrow.parquet import ParquetFile

    def read(columns):
        with readable(name):
            number = itertools.count()
            for file in files:
                part = ParquetFile(file, pre_buffer=False, buffer_size=2**20)
                for batch in part.iter_batches(64, columns=columns):
                    for row in batch.to_pylist():
                        yield f"{Path(name).name} row {next(number)}", row

    with readable(name):
        parts = [ParquetFile(file) for file in files]
    columns = parts[0].schema_arrow.names
    for file, part in zip(files, parts, strict=True):
        if other := ", ".join(sorted({*part.schema_arrow.names} ^ {*columns})):
            fault = f"its columns differ from those of {Path(files[0]).name}: {other}"
            raise UserError(f"{file}: {fault}; make them the same")
    return Table(name, home, columns, read, sum(part.metadata.num_rows for part in parts), [])
