"""A dataset in any of the accepted forms (data/README.md) → its clips."""

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
    COLUMNS,
    SOUNDS,
    Table,
    column_key,
    find_audio,
    match_columns,
    open_json,
    open_parquet,
    open_text_table,
    readable,
)

TABLES = tuple(f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"))
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes
PAIRED = (".normalized.txt", ".txt", ".lab", ".original.txt")
TOKENS = ("input_ids", "codes", "codes_list", "labels", "attention_mask")


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
    path = Path(settings.dataset)
    if path.is_dir():
        table = open_folder(path, settings)
    elif path.is_file():
        table = open_file(path, settings)
    elif is_hub_id(settings.dataset):
        table = open_with_datasets(settings.dataset, settings, None)
    else:
        message = "no such folder; give one of clips (data/README.md), or a hub id (owner/name)"
        raise UserError(f"{path}: {message}")
    columns = find_columns(table, settings)
    prefixed = find_prefixes(table, columns, settings.voice)
    first, end = find_slice(table, settings)

    def read_row(source: str, row: dict) -> Clip:
        source = printable(source)
        try:
            clip = clip_of_row(source, row, columns, table.home, settings.absolute_paths)
        except ClipError as error:
            return Clip(source, error=error)
        voice, text = split_prefix(clip.text or "") if prefixed else ("", "")
        text = text if voice else remove_voice(clip.text, clip.voice or settings.voice)
        return clip._replace(text=text, voice=voice or clip.voice)

    wanted = [*columns.values(), *(name for name in TOKENS if name in table.columns)]
    rows = itertools.islice(table.read(list(dict.fromkeys(wanted))), first, end)
    count = None if end is None else end - first
    return Clips(itertools.starmap(read_row, rows), count, "; ".join(table.notes) or None)


def split_name(settings: DataSettings) -> str:
    """Return the split's name without rows, as in train[:10]."""
    return settings.dataset_split.partition("[")[0]


def find_slice(table: Table, settings: DataSettings) -> tuple[int, int | None]:
    """Return (first, end) of the rows that `dataset_split`, as in train[:10%], and `limit` name."""
    split, first, end = settings.dataset_split, 0, table.count
    if "[" in split:
        from datasets import ReadInstruction

        try:
            whole = {split_name(settings): 10**9 if end is None else end}
            part = ReadInstruction.from_spec(split).to_absolute(whole)[0]
            first, end = part.from_, None if part.to == 10**9 else part.to
            assert table.count is not None or not re.search("[%-]", split), "its length is unknown"
        except (ValueError, AssertionError) as error:
            fault = f"dataset_split cannot be {split}: {error}; give rows as in train[:100]"
            raise UserError(f"{table.name}: {fault}") from error
    limit = settings.limit or end
    return first, limit and (first + limit if end is None else min(first + limit, end))


def printable(name: str) -> str:
    """Return a file's name, which need not be valid UTF-8, as it can be printed and saved."""
    return name.encode(errors="replace").decode()


# ---------------------------------------------------------------- folders


def open_folder(folder: Path, settings: DataSettings) -> Table:
    """Return the table of a folder: its own, that of a split below it, or its pairs of files."""
    split, config, readme = split_name(settings), settings.dataset_config, folder / "README.md"
    described = readme.is_file() and "\nconfigs:" in readme.read_text("utf-8", "replace")
    if config and not described and (folder / config).is_dir():
        return open_folder(folder / config, settings.replace(dataset_config=None))
    inner = settings.replace(dataset_split=settings.dataset_split.replace(split, "train", 1))
    tables = [name.replace("metadata", split) for name in TABLES]
    for name in (*TABLES, *tables) if split == "train" else tables:
        if (folder / name).is_file():
            return open_file(folder / name, inner)
    saved = any((folder / name).is_file() for name in SAVED)
    for place in () if saved else (folder / split, folder / "data" / split):
        if any((place / name).is_file() for name in (*TABLES, *SAVED)):
            return open_folder(place, inner)
    files = list_files(folder)
    sounds = [path for path in files if path.suffix.lower() in SOUNDS]
    read_well = {".parquet", ".arrow"} if sounds else {".parquet", ".arrow", ".json", ".jsonl"}
    if saved or read_well.intersection(path.suffix.lower() for path in files):
        return open_with_datasets(os.path.abspath(folder), settings, folder)
    if (folder / split).is_dir():
        return open_folder(folder / split, inner)
    if split != "train" or config:
        what = f"configuration {config}" if config else f"split {split}"
        raise UserError(f"{folder}: no {what}: neither a table nor a folder has its name")
    if any(map(find_text, sounds)):
        return open_pairs(folder, sounds)
    fault = "no metadata.csv (or .tsv, .jsonl, .parquet) and no recording with a .txt beside it"
    if tables := [path for path in files if path.suffix.lower() in (".csv", ".tsv", ".list")]:
        raise UserError(f"{folder}: {fault}; if {tables[0]} is its table, give that as --dataset")
    kinds = {path.suffix: path.relative_to(folder) for path in reversed(files)}
    found = ", ".join(f"*{kind} (as {printable(str(kinds[kind]))})" for kind in list(kinds)[:6])
    raise UserError(f"{folder}: {fault}, but {found or 'nothing'}; data/README.md has the corpora")


def list_files(folder: Path) -> list[Path]:
    """Return the files below a folder, but no hidden ones; 9.wav before 10.wav."""
    paths = (Path(home, name) for home, _, names in os.walk(folder) for name in names)
    files = [path for path in paths if not re.search(r"(^|/)\.", str(path.relative_to(folder)))]
    number = re.compile("[0-9]+")
    return sorted(files, key=lambda p: number.sub(lambda m: m[0].zfill(20), str(p.with_suffix(""))))


def find_text(sound: Path) -> Path | None:
    """Return the file of a recording's text, beside it."""
    return next((path for path in map(sound.with_suffix, PAIRED) if path.is_file()), None)


def open_pairs(folder: Path, sounds: list[Path]) -> Table:
    """Return the table of recordings with a text beside each; several folders are the voices."""
    base = os.path.commonpath([path.parent for path in sounds])
    voices = {path: (*path.parent.relative_to(base).parts, None)[0] for path in sounds}
    names = sorted({*voices.values()} - {None})
    notes = [f"the folders are the voices ({', '.join(names[:6])})"] if len(names) > 1 else []

    def read(_):
        for sound in sounds:
            try:
                text = read_text(find_text(sound) or sound.with_suffix(".txt"))
            except UserError as error:
                text = ClipError(str(error), "no text")
            row = {"audio": sound, "text": text, "voice": voices[sound] if notes else None}
            yield str(sound.relative_to(folder)), row

    return Table(folder, folder, ["audio", "text", "voice"], read, len(sounds), notes)


# ---------------------------------------------------------------- files


def open_file(path: Path, settings: DataSettings) -> Table:
    """Return the table of a csv, tsv, JSON, parquet or Arrow file, with paths relative to it."""
    suffix, split = path.suffix.lower(), split_name(settings)
    if suffix in SOUNDS:
        raise UserError(f"{path}: a single audio file; set --dataset to a folder or a table")
    if split != "train" or settings.dataset_config:
        what = settings.dataset_config or f"split {split}"
        raise UserError(f"{path}: one table, which has no {what}; leave that out")
    if suffix in (".json", ".jsonl"):
        return open_json(path)
    if suffix in (".parquet", ".arrow"):
        files = {"train": [str(path)]}
        return open_with_datasets(suffix[1:], settings, path.parent, data_files=files)
    return open_text_table(path, settings)


# ---------------------------------------------------------------- what datasets reads


def open_with_datasets(source: str, settings: DataSettings, home: Path | None, **how) -> Table:
    """Return the table of a folder, a kind of files or a hub dataset, as datasets finds its parts.

    A hub dataset is streamed with `limit`, and otherwise downloaded and read as a folder.
    """
    import datasets
    from huggingface_hub import snapshot_download

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our one line says what it logs
    name, split, config = settings.dataset, split_name(settings), settings.dataset_config
    kind, revision = "Saved", settings.dataset_revision if home is None else None
    with readable(name):
        if home and any((home / file).is_file() for file in SAVED):
            parts = datasets.load_from_disk(source)
            parts = parts if isinstance(parts, dict) else {"train": parts}
        else:
            config = None if how else config
            builder = datasets.load_dataset_builder(source, config, revision=revision, **how)
            parts, kind = builder.config.data_files, type(builder).__mro__[1].__name__
        if split not in parts:
            raise UserError(f"{name}: no split {split}; there are: {', '.join(map(str, parts))}")
        well = kind in ("Parquet", "Json", "Arrow")
        if home is None and (settings.limit is None or not well):
            # hf://datasets/owner/name@commit/data/train-0.parquet
            files = [re.sub("^hf://[^@]*@[^/]*/", "", file) for file in parts[split]]
            wanted = {"allow_patterns": [*files, "README.md"] if well else None}
            folder = snapshot_download(name, repo_type="dataset", revision=revision, **wanted)
            return open_folder(Path(folder), settings)
    if kind == "Parquet" and home:
        return open_parquet(parts[split], home, name)

    def read(_):
        with readable(name):
            saved = kind == "Saved"
            rows = (
                parts[split].with_format(None).to_iterable_dataset()
                if saved
                else builder.as_streaming_dataset(split=split)
            )
            for column, feature in (rows.features or {}).items():
                if isinstance(feature, datasets.Audio):  # soundfile decodes it
                    rows = rows.cast_column(column, datasets.Audio(decode=False))
            for number, row in enumerate(rows):
                yield f"{Path(name).name} row {number}", row

    columns = list(next(read(None), ("", {}))[1])
    return Table(name, home, columns, read, len(parts[split]) if kind == "Saved" else None, [])


# ---------------------------------------------------------------- columns


def find_columns(table: Table, settings: DataSettings) -> dict[str, str]:
    """Return the column of each kind that the table has: text, audio, voice, start, tokens, …

    Raises: `UserError` for a table without a column that it needs.
    """
    found, there = {}, ", ".join(sorted(map(str, table.columns)))
    tokens = next((name for name in TOKENS[:3] if name in table.columns), None)
    needed = {None: ("audio", "text"), "input_ids": ()}.get(tokens, ("text",))
    for kind in COLUMNS:
        chosen = getattr(settings, f"{kind}_column", None)
        same = [name for name in table.columns if column_key(name) == column_key(chosen or "")]
        if names := same if chosen else match_columns(kind, table.columns):
            found[kind] = names[0]
        elif chosen:
            raise UserError(f"{table.name}: no column {chosen}; there are: {there}")
        elif kind in needed:
            fault = f"no column is known to hold the {kind}; there are: {there}"
            raise UserError(f"{table.name}: {fault}; name it with --{kind}_column")
    if column_key(found.get("voice", "voice")) not in ("speaker", "voice", "source"):
        table.notes.append(f"column {found['voice']} has the voices")
    if "start" in found and not tokens and found.keys() & {"end", "duration"}:
        table.notes.append(f"column {found['start']} is where clips begin in their recordings")
    return found | ({"tokens": tokens} if tokens else {})


def split_prefix(text: str) -> tuple[str, str]:
    """Return (voice, rest) of a text such as `tara: one day`, and ("", text) of another."""
    match = re.match(r"\s*([^\s:][^:.,;!?]{0,39}):\s+(?=\S)", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def remove_voice(text: str | None, voice) -> str | None:
    """Return a text without `voice:` before it."""
    name, colon, rest = (text or "").partition(":")
    same = name.strip().lower() == str(voice).strip().lower()
    return rest if colon and voice and same else text


def find_prefixes(table: Table, columns: dict[str, str], voice: str | None) -> bool:
    """Return whether the texts begin with the voices that no column names; adds notes.

    That is so if all of the first thousand texts begin with a name and a colon, and names recur.
    Raises: `UserError` for a table without rows.
    """
    wanted = [columns[kind] for kind in ("text", "voice", "tokens") if kind in columns][:2]
    rows = [row for _, row in itertools.islice(table.read(wanted), 1000 if table.home else 50)]
    if not rows:
        raise UserError(f"{table.name}: no rows in it")
    pairs = [(row.get(columns.get("text")), row.get(columns.get("voice"))) for row in rows]
    pairs = [pair for pair in pairs if isinstance(pair[0], str) and pair[0].strip()]
    names = [split_prefix(text)[0] for text, _ in pairs]
    voices = list(dict.fromkeys(names))
    few = 1 if " " in "".join(voices) else 8  # a few clips may each have a voice of one word
    unnamed = all(names) and not any(named for _, named in pairs)
    if unnamed and 0 < len(voices) <= max(few, len(names) // 2):
        table.notes.append(f"the texts begin with their voices ({', '.join(voices[:6])})")
        return True
    if any(remove_voice(text, named or voice) != text for text, named in pairs):
        table.notes.append("texts begin with their own voice, which is taken off")
    return False


# ---------------------------------------------------------------- a row


def clip_of_row(
    source: str, row: dict, columns: dict[str, str], home: Path | None, absolute_paths: bool
) -> Clip:
    """Return the clip that a row describes. Raises: `ClipError` for one that cannot be used."""
    if None in row:
        raise ClipError("more columns than the header has; put a text with commas in quotes")
    values = {kind: row.get(name) for kind, name in columns.items()}
    text = check_text(values.get("text"), columns.get("text"))
    voice = check_text(values.get("voice"), columns.get("voice"), is_voice=True)
    if "tokens" not in values:
        audio = read_sound(values, home, absolute_paths)
        return Clip(source, audio, text, voice, None, None, *read_segment(values, columns))
    if values["tokens"] is None:
        raise ClipError(f"no {columns['tokens']} in this row")
    return Clip(source, None, text, voice, {name: row[name] for name in TOKENS if name in row})


def check_text(value: Any, column: str | None, is_voice: bool = False) -> str | None:
    """Return a value as text. Raises: `ClipError` for what cannot be spoken."""
    if isinstance(value, ClipError):
        raise value
    if is_voice and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ClipError(f"{column} holds {type(value).__name__}, not text", "no text")
    text = str(value)
    if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in text):
        raise ClipError(f"the {column} holds a control character: {text[:40]!r}", "broken text")
    if text.strip() and not is_voice and not any(map(str.isalnum, text)):
        fault = f"nothing to speak in the text {text.strip()[:20]!r}: no letter or digit"
        raise ClipError(fault, "nothing to speak")
    return text


def read_sound(values: dict, home: Path | None, absolute_paths: bool) -> Path | bytes | None:
    """Return a row's audio: a path, or the bytes of a file, which samples are made into."""
    audio, rate = values.get("audio"), values.get("rate")
    if isinstance(audio, dict):
        rate = audio.get("sampling_rate", rate)
        kinds = [audio[kind] for kind in ("array", "bytes", "path") if audio.get(kind) is not None]
        audio = kinds[0] if kinds else None
    if isinstance(audio, str) and audio:
        return find_audio(audio, home, absolute_paths)
    if not isinstance(audio, list | np.ndarray):
        return audio if isinstance(audio, Path | bytes) else None
    if not rate:
        raise ClipError("samples without their rate; add a column sampling_rate", "no sound")
    return pack_samples(audio, rate)


def read_segment(values: dict, columns: dict[str, str]) -> tuple[float, float | None]:
    """Return (start, duration) in seconds of the part of a recording that a row names."""
    times = {kind: values.get(kind) for kind in ("start", "end", "duration")}
    times = {kind: value for kind, value in times.items() if value not in (None, "")}
    if "start" not in times or len(times) == 1:
        return 0.0, None
    try:
        for kind, value in times.items():  # 62.5 or 1:02.5
            seconds = sum(60**n * float(s) for n, s in enumerate(str(value).split(":")[::-1]))
            times[kind] = seconds / (1000 if columns[kind].lower().endswith("ms") else 1)
    except ValueError as error:
        raise ClipError(f"{columns[kind]} is {value!r}, not seconds") from error
    start = times["start"]
    duration = times["end"] - start if "end" in times else times["duration"]
    if not (start >= 0 and 0 < duration < math.inf):
        raise ClipError(f"no segment of {duration:g} s at {start:g} s: end comes before start")
    return start, duration
