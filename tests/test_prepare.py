"""data/prepare.py: rows, and a user's mistakes."""

import json
import re
import sys

import pytest
from clip_folders import folder_of, noise, rows_of, settings, two_clips
from conftest import DEMO, one_line, script

import orpheus.codec
import orpheus.encoding
from data import prepare
from orpheus.audio import measure_clip
from orpheus.clips import read_clips
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import UserError
from orpheus.tokens import FRAME_SAMPLES, ids_to_codes, prompt_ids


def test_every_row_starts_with_the_prompt_that_infer_builds(tokenizer, codec, ids):
    rows, report = rows_of("data/numbers", tokenizer, limit=20)
    clips = read_clips(settings("data/numbers", limit=20))
    assert len(rows) == len(report.measures) == 20 and report.voices == {"slt": 20}
    for row, clip in zip(rows, clips, strict=True):
        prompt = prompt_ids(tokenizer, ids, clip.text, clip.voice)
        audio = measure_clip(clip.audio, settings("data/numbers"))[0]
        n, frames = len(prompt), -(-len(audio) // FRAME_SAMPLES)
        assert row["input_ids"][:n].tolist() == prompt
        assert row["input_ids"][n + 7 * frames :].tolist() == [ids.eos, ids.eoa]
        codes = ids_to_codes(row["input_ids"][n : n + 7 * frames], ids)
        assert (codes == orpheus.codec.encode(codec, [audio])[0]).all()
        assert (row["labels"][:n] == -100).all()
        assert (row["labels"][n:] == row["input_ids"][n:]).all()


def test_train_on_all_has_no_masked_label(tokenizer):
    rows, _ = rows_of("data/numbers", tokenizer, limit=2, train_on="all")
    assert all((row["labels"] == row["input_ids"]).all() for row in rows)


@pytest.mark.parametrize("train_on", ["audio", "all"])
def test_no_row_is_longer_than_max_length(train_on, tmp_path, tokenizer):
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "word " * 20_000, ""), ("b.wav", "two", "")])
    rows, report = rows_of(tmp_path, tokenizer, too_long="truncate", train_on=train_on)
    assert [row["text"] for row in rows] == ["two"] and len(report.dropped) == 1
    assert report.reasons == {"too long": 1}


def test_rows_over_max_length_are_dropped_whole(tmp_path, tokenizer):
    noise(tmp_path / "short.wav", 0.5)
    noise(tmp_path / "long.wav", 2.0, seed=1)
    folder_of(tmp_path, [("short.wav", "one", "me"), ("long.wav", "two", "me")])
    rows, report = rows_of(tmp_path, tokenizer, max_length=100)
    assert len(rows) == 1 and report.voices == {"me": 1}
    assert report.dropped == ["metadata.csv row 3: 180 tokens, 2.0 s"]
    with pytest.raises(UserError, match="no rows left of 2 clips"):
        rows_of(tmp_path, tokenizer, max_length=40)


def test_a_codec_that_is_loaded_is_taken(tokenizer, codec, monkeypatch):
    chosen = settings("data/numbers", limit=6, held_out=0.3)
    monkeypatch.setattr(orpheus.encoding, "load_codec", None)
    train, held_out, report = prepare.make_rows(read_clips(chosen), chosen, tokenizer, codec)
    assert len(train) + len(held_out) == len(report.measures) == 6
    assert report.held_out == len(held_out) > 0


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
        (tmp_path / "none", "no such folder; give one of clips"),
        ("no_such_folder", "no such folder; give one of clips"),
        (tmp_path, "no metadata.csv, .* no audio file with a .txt beside it"),
        (column, "no column text or .*; there are: file_name, txt"),
        (latin, "cannot be read as UTF-8"),
        (broken, "metadata.jsonl row 2: not JSON"),
        (empty, "no rows in it"),
        (unreadable, r"no rows left of 1 clips; the first: .*row 2: .*not audio"),
    ]
    for dataset, line in cases:
        message = one_line(
            prepare.main, monkeypatch, "--config", "data/demo/config.json", "--dataset", dataset
        )
        assert re.search(line, message), message


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
@pytest.mark.parametrize("path", ["file/below", "/proc/none", "/proc", "x" * 300])
def test_a_folder_that_cannot_be_written_is_reported_first(key, path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    path = path if path[0] == "/" else f"{tmp_path}/{path}"
    monkeypatch.setattr(orpheus.encoding, "encode", None)  # it is not reached
    words = ["--config", "data/demo/config.json", "--limit", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--cache_dir", "null"]
    words[words.index(f"--{key}") + 1] = path
    assert f"set --{key} to a folder" in one_line(prepare.main, monkeypatch, *words)


def test_the_doctor_leaves_a_run_its_report(tmp_path, monkeypatch):
    """Which names the voices that the run was trained on."""
    (tmp_path / SAVED_CONFIG).write_text("{}")
    (tmp_path / SAVED_REPORT).write_text("the run's")
    words = [*DEMO, "--limit", "2", "--cache_dir", "null", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    prepare.main()
    assert (tmp_path / SAVED_REPORT).read_text() == "the run's"
    assert json.loads((tmp_path / "doctor" / SAVED_REPORT).read_text())["rows"] == 2


def test_prepare_by_itself_reports(tmp_path):
    words = ["data/numbers", "--config", "data/demo/config.json", "--limit", "5"]
    code, printed, errors = script("data/prepare.py", *words, "--output_dir", tmp_path)
    assert code == 0, errors
    assert "5 of 5 clips" in printed and "voice slt\n" in printed
    verdict = "0.2 min of slt, 3 steps a pass; before you train, raise limit: slt has 5 clips "
    assert printed.splitlines()[-1].startswith(f"verdict  {verdict}")
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["rows"] == 5 and report["voices"] == {"slt": 5}
    assert (tmp_path / "data_report.png").read_bytes()[:4] == b"\x89PNG"


def test_help_and_the_light_modules_import_nothing_heavy():
    """What reads a dataset and prints its report must not wait for torch."""
    light = "import orpheus.clips, orpheus.audio, orpheus.batching, orpheus.doctor, data.prepare"
    for words in (["data/prepare.py", "--help"], ["-c", light]):
        code, _, imported = script("-X", "importtime", *words)
        assert code == 0, imported
        assert not re.search(r"\| +(torch|trl|transformers|datasets|pyarrow)$", imported, re.M)
