"""Files of csv, JSON, and what datasets reads → tables: rows of values by column."""

import contextlib
import csv
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from orpheus.audio import NEED_FFMPEG, ClipError
from orpheus.settings import DataSettings, UserError, read_text

TABLES = tuple(f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"))
LOOSE = {"FolderBasedBuilder", "Csv"}  # of datasets: AudioFolder wants torchcodec
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", *NEED_FFMPEG)
SOUND_FOLDERS = ("", "wavs", "wav", "audio", "audios", "clips")
# What columns hold, by their names in lower case without signs; earlier patterns are preferred.
UNIT = "(time|at)?(s|sec|secs|seconds|ms)?"
COLUMNS = {
    "audio": (
        *("audio", "filename", "path", "audiopath"),
        "(audio|wav|sound|clip|recording|speech)(file)?s?(name|path)?|file(path)?",
        "(audio)?(array|samples|waveform|values)|inputvalues",
        "id|utt(erance)?id|key",
    ),
    "text": (
        *("text", "sentence", "transcription", "normalizedtext", "transcripts?"),
        "(text|transcript(ion)?)?normali[sz]ed(text|sentence|transcript(ion)?)?",
        "(raw|original|spoken)text|text(raw|original)|utterance|caption|words",
    ),
    "voice": (
        *("speaker", "voice", "(speaker|spk|spkr|voice|narrator|reader)name"),
        "(speaker|spk|spkr|voice|client|narrator|reader|talker|actor|singer)s?"
        "(id|no|num|number|label|code|key|index|idx)?s?",
        "source",
    ),
    "start": (f"(segment|audio|clip)?(start|begin|offset){UNIT}",),
    "end": (f"(segment|audio|clip)?(end|stop){UNIT}",),
    "duration": (f"(segment|audio|clip)?(duration|dur){UNIT}",),
    "rate": ("(audio)?(sampl(e|ing))?(rate|freq|frequency)(hz)?|sr|fs",),
}
QUOTED = re.compile('^"((?:[^"]|"")*)"$')


@dataclass
class Table:
    """A dataset as rows of values, which can be read again and again."""

    name: str | Path  # for messages
    home: Path | None  # folder of the recordings, if it is local
    columns: list[str]
    read: Callable[[list[str]], Iterator[tuple[str, dict]]]  # columns → (source, row)
    count: int | None = None
    notes: list[str] = field(default_factory=list)  # what was not obvious


def split_name(settings: DataSettings) -> str:
    """Return the split's name without rows, as in train[:10]."""
    return settings.dataset_split.partition("[")[0]


def printable(name: str) -> str:
    """Return a file's name, which need not be valid UTF-8, as it can be printed and saved."""
    return name.encode(errors="replace").decode()


def shorten(names: list[str]) -> str:
    """Return the first five of some names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more


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
    for form in ("NFC", "NFD"):  # macOS writes é as two characters, others as one
        file = unicodedata.normalize(form, str(path))
        if os.path.isfile(home / file):
            return home / file
        stem, ending = os.path.splitext(file)
        stems = [file, stem] if ending.lower() in SOUNDS else [file]
        endings = ["", *SOUNDS, *map(str.upper, SOUNDS)]
        for place in filter(os.path.isdir, (home / name for name in SOUND_FOLDERS)):
            for found in (f"{place}/{stem}{ending}" for stem in stems for ending in endings):
                if os.path.isfile(found):
                    return Path(found)
    return home / path


def open_file(path: Path, settings: DataSettings) -> Table:
    """Return the table of a csv, tsv, JSON, parquet or Arrow file, with paths relative to it."""
    suffix, split = path.suffix.lower(), split_name(settings)
    if suffix in SOUNDS:
        remedy = "set --dataset to a folder or a table (data/README.md)"
        raise UserError(f"{path}: a single audio file; {remedy}")
    if split != "train" or settings.dataset_config:
        what = settings.dataset_config or f"split {split}"
        raise UserError(f"{path}: one table, which has no {what}; leave that out")
    if suffix in (".json", ".jsonl"):
        return open_json(path)
    if suffix in (".parquet", ".arrow"):
        files = {"train": [str(path)]}
        return open_with_datasets(suffix[1:], settings, path.parent, data_files=files)
    return open_text_table(path, settings)


def open_json(path: Path) -> Table:
    """Return the table of a file with a JSON object on each line, or with a list of them.

    The json builder of datasets takes texts that look like dates for dates, quotes those of a list
    with a number among them, and fails where a column is empty in the first 10 MB.
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

    columns, count = {}, 0
    for _, row in read(None):
        columns, count = columns | dict.fromkeys(row), count + 1
    return Table(path, path.parent, list(columns), read, count)


def column_key(name: str) -> str:
    """Return a column's name as it is compared: File Name and file-name are filename."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def match_columns(kind: str, names: list[str]) -> list[str]:
    """Return the columns that hold `kind` by their names, the preferred one first."""
    patterns = COLUMNS[kind]
    return [name for p in patterns for name in names if re.fullmatch(p, column_key(name))]


def open_text_table(path: Path, settings: DataSettings) -> Table:
    """Return the table of lines with commas, semicolons, tabs or bars, with a header or LJSpeech's.

    The separator is the one that splits the first line into the most columns with known names.
    """
    text = read_text(path)
    header = text.lstrip("\n").partition("\n")[0]
    chosen = (settings.audio_column, settings.text_column, settings.voice_column)
    chosen = {column_key(name) for name in chosen if name}

    def count_known(separator: str) -> tuple[int, int]:
        names = [cell.strip('" ') for cell in header.split(separator)]
        known = {name for kind in COLUMNS for name in match_columns(kind, names)}
        known |= {name for name in names if column_key(name) in chosen}
        return len(known), len(names)

    separator = max(",;\t|", key=count_known)
    least = 2 if "|" in header else 1  # a text of LJSpeech's first row may be a known name
    if count_known(separator)[0] < least:
        if "|" in header:
            return open_ljspeech(path, settings)
        remedy = "add one such as file_name,text, or set --audio_column and --text_column"
        fault = f"the first line is no header with known columns ({header[:80].strip()})"
        raise UserError(f"{path}: {fault}; {remedy}" if header else f"{path}: no rows in it")
    quoting, notes = choose_quoting(path, separator)
    columns = next(read_cells(path, separator, quoting))[1]
    keys = Counter(column_key(name) for name in columns if name)
    if twice := [name for name, times in keys.items() if times > 1]:
        raise UserError(f"{path}: two columns are named {twice[0]}; rename one of them")
    return table_of_cells(path, separator, quoting, columns, notes)


def table_of_cells(path: Path, separator: str, quoting: int, columns: list, notes: list) -> Table:
    """Return the table of a file with these columns; surplus cells of a row are under None."""

    def read(_):
        for line, cells in read_cells(path, separator, quoting):
            row = dict(zip(columns, cells, strict=False))
            if any(cells[len(columns) :]):
                row[None] = cells[len(columns) :]
            if "normalized_text" in columns and not row.get("normalized_text"):
                row["normalized_text"] = row.get("text")
            if cells != columns:  # the header
                yield f"{path.name} row {line}", row

    return Table(path, path.parent, columns, read, sum(1 for _ in read(None)), notes)


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
            if any(holds_row(cell, separator, path.parent) for cell in cells):
                fault = "a quote that opens in this row takes in the rows after it"
                raise UserError(f"{path} line {line}: {fault}; double it, or remove it")
        return csv.QUOTE_MINIMAL, []
    except UserError:
        widths = {len(cells) for _, cells in read_cells(path, separator, csv.QUOTE_NONE)}
        if len(widths) > 1 and separator != "\t":
            raise
        return csv.QUOTE_NONE, [f"quotes in {path.name} are read as ordinary characters"]


def holds_row(cell: str, separator: str, home: Path) -> bool:
    """Return whether a cell of several lines has a recording's name between separators."""
    lines = [line.split(separator) for line in cell.split("\n") if separator in line]
    parts = [part.strip('" ') for line in lines for part in line] if "\n" in cell else []
    return any(
        part.lower().endswith(SOUNDS) or os.path.isfile(find_audio(part, home, True))
        for part in parts
    )


def open_ljspeech(path: Path, settings: DataSettings) -> Table:
    """Return the table of `id|text` or `id|text|normalized text`, or of GPT-SoVITS's lists.

    A third column is the normalized text if it resembles the second. It could also be a voice.
    """
    widths = Counter(len(cells) for _, cells in read_cells(path, "|", csv.QUOTE_NONE))
    width = widths.most_common(1)[0][0]
    rows = (cells for _, cells in read_cells(path, "|", csv.QUOTE_NONE))
    rows = list(itertools.islice((row for row in rows if len(row) == width and row[-1]), 200))
    if width == 4 and all(re.fullmatch("[A-Za-z]{2,3}", row[2]) for row in rows):
        columns = ["file_name", "voice", "language", "text"]
        notes = [f"{path.name} has no header: read as {'|'.join(columns)}"]
        return table_of_cells(path, "|", csv.QUOTE_NONE, columns, notes)
    remedy = "add a header line such as file_name|text|voice"
    if width > 3:
        raise UserError(f"{path}: {width} columns and no header to name them; {remedy}")
    columns, used = ["file_name", "text", "normalized_text"][:width], "text"
    table = table_of_cells(path, "|", csv.QUOTE_NONE, columns, [])
    if rows and width == 3:
        pairs = [(row[1].lower(), row[2].lower()) for row in rows]
        likeness = np.mean([SequenceMatcher(None, *p, autojunk=False).ratio() for p in pairs])
        if settings.text_column is None and likeness < 0.5:
            fault = "the third column does not resemble the second, so it may be voices or texts"
            remedy += "; a dataset takes --text_column text (the second) or normalized_text"
            raise UserError(f"{path}: {fault}; {remedy}")
        used = settings.text_column or "normalized_text"
        place = {"text": "second", "normalized_text": "third"}.get(used, "no")
        table.notes.append(f"{path.name} has no header; its {place} column holds the texts")
    table.columns = ["file_name", used]
    return table


# ---------------------------------------------------------------- what datasets reads


@contextlib.contextmanager
def readable(name: str):
    """Raise errors of datasets about files that are damaged, missing or unlike as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).partition("Example of usage")[0].strip().splitlines() or [repr(error)]
        reason = " ".join(dict.fromkeys([lines[0], lines[-1]]))[:300]
        remedy = "; set --dataset_config" if "config" in reason.lower() else ""
        raise UserError(f"{name}: cannot be read: {reason}{remedy}") from error


def open_with_datasets(source: str, settings: DataSettings, home: Path | None, **how) -> Table:
    """Return the table of a folder, of a kind of files, or of a hub dataset that is streamed."""
    from datasets import load_dataset_builder, load_from_disk, logging

    logging.set_verbosity(logging.CRITICAL)  # our one line says what it logs
    name, split, config = settings.dataset, split_name(settings), settings.dataset_config
    builder = None
    with readable(name):
        if any(Path(source, file).is_file() for file in SAVED):
            parts = load_from_disk(source)
            parts = parts if isinstance(parts, dict) else {"train": parts}
        else:
            builder = load_dataset_builder(source, None if "data_files" in how else config, **how)
            parts = builder.config.data_files
    if split not in parts:
        raise UserError(f"{name}: no split {split}; there are: {', '.join(map(str, parts))}")
    if builder:
        return open_builder(builder, settings, home)
    saved = parts[split].with_format(None)

    def stream(columns):
        return saved.select_columns(columns or saved.column_names).to_iterable_dataset()

    return table_of_stream(stream, name, home, len(saved))


def builder_kinds(builder) -> set[str]:
    """Return the names of the classes of a builder of datasets."""
    return {kind.__name__ for kind in type(builder).__mro__}


def open_builder(builder, settings: DataSettings, home: Path | None) -> Table:
    """Return the table of the rows that a builder of datasets streams."""
    from pyarrow.dataset import ParquetFragmentScanOptions
    from pyarrow.parquet import read_metadata

    split, features, count, notes = split_name(settings), builder.info.features, None, []
    files, is_parquet = builder.config.data_files[split], "Parquet" in builder_kinds(builder)
    if builder_kinds(builder) & LOOSE:
        tables = [file for file in files if Path(file).name in TABLES or file.endswith(".csv")]
        if len(tables) != 1:
            raise UserError(f"{settings.dataset}: give one of its tables as --dataset")
        inner = settings.replace(dataset_config=None, dataset_split="train")
        return open_file(Path(tables[0]), inner)
    if home and is_parquet:
        with readable(settings.dataset):
            parts = {file: read_metadata(file) for file in files}
        count = sum(part.num_rows for part in parts.values())
        names = {file: {*part.schema.to_arrow_schema().names} for file, part in parts.items()}
        for file in files:
            if other := ", ".join(sorted(names[file] ^ names[files[0]])):
                fault = f"its columns differ from those of {Path(files[0]).name}: {other}"
                raise UserError(f"{file}: {fault}; make them the same")

        places = sorted({os.path.relpath(os.path.dirname(file), home) for file in files})
        if len(places) > 1:
            notes = [f"the folders {shorten(places)} are read together"]

    def stream(columns):
        builder.info.features = features
        if is_parquet:  # which then reads these alone, and holds neither many rows nor a whole file
            builder.config.columns, builder.config.batch_size = columns, 64
            how = {"pre_buffer": False, "use_buffered_stream": True, "buffer_size": 2**20}
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(**how)
        dataset = builder.as_streaming_dataset(split=split)
        return dataset.select_columns(columns) if columns else dataset

    table = table_of_stream(stream, settings.dataset, home, count)
    table.notes += notes
    return table


def table_of_stream(stream: Callable, name: str, home: Path | None, count: int | None) -> Table:
    """Return the table of the IterableDatasets that `stream` gives for some columns or for None."""
    from datasets import Audio

    def read(columns):
        with readable(name):
            dataset = stream(columns)
            for column, feature in (dataset.features or {}).items():
                if isinstance(feature, Audio):  # soundfile decodes it; datasets wants torchcodec
                    dataset = dataset.cast_column(column, Audio(decode=False))
            for number, row in enumerate(dataset):
                yield f"{Path(name).name} row {number}", row

    with readable(name):
        columns = stream(None).column_names
    return Table(name, home, columns or list(next(read(None), ("", {}))[1]), read, count)
