"""orpheus/tables.py: separators, headers and LJSpeech; tables that are refused, in one line."""

import pytest
from clip_folders import rows_of, settings, texts_of, two_clips

from orpheus.settings import UserError


def table(folder, text, name="metadata.csv", encoding="utf-8"):
    two_clips(folder)
    (folder / name).write_bytes(text.encode(encoding))
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "file_name,text,voice\na.wav,one,x\nb.wav,two,y\n",
        "File_Name, Text, Voice\na.wav, one, x\nb.wav, two, y\n",
        "File Name;Text;Voice\r\na.wav;one;x\r\nb.wav;two;y\r\n",
        "file-name\tTEXT\tvoice\na.wav\tone\tx\nb.wav\ttwo\ty",
        "file_name|text|voice\na.wav|one|x\nb.wav|two|y\n",
        '"file_name","text","voice"\n"a.wav","one","x"\n"b.wav","two","y"\n',
        "\n\nfile_name,text,voice,,\na.wav,one,x,,\nb.wav,two,y,,\n",
        "\ufefffile_name;notes, and more;text;speaker\na.wav;;one;x\nb.wav;;two;y\n",
    ],
)
def test_separators_and_headers(text, tmp_path, tokenizer):
    rows, report = rows_of(table(tmp_path, text), tokenizer)
    assert [row["text"] for row in rows] == ["one", "two"]
    assert report.voices == {"x": 1, "y": 1} and report.left_out == []


@pytest.mark.parametrize(
    "text, line",
    [
        ("a.wav,one\nb.wav,two", "first line is no header with known columns"),
        ("a.wav;one\nb.wav;two", "add one such as file_name,text"),
        (",,\na.wav,one", "first line is no header"),
        ("\n \n", "no rows in it"),
        ("file_name,text,Text\na.wav,one,two", "two columns are named text"),
        ("file_name,text\na.wav,o\0ne", "NUL bytes"),
        ('file_name,text\na.wav,"one\nb.wav,two', "line 2: not a csv table: unexpected end"),
        ('file_name,text\na.wav,"one" two', "line 2: not a csv table"),
        ("file_name,text\na.wav," + "x" * 131_073, "line 2: not a csv table: field larger"),
        ("a|hello my dear friend|anna\nb|hello again|ben", "add a header line such as"),
        ("a|one|x|en\nb|two|y|en", "4 columns and no header"),
    ],
)
def test_tables_that_are_refused(text, line, tmp_path, tokenizer):
    with pytest.raises(UserError, match=line) as caught:
        rows_of(table(tmp_path, text), tokenizer)
    assert "\n" not in str(caught.value) and "metadata.csv" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_utf_16_table_is_named(encoding, tmp_path, tokenizer):
    folder = table(tmp_path, "file_name,text\na.wav,one", encoding=encoding)
    with pytest.raises(UserError, match=r"UTF-16.*save it as UTF-8"):
        rows_of(folder, tokenizer)


def test_the_third_column_of_ljspeech(tmp_path, tokenizer, capsys):
    text = "a | Dr. Who was 9 | Doctor Who was nine\nb|He left.|He left.\n"
    rows, report = rows_of(table(tmp_path / "normalised", text), tokenizer)
    assert [row["text"] for row in rows] == ["Doctor Who was nine", "He left."]
    report.print_summary(settings(tmp_path))
    assert "no header; its third column holds the texts" in capsys.readouterr().out
    voices = table(tmp_path / "voices", "a|hello my dear friend|anna\nb|good day to you|anna\n")
    texts = ["hello my dear friend", "good day to you"]
    assert texts_of(voices, tokenizer, text_column="text") == texts
    assert texts_of(voices, tokenizer, text_column="normalized_text") == ["anna", "anna"]
    named = "file_name|text|voice\na|hello my dear friend|anna\nb|good day to you|anna\n"
    rows, report = rows_of(table(tmp_path / "named", named), tokenizer)
    assert [row["text"] for row in rows] == texts and report.voices == {"anna": 2}
    without = table(tmp_path / "without", "a|one day|\nb|two days|\n")
    assert texts_of(without, tokenizer) == ["one day", "two days"]
    uneven = table(tmp_path / "uneven", "b|two\na\nb|one|two|three\na|four\n")
    rows, report = rows_of(uneven, tokenizer)
    assert [row["text"] for row in rows] == ["two", "four"]
    assert "row 2: the text is empty" in report.left_out[0]
    assert "row 3: more columns" in report.left_out[1]


def test_lines_are_counted_from_the_first(tmp_path, tokenizer):
    text = '\n\nfile_name,text\na.wav,"one\ntwo"\ngone.wav,three\n'
    _, report = rows_of(table(tmp_path, text), tokenizer)
    assert report.left_out[0].startswith("metadata.csv row 6: ")
    (tmp_path / "metadata.csv").write_text("a|One, text, or more.|One, text, or more.\n")
    assert texts_of(tmp_path, tokenizer) == ["One, text, or more."]


def test_tables_that_are_no_tables(tmp_path, tokenizer):
    """Faults of a table as a whole: one line, whatever stands in it."""
    cases = [
        ("metadata.csv", b"", "no rows"),
        ("metadata.csv", b"file_name,text", "no rows"),
        ("metadata.csv", b"\xff\xfe\0", "cannot be read as UTF-8"),
        ("metadata.csv", b"file_name,text\na.wav," + b"x" * 200_000, "not a csv table"),
        ("metadata.csv", b"file_name\na.wav", "no column text"),
        ("metadata.csv", b"text\none", "no column audio or file_name"),
        ("metadata.jsonl", b"[1]", "row 1: must be one JSON object"),
        ("metadata.jsonl", b"\n\n{", "row 3: not JSON"),
        ("metadata.jsonl", b"[" * 100_000, "row 1: not JSON"),
        ("metadata.parquet", b"PAR1", "parquet that does not load"),
        ("metadata.csv", b"file_name,text\na.wav\nb.wav,x,y,z", "no rows left of 2 clips"),
    ]
    for n, (name, data, line) in enumerate(cases):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=line) as caught:
            rows_of(folder, tokenizer)
        assert "\n" not in str(caught.value)
