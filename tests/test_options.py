"""The texts that infer.py is given in files."""

from pathlib import Path

import pytest
from conftest import one_line

import infer
from orpheus.options import read_texts
from orpheus.settings import UserError


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
