"""Tables of text, csv, tsv, LJSpeech's and JSON lines → rows by column."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from orpheus.settings import Settings, UserError

AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_path")
TEXT_COLUMNS = ("text", "sentence", "transcription", "normalized_text")
VOICE_COLUMNS = ("speaker", "voice", "source")
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "codes", "codes_list")
LJSPEECH_COLUMNS = ("file_name", "text", "normalized_text")


def read_json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """(line number, row) of JSON lines."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: must be one JSON object")
        yield number, row


def column_key(name: str) -> str:
    """A column's name as it is compared: `File Name` is file_name."""
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def read_table(path: Path, text: str, settings: Settings) -> tuple[list, str | None]:
    """Rows separated by commas, semicolons, tabs or vertical bars, with a header or LJSpeech's.

    The separator is the one that splits the first line into the most columns with known names.
    Returns (line number, row) pairs, and a note for the report.
    """
    if "\0" in text:
        raise UserError(f"{path}: holds NUL bytes, as UTF-16 does; save it as UTF-8")
    header = text.lstrip("\n").split("\n", 1)[0]
    chosen = filter(None, (settings.audio_column, settings.text_column, settings.voice_column))
    known = (*AUDIO_COLUMNS, *TEXT_COLUMNS, *VOICE_COLUMNS, *TOKEN_COLUMNS, *chosen)
    known = {column_key(name) for name in known}

    def count_known(separator: str) -> tuple[int, int]:
        names = [column_key(cell.strip('" ')) for cell in header.split(separator)]
        return len(known.intersection(names)), len(names)

    separator = max(",;\t|", key=count_known)
    least = 2 if "|" in header else 1  # a text of LJSpeech's first row may be a known name
    if count_known(separator)[0] >= least:
        return list(read_csv_rows(path, text, separator)), None
    if "|" in header:
        return read_ljspeech(path, text, settings)
    if not text.strip():
        return [], None
    remedy = "add one such as file_name,text (data/README.md)"
    columns = ", ".join(cell.strip() for cell in header.split(separator))[:80]
    raise UserError(f"{path}: the first line is no header with known columns ({columns}); {remedy}")


def read_ljspeech(path: Path, text: str, settings: Settings) -> tuple[list, str | None]:
    """Rows of `id|text` or `id|text|normalized text` without a header, and a note.

    A third column is the normalized text if it resembles the second. It could also be a voice.
    """
    widths = Counter(line.count("|") + 1 for line in text.split("\n") if line.strip())
    width = widths.most_common(1)[0][0]
    remedy = "add a header line such as file_name|text|voice"
    if width > len(LJSPEECH_COLUMNS):
        raise UserError(f"{path}: {width} columns and no header to name them; {remedy}")
    rows = list(read_csv_rows(path, text, "|", LJSPEECH_COLUMNS[:width]))
    pairs = [(r["text"], r["normalized_text"]) for _, r in rows if "normalized_text" in r]
    if not any(normalized for _, normalized in pairs):
        return rows, None
    chosen = settings.text_column
    if chosen is None:
        pairs = [(a.lower(), b.lower()) for a, b in pairs[:200]]
        ratios = [SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs]
        if np.mean(ratios) < 0.5:
            fault = "the third column does not resemble the second, so it may be voices or texts"
            remedy += "; a dataset takes --text_column text (the second) or normalized_text"
            raise UserError(f"{path}: {fault}; {remedy}")
        chosen = "normalized_text"
        rows = [(n, {k: row[k] for k in row if k != "text"}) for n, row in rows]
    place = {"text": "second", "normalized_text": "third"}.get(chosen)
    return rows, place and f"{path.name} has no header; its {place} column holds the texts"


def read_csv_rows(
    path: Path, text: str, separator: str, columns: tuple[str, ...] | None = None
) -> Iterator[tuple[int, dict]]:
    """Yields (line on which a row begins, row). Without `columns`, the first line names them.

    A row has its surplus cells under the key None. Between bars, quotes are ordinary characters.
    """
    padded = columns is not None or f"{separator} " in text.lstrip("\n").split("\n", 1)[0]
    table = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL,
        skipinitialspace=padded,
        strict=True,
    )
    line = 1
    try:
        for cells in table:
            first, line = line, table.line_num + 1
            cells = [cell.strip() for cell in cells] if padded else cells
            if cells in ([], [""]):
                continue
            if columns is None:
                columns = cells
                check_header(path, columns)
                continue
            surplus = {None: cells[len(columns) :]} if len(cells) > len(columns) else {}
            yield first, dict(zip(columns, cells, strict=False)) | surplus
    except csv.Error as error:
        remedy = 'quote a field as a whole, and double the quotes in it: "a ""b"" c"'
        raise UserError(f"{path} line {line}: not a csv table: {error}; {remedy}") from None


def check_header(path: Path, columns: list[str]) -> None:
    """`UserError` for two columns of the same name."""
    names = [column_key(name) for name in columns if name.strip()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two columns are named {twice}; rename one of them")


def find_columns(table: Path, columns: list, settings: Settings) -> dict[str, str]:
    """Which of the columns have the `text`, the `audio`, the `voice` and the `tokens`, if any do.

    Raises `UserError` for a table without a column that it needs.
    """
    found, keys = {}, {column_key(name) for name in columns}
    names = ("input_ids", "codes", "codes_list")
    tokens = next((name for name in names if name in columns), None)
    if tokens != "input_ids" or settings.text_column or not keys.isdisjoint(TEXT_COLUMNS):
        found["text"] = find_column(columns, settings.text_column, TEXT_COLUMNS, table)
    if tokens is None:
        found["audio"] = find_column(columns, settings.audio_column, AUDIO_COLUMNS, table)
    voice = settings.voice_column
    if voice or not keys.isdisjoint(VOICE_COLUMNS):
        found["voice"] = find_column(columns, voice, VOICE_COLUMNS, table)
    return found | ({"tokens": tokens} if tokens else {})


def find_column(columns, wanted: str | None, names: tuple[str, ...], table: Path) -> str:
    """The column that a key names, or the first of the conventional names that is there."""
    keys = {column_key(name): name for name in columns}
    for name in (wanted,) if wanted else names:
        if name in columns:
            return name
        if column_key(name) in keys:
            return keys[column_key(name)]
    there = ", ".join(sorted(map(str, columns)))
    raise UserError(f"{table}: no column {wanted or ' or '.join(names)}; there are: {there}")
