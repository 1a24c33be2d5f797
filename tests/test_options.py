"""Command lines: --help, unknown keys, and the texts that infer.py is given in files."""

import json
import re
from pathlib import Path

import pytest
from conftest import DEMO, one_line, script

import finetune
import infer
from data import prepare
from orpheus.options import read_texts
from orpheus.settings import PARTS, Settings, UserError


@pytest.mark.parametrize("name", ["finetune.py", "data/prepare.py"])
def test_help_and_mistakes_in_keys_need_no_heavy_imports(name):
    mistakes = {
        ("--learning_rate", "nan"): "error: command line: learning_rate is",
        ("--adam_beta_2", "0.9"): "no key is named 'adam_beta_2'; the nearest is 'adam_beta2'",
        ("--eval_steps", "5"): "error: command line: eval_steps cannot be set, leave it out:",
        ("--help",): "",
    }
    for words, line in mistakes.items():
        code, _, errors = script("-X", "importtime", name, *words)
        assert code == (2 if line else 0) and line in errors
        assert not re.search(r"\| +(torch|trl|transformers|datasets|snac|peft)$", errors, re.M)


def test_help_shows_each_key_with_its_meaning_and_default():
    code, printed, _ = script("finetune.py", "--help")
    entries = dict(re.findall(r"^  --(\w+) +(\S.*(?:\n {20}.*)*)$", printed, re.M))
    assert code == 0 and set(Settings.model_fields) == set(entries) - {"config"}
    for name, value in Settings().flat().items():
        words = " ".join(entries[name].split())
        assert words.endswith(f"(default: {json.dumps(value)})") and words[0].isalpha(), name
    assert re.findall(r"^(\w+):$", printed, re.M)[1:] == [p.__doc__.lower() for p in PARTS]


@pytest.mark.parametrize("main", [finetune.main, prepare.main])
def test_unknown_keys_are_refused(main, monkeypatch, tmp_path):
    words = [*DEMO, "--output_dir", tmp_path, "--backend", "transformers", "--datset", "x"]
    words += ["--gradient_checkpointing", "false", "--cache_dir", "null"]
    line = one_line(main, monkeypatch, *words)
    assert "no key is named 'datset'; the nearest is 'dataset'" in line


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("infer.py", "--out"),
        ("-m orpheus.merge", "--codec"),
        ("-m orpheus.evaluate", "--wavs"),
        ("-m orpheus.page", "--blind"),
        ("finetune.py", "--config"),
        ("data/prepare.py", "--config"),
    ],
)
def test_help_imports_no_heavy_library(name, option):
    """So that it answers at once: each of these takes seconds to import."""
    code, printed, times = script("-X", "importtime", *name.split(), "--help")
    assert code == 0 and option in printed
    imported = {line.split("|")[-1].strip() for line in times.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "trl", "datasets", "unsloth", "peft", "snac"}


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.parquet"])
def test_other_tables_are_not_spoken_as_lines(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text('{"file_name": "a.wav", "text": "hi"}\n')
    line = one_line(infer.main, monkeypatch, "--file", tmp_path / name)
    assert "give a metadata.csv" in line


@pytest.mark.parametrize("header", ["file_name,text", "File Name, Text", "file_name;text",
                                    "file_name\ttext", "file_name|text"])  # fmt: skip
def test_separators_of_a_table_to_speak(header, tmp_path):
    path = tmp_path / "lines.tsv"
    path.write_text(f"{header}\n{header.replace('Text', 'text')}\n")
    texts, clips = read_texts([], str(path))
    assert [text.strip() for text in texts] == ["text"] and len(clips) == 1


def test_a_table_with_a_cell_that_is_too_long(tmp_path, monkeypatch):
    table = tmp_path / "lines.csv"
    table.write_text("file_name,text\na.wav," + "a" * 200_000 + "\n")
    line = one_line(infer.main, monkeypatch, "--file", table)
    assert line.startswith(f"{table} line 2: not a csv table") and "131072" in line


def test_a_table_to_speak_is_read_as_one_of_clips(tmp_path):
    """LJSpeech's form and other names of columns too; recordings may be in another folder."""
    path = tmp_path / "lines.csv"
    path.write_text("a|one day|\nb|two days|\n")
    assert read_texts([], str(path)) == (["one day", "two days"], [tmp_path / "a", tmp_path / "b"])
    path.write_text("path,sentence\n../a.wav,one\n/b.wav,two\n")
    assert read_texts([], str(path))[1] == [tmp_path / "../a.wav", Path("/b.wav")]
    for row in ("a.wav,", "a.wav", ",one"):
        path.write_text(f"file_name,text\nb.wav,two\n{row}\n")
        with pytest.raises(UserError, match=r"lines\.csv row 3: it needs a text and a file_name"):
            read_texts([], str(path))
