"""Clips and their texts → checked rows of ids for the trainer, and a report of what went in.

    python data/prepare.py --dataset my_voice            # report on a folder, no training
    python data/prepare.py --config data/demo/config.json

Takes the same --config and keys as finetune.py. The accepted forms are in data/README.md.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import infer
from infer import Mistake, Settings

# ---------------------------------------------------------------- clips

TEXT_COLUMNS = ("text", "sentence", "transcription", "normalized_text")
VOICE_COLUMNS = ("speaker", "source", "voice")


class Clip(NamedTuple):
    """One clip as its dataset tells of it; nothing is decoded yet."""

    where: str  # file and row, for people
    audio: Path | bytes | None
    text: str | None
    voice: str | None


def read_clips(settings: Settings) -> Iterable[Clip]:
    """The first `limit` clips of a folder or hub dataset. Faults of the whole are told here."""
    folder = Path(settings.dataset)
    if folder.is_dir():
        clips = read_folder(folder)
    elif (
        folder.exists()
        or settings.dataset.startswith((".", "/", "~"))
        or settings.dataset.count("/") > 1
    ):
        raise Mistake(f"{folder}: no such folder of clips; set --dataset to one (data/README.md)")
    else:
        return read_hub(settings)
    return clips[: settings.limit]


def read_folder(folder: Path) -> list[Clip]:
    """Clips of a folder in AudioFolder form: metadata.csv or .jsonl with file_name and text."""
    metadata = next(
        (p for p in (folder / "metadata.csv", folder / "metadata.jsonl") if p.is_file()), None
    )
    if metadata is None:
        raise Mistake(
            f"{folder}: no metadata.csv or metadata.jsonl in it (data/README.md has the form)"
        )
    rows = read_table(metadata)
    if not rows:
        raise Mistake(f"{metadata}: no rows in it")
    columns = {name for _, row in rows for name in row}
    text = find_column(columns, TEXT_COLUMNS, str(metadata))
    find_column(columns, ("file_name",), str(metadata))
    voice = next((name for name in VOICE_COLUMNS if name in columns), None)
    return [
        Clip(
            f"{metadata} row {n}",
            folder / name if (name := row.get("file_name")) else None,
            row.get(text),
            row.get(voice),
        )
        for n, row in rows
    ]


def read_table(metadata: Path) -> list[tuple[int, dict]]:
    """(row number as an editor or a spreadsheet shows it, columns) of a csv or jsonl file."""
    text = infer.read_text(metadata)
    if metadata.suffix == ".csv":
        return list(enumerate(csv.DictReader(text.splitlines(keepends=True)), 2))
    rows = []
    for n, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise Mistake(f"{metadata} row {n}: not JSON: {error}") from None
        if isinstance(row, dict):
            rows.append((n, row))
        elif row is not None:
            raise Mistake(f"{metadata} row {n}: must be one JSON object")
    return rows


def find_column(columns: Iterable[str], names: tuple[str, ...], where: str) -> str:
    """The first of `names` among the columns."""
    for name in names:
        if name in columns:
            return name
    there = ", ".join(sorted(str(column) for column in columns))
    raise Mistake(f"{where}: no column {' or '.join(names)}; there are: {there}")


def read_hub(settings: Settings) -> Iterable[Clip]:
    """Clips of a hub dataset with an audio and a text column, its audio left undecoded."""
    from datasets import Audio, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    where = settings.dataset
    try:
        table = load_dataset(where, settings.dataset_config, split=settings.dataset_split)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Mistake(f"{where}: no such folder here, and the hub's gives: {reason}") from None
    text = find_column(table.column_names, TEXT_COLUMNS, where)
    audio = find_column(table.column_names, ("audio",), where)
    voice = next((name for name in VOICE_COLUMNS if name in table.column_names), None)
    table = table.select(range(min(len(table), settings.limit or len(table))))
    table = table.cast_column(audio, Audio(decode=False))
    for n, row in enumerate(table):
        sound = row[audio]["bytes"] or Path(row[audio]["path"])
        yield Clip(f"{where} row {n}", sound, row[text], row[voice] if voice else None)


# ---------------------------------------------------------------- rows


@dataclass
class Report:
    """What went into the rows, and what was left out and why. Saved beside the adapter."""

    dataset: str
    clips: int = 0
    seconds: float = 0.0  # of audio in the rows
    characters: int = 0  # of text in the rows
    rows: int = 0
    tokens: int = 0  # in the rows, prompts included
    longest: int = 0  # tokens in the longest row that was kept
    digest: str = ""  # SHA-256 over the rows' ids and labels, in order
    voices: dict[str, int] = field(default_factory=dict)  # clips by voice name
    dropped: list[str] = field(default_factory=list)  # over max_length
    truncated: list[str] = field(default_factory=list)  # cut to max_length
    left_out: list[str] = field(default_factory=list)  # faulty

    def tell(self, max_length: int) -> None:
        voices = ", ".join(f"{name} {n}" for name, n in self.voices.items()) or "none named"
        made = f"{self.rows} of {self.clips} clips, {self.seconds / 3600:.3f} hours"
        print(f"data    {self.dataset}: {made}; voices: {voices}")
        longest = f"the longest {self.longest:,} of max_length {max_length:,}"
        print(f"rows    {self.tokens:,} tokens, {longest}")
        for title in ("dropped", "truncated", "left_out"):
            if faults := getattr(self, title):
                print(f"        {title}: {len(faults)}")
                for fault in faults[:5]:
                    print(f"          {fault}")
                if len(faults) > 5:
                    print(f"          … and {len(faults) - 5} more, in {infer.SAVED_REPORT}")

    def save(self, path: Path) -> None:
        infer.write_text(path, json.dumps(vars(self), indent=2, ensure_ascii=False) + "\n")


def make_row(
    prompt: list[int], codes: np.ndarray, ids: infer.SpeechIds, settings: Settings
) -> dict:
    """input_ids: prompt, audio, EOS, EOA; labels: the same, −100 where there is no loss.

    `too_long` "truncate" cuts at a frame's edge and leaves the ends off: none learns to stop early.
    """
    ends = [ids.eos, ids.eoa]
    room = (settings.max_length - len(prompt) - len(ends)) // infer.SLOTS  # frames
    if len(codes) > room and settings.too_long == "truncate":
        codes, ends = codes[: (settings.max_length - len(prompt)) // infer.SLOTS], []
    input_ids = np.concatenate([prompt, infer.codes_to_ids(codes, ids), ends]).astype(np.int64)
    labels = input_ids.copy()
    if settings.train_on == "audio":
        labels[: len(prompt)] = -100
    return {"input_ids": input_ids, "labels": labels}


def make_rows(
    clips: Iterable[Clip], settings: Settings, tokenizer, codec
) -> tuple[list[dict], Report]:
    """Rows (input_ids, labels, text) and the report. A faulty clip is left out and named."""
    from tqdm import tqdm

    ids = infer.read_speech_ids(tokenizer, codec.codebook_size)
    report, rows, digest = Report(settings.dataset), [], hashlib.sha256()
    for clip in tqdm(clips, desc="encoding", unit="clip", disable=None):
        report.clips += 1
        try:
            voice = clip.voice or settings.voice
            prompt = infer.prompt_ids(tokenizer, ids, clip.text or "", voice)
            if not clip.audio:
                raise Mistake("no file_name, or no audio")
            audio = infer.read_audio(clip.audio)
        except Mistake as mistake:
            report.left_out.append(f"{clip.where}: {mistake}")
            continue
        codes = infer.encode(codec, [audio])[0]
        row = make_row(prompt, codes, ids, settings) | {"text": " ".join(clip.text.split())}
        length = len(row["input_ids"])
        kept = (length - len(prompt)) // infer.SLOTS  # frames
        fault = f"{clip.where}: {len(prompt) + codes.size + 2} tokens, "
        fault += f"{len(audio) / infer.SAMPLE_RATE:.1f} s"
        if length > settings.max_length or not kept:
            report.dropped.append(fault)
            continue
        if kept < len(codes):
            report.truncated.append(fault)
        rows.append(row)
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
        report.rows += 1
        report.seconds += min(len(audio), kept * infer.FRAME_SAMPLES) / infer.SAMPLE_RATE
        report.characters += len(clip.text)
        report.tokens += length
        report.longest = max(report.longest, length)
        if voice:
            report.voices[voice] = report.voices.get(voice, 0) + 1
    if not rows:
        first = (report.left_out + report.dropped + ["no clips"])[0]
        none = f"{settings.dataset}: no rows left of {report.clips} clips"
        raise Mistake(f"{none}; the first: {first}")
    report.digest = digest.hexdigest()
    return rows, report


# ---------------------------------------------------------------- command line


def main() -> None:
    settings = infer.read_command_line(__doc__)
    clips = read_clips(settings)
    tokenizer = infer.load_tokenizer(infer.fetch(settings.model, infer.TOKENIZER_FILES))
    codec = infer.load_codec(settings.codec)
    _, report = make_rows(clips, settings, tokenizer, codec)
    report.tell(settings.max_length)


if __name__ == "__main__":
    infer.run(main)
