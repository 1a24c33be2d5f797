"""Folders of clips for tests, and the rows that are made of them."""

import csv

import numpy as np
import soundfile

from orpheus.clips import read_clips
from orpheus.rows import make_rows
from orpheus.settings import read_settings


def settings(folder, **overrides):
    """Settings of the demo for a folder, without a cache or held-out rows."""
    keys = {"dataset": folder, "cache_dir": "null", "held_out": 0, **overrides}
    return read_settings("data/demo/config.json", {k: str(v) for k, v in keys.items()})


def noise(path, seconds=0.5, rate=24_000, channels=1, seed=0, **how):
    """A file of noise, another for every seed."""
    audio = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    soundfile.write(path, audio, rate, **how)
    return path


def folder_of(path, rows, header=("file_name", "text", "speaker")):
    path.mkdir(exist_ok=True)
    with open(path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def two_clips(folder, names=("a.wav", "b.wav")):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        noise(folder / name, seed=seed)


def rows_of(folder, tokenizer, **overrides):
    """(rows, report) of a dataset, every row in its order."""
    chosen = settings(folder, **overrides)
    rows, held_out, report = make_rows(read_clips(chosen), chosen, tokenizer)
    assert not held_out
    return rows, report


def texts_of(folder, tokenizer, **overrides):
    return [row["text"] for row in rows_of(folder, tokenizer, **overrides)[0]]


def same(rows, others):
    return all(
        row.keys() == other.keys() and all(np.array_equal(row[k], other[k]) for k in row)
        for row, other in zip(rows, others, strict=True)
    )


def parquet_with_bytes(folder):
    import datasets

    two_clips(folder)
    sounds = [{"bytes": (folder / n).read_bytes(), "path": n} for n in ("a.wav", "b.wav")]
    rows = {"audio": sounds, "transcription": ["one", 'two, "three" four'], "speaker": ["x", "y"]}
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    (folder / "data").mkdir()
    table.to_parquet(folder / "data/train-00000-of-00001.parquet")
