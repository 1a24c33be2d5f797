"""data/prepare.py: rows, and a user's mistakes."""

import json
import re
import sys
from pathlib import Path

import pytest
from clip_folders import folder_of
from conftest import ROOT, one_line, script

import orpheus.codec
import orpheus.rows
from data import prepare
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT


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
        (tmp_path, "no column is known to hold the text"),  # tables of folders are read together
        (column, "no column is known to hold the text; there are: file_name, txt"),
        (latin, "cannot be read as UTF-8"),
        (broken, "metadata.jsonl row 2: not an object in JSON"),
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
    monkeypatch.setattr(orpheus.rows, "encode", None)  # it is not reached
    words = ["--config", "data/demo/config.json", "--limit", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--cache_dir", "null"]
    words[words.index(f"--{key}") + 1] = path
    assert f"set --{key} to a folder" in one_line(prepare.main, monkeypatch, *words)


def test_the_report_never_lies_in_a_run_s_folder(tmp_path, monkeypatch):
    """Where a run's own report names the voices that it was trained on."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "outputs/anna"
    out.mkdir(parents=True)
    (out / SAVED_CONFIG).write_text("{}")
    config = json.loads((ROOT / "data/demo/config.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(config | {"output_dir": str(out)}))
    words = ["--config", "mine.json", "--limit", "2", "--cache_dir", "null"]
    assert "holds a run" in one_line(prepare.main, monkeypatch, *words, "--output_dir", out)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    prepare.main()
    assert json.loads(Path("outputs/doctor/numbers", SAVED_REPORT).read_text())["rows"] == 2
    assert [path.name for path in out.iterdir()] == [SAVED_CONFIG]


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


def test_help_imports_nothing_heavy():
    code, _, imported = script("-X", "importtime", "data/prepare.py", "--help")
    assert code == 0, imported
    assert not re.search(r"\| +(torch|trl|transformers|datasets|pyarrow)$", imported, re.M)
