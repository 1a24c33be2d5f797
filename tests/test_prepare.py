"""data/prepare.py: the accepted forms, rows, what is left out, and a person's mistakes."""

import csv
import json
import re

import numpy as np
import pytest
import soundfile
from conftest import one_line, script

import infer
from data import prepare


def settings(folder, **overrides):
    return infer.read_settings(
        "data/demo/config.json",
        {"dataset": str(folder), **{k: str(v) for k, v in overrides.items()}},
    )


def noise(path, seconds=0.5, rate=24_000, channels=1, **how):
    """A file of soft noise; its samples as mono float32."""
    audio = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels))
    soundfile.write(path, audio, rate, **how)
    return path


def folder_of(path, rows, header=("file_name", "text", "speaker")):
    path.mkdir(exist_ok=True)
    with open(path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_of(folder, tokenizer, codec, **overrides):
    chosen = settings(folder, **overrides)
    return prepare.make_rows(prepare.read_clips(chosen), chosen, tokenizer, codec)


def test_every_row_starts_with_the_prompt_that_infer_builds(tokenizer, codec, ids):
    rows, report = rows_of("data/numbers", tokenizer, codec, limit=20)
    clips = prepare.read_clips(settings("data/numbers", limit=20))
    assert len(rows) == report.rows == 20 and report.voices == {"slt": 20}
    for row, clip in zip(rows, clips, strict=True):
        prompt = infer.prompt_ids(tokenizer, ids, clip.text, clip.voice)
        audio = infer.read_audio(clip.audio)
        n, frames = len(prompt), -(-len(audio) // infer.FRAME_SAMPLES)
        assert row["input_ids"][:n].tolist() == prompt
        assert row["input_ids"][n + 7 * frames :].tolist() == [ids.eos, ids.eoa]
        codes = infer.ids_to_codes(row["input_ids"][n : n + 7 * frames], ids)
        assert (codes == infer.encode(codec, [audio])[0]).all()
        assert (row["labels"][:n] == -100).all()
        assert (row["labels"][n:] == row["input_ids"][n:]).all()


def test_train_on_all_has_no_masked_label(tokenizer, codec):
    rows, _ = rows_of("data/numbers", tokenizer, codec, limit=2, train_on="all")
    assert all((row["labels"] == row["input_ids"]).all() for row in rows)


def test_kinds_of_sound_files(tmp_path, tokenizer, codec):
    noise(tmp_path / "a.wav", rate=44_100, channels=2)
    noise(tmp_path / "b.flac", rate=16_000)
    noise(tmp_path / "c.mp3", rate=22_050)
    noise(tmp_path / "d.ogg", rate=48_000, format="OGG", subtype="VORBIS")
    noise(tmp_path / "e.opus", rate=48_000, format="OGG", subtype="OPUS")
    folder_of(
        tmp_path, [(f"{n}", "seven", "") for n in ("a.wav", "b.flac", "c.mp3", "d.ogg", "e.opus")]
    )
    rows, report = rows_of(tmp_path, tokenizer, codec, voice="me")
    assert report.left_out == [] and report.voices == {"me": 5}
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) - min(lengths) <= 7  # an encoder may pad by some milliseconds


def test_jsonl_and_rows_without_voice(tmp_path, tokenizer, codec, ids):
    noise(tmp_path / "a.wav")
    row = {"file_name": "a.wav", "text": "sieben"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    rows, report = rows_of(tmp_path, tokenizer, codec)
    assert len(rows) == 2 and report.voices == {}
    prompt = infer.prompt_ids(tokenizer, ids, "sieben", None)
    assert rows[0]["input_ids"][: len(prompt)].tolist() == prompt


def test_a_hub_dataset(tmp_path, monkeypatch, tokenizer, codec):
    """load_dataset reads a local parquet as the hub gives it: bytes in an audio column."""
    import datasets

    sound = noise(tmp_path / "a.wav").read_bytes()
    table = datasets.Dataset.from_dict(
        {
            "audio": [{"bytes": sound, "path": "a.wav"}] * 3,
            "sentence": list("abc"),
            "source": ["x"] * 3,
        }
    ).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(tmp_path / "train.parquet")
    load = datasets.load_dataset

    def local(name, config, split):
        assert (name, config, split) == ("someone/speech", None, "train")
        return load("parquet", data_files=str(tmp_path / "train.parquet"), split=split)

    monkeypatch.setattr(datasets, "load_dataset", local)
    rows, report = rows_of("someone/speech", tokenizer, codec, limit=2)
    assert len(rows) == 2 and report.voices == {"x": 2} and report.clips == 2


def test_faulty_clips_are_left_out_by_name(tmp_path, tokenizer, codec):
    noise(tmp_path / "good.wav")
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 24_000)
    soundfile.write(tmp_path / "nan.wav", np.full(99, np.nan), 24_000, subtype="FLOAT")
    files = ["good.wav", "gone.wav", "text.wav", "none.wav", "nan.wav", "", "good.wav", "good.wav"]
    folder_of(tmp_path, [(f, " " if n == 6 else "one", "me") for n, f in enumerate(files)])
    rows, report = rows_of(tmp_path, tokenizer, codec)
    assert len(rows) == 2 and report.clips == 8
    faults = [fault.replace(str(tmp_path), "") for fault in report.left_out]
    assert faults == [
        "/metadata.csv row 3: /gone.wav does not exist",
        "/metadata.csv row 4: /text.wav: not audio that libsndfile reads: Format not recognised.",
        "/metadata.csv row 5: /none.wav: no samples in it",
        "/metadata.csv row 6: /nan.wav: samples that are not numbers (NaN or infinite)",
        "/metadata.csv row 7: no file_name, or no audio",
        "/metadata.csv row 8: the text is empty",
    ]


def test_rows_over_max_length_are_dropped_whole(tmp_path, tokenizer, codec):
    noise(tmp_path / "short.wav", 0.5)
    noise(tmp_path / "long.wav", 2.0)
    folder_of(tmp_path, [("short.wav", "one", "me"), ("long.wav", "two", "me")])
    rows, report = rows_of(tmp_path, tokenizer, codec, max_length=100)
    assert len(rows) == 1 and report.rows == 1 and report.voices == {"me": 1}
    assert report.too_long == [f"{tmp_path}/metadata.csv row 3: 183 tokens, 2.0 s"]
    with pytest.raises(infer.Mistake, match="no rows left of 2 clips"):
        rows_of(tmp_path, tokenizer, codec, max_length=40)


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    column = folder_of(tmp_path / "column", [("a.wav", "one")], header=("file_name", "txt"))
    latin = folder_of(tmp_path / "latin", [])
    (latin / "metadata.csv").write_bytes("file_name,text\na.wav,fünf".encode("latin-1"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "one"}\n{"file')
    empty = folder_of(tmp_path / "empty", [])
    unreadable = folder_of(tmp_path / "unreadable", [("metadata.csv", "one", "me")])
    cases = [
        (tmp_path / "none", "no such folder of clips"),
        ("no_such_folder", "no such folder here"),
        (tmp_path, "no metadata.csv or metadata.jsonl"),
        (column, "no column text or .*; there are: file_name, txt"),
        (latin, "cannot be read as UTF-8"),
        (broken, "metadata.jsonl row 2: not JSON"),
        (empty, "no rows in it"),
        (unreadable, r"no rows left of 1 clips; the first: .*row 2: .*not audio"),
    ]
    for dataset, line in cases:
        told = one_line(
            prepare.main, monkeypatch, "--config", "data/demo/config.json", "--dataset", dataset
        )
        assert re.search(line, told), told


def test_prepare_by_itself_reports():
    code, printed, errors = script(
        "data/prepare.py", "--config", "data/demo/config.json", "--limit", "5"
    )
    assert code == 0, errors
    assert "5 of 5 clips" in printed and "slt 5" in printed
