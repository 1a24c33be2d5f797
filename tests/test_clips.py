"""The readers of data/prepare.py: tables, sounds, texts and the cache as people have them."""

import io
import json
import os
import struct

import numpy as np
import pandas
import pytest
import soundfile
import torch
from conftest import one_line
from test_prepare import folder_of, noise, rows_of, same, settings, two_clips

import orpheus.encoding
from data import prepare
from orpheus.audio import read_audio
from orpheus.batching import split_rows
from orpheus.clips import read_clips, read_dataset
from orpheus.doctor import Report, draw_report
from orpheus.encoding import Measures
from orpheus.settings import ROOT, UserError, read_settings
from orpheus.tokens import codes_to_ids, prompt_ids


def texts_of(folder, tokenizer, **overrides):
    return [row["text"] for row in rows_of(folder, tokenizer, **overrides)[0]]


def table(folder, text, name="metadata.csv", encoding="utf-8"):
    two_clips(folder)
    (folder / name).write_bytes(text.encode(encoding))
    return folder


# ---------------------------------------------------------------- tables


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
    report.tell(settings(tmp_path))
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


def test_parquet_files_of_other_columns(tmp_path, tokenizer):
    import datasets

    two_clips(tmp_path)
    for name, columns in (("a", ("audio", "text")), ("b", ("file_name", "text"))):
        rows = dict(zip(columns, ([f"{name}.wav"], ["one"]), strict=True))
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: its columns differ from those of"):
        rows_of(tmp_path, tokenizer)
    datasets.Dataset.from_dict({"Audio": ["b.wav"], "Text": [1]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").unlink()
    assert texts_of(tmp_path, tokenizer) == ["1"]
    datasets.Dataset.from_dict({"Audio": ["a.wav"], "Text": [[1]]}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="parquet that does not load"):
        rows_of(tmp_path, tokenizer)


def test_parquet_without_rows(tmp_path, tokenizer):
    rows = pandas.DataFrame({"audio": [], "text": []})
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"^{tmp_path}: no rows in it"):
        rows_of(tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["dataset_config", "dataset_revision"])
def test_keys_of_the_hub_do_nothing_for_a_folder(name, tokenizer):
    with pytest.raises(UserError, match=f"{name} is of a hub dataset"):
        rows_of("data/numbers", tokenizer, **{name: "x"})


def test_a_streamed_csv(tmp_path, tokenizer):
    """Its columns are known once a row is read."""
    import datasets

    table(tmp_path, "file_name,text\na.wav,one\n")
    files = {"data_files": str(tmp_path / "metadata.csv"), "split": "train"}
    stream = datasets.load_dataset("csv", streaming=True, **files)
    clips = read_dataset(stream, tmp_path, settings("x/y"), tmp_path)
    assert [clip.text for clip in clips.each] == ["one"]


def test_a_bare_folder_leaves_out_one_clip_alone(tmp_path, tokenizer):
    two_clips(tmp_path, ("1.wav", "2.wav", "3.wav", "4.wav", "²³.wav", "._1.wav"))
    for n, text in (("1", "one"), ("2", "fünf"), ("4", "..."), ("²³", "five"), ("._1", "x")):
        (tmp_path / f"{n}.txt").write_text(text, encoding="latin-1")
    rows, report = rows_of(tmp_path, tokenizer)
    assert [row["text"] for row in rows] == ["one", "five"]
    told = dict(fault.split(": ", 1) for fault in report.left_out)
    assert "2.txt: cannot be read as UTF-8" in told["2.wav"]
    assert told["3.wav"] == "no 3.txt beside it" and "no letter or digit" in told["4.wav"]
    assert report.clips == 5


def test_names_that_are_no_utf_8(tmp_path, tokenizer, capsys):
    """They are printed and saved with a question mark, and do not end the run."""
    two_clips(tmp_path, ("a.wav", "b.wav", "c.wav"))
    (tmp_path / "b.wav").rename(tmp_path / os.fsdecode(b"f\xfcnf.wav"))
    (tmp_path / "c.wav").rename(tmp_path / os.fsdecode(b"\xfc.wav"))
    (tmp_path / os.fsdecode(b"f\xfcnf.txt")).write_text("five 5")
    (tmp_path / "a.txt").write_text("one 1")
    rows, report = rows_of(tmp_path, tokenizer)
    report.tell(settings(tmp_path), full=True)
    report.save(tmp_path / "out")
    assert len(rows) == 2 and report.left_out == ["?.wav: no ?.txt beside it"]
    table = [{"file_name": "a.wav", "text": "one"}, {"file_name": "\ud800.wav", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    rows, report = rows_of(tmp_path, tokenizer)
    assert len(rows) == 1 and report.left_out[0].endswith("?.wav does not exist")


def test_tables_in_the_current_folder(tmp_path, tokenizer, monkeypatch):
    folder_of(tmp_path, [("a.wav", "one", "x")])
    two_clips(tmp_path)
    codec = {"codec": ROOT / "data/demo/codec"}
    chosen = settings(".", **codec)
    monkeypatch.chdir(tmp_path)
    for dataset in (".", "metadata.csv"):
        chosen.dataset = dataset
        rows, _ = prepare.make_rows(read_clips(chosen), chosen, tokenizer)
        assert len(rows) == 1


def test_a_sound_is_no_dataset(tmp_path, tokenizer):
    with pytest.raises(UserError, match="one sound; set --dataset to a folder"):
        rows_of(noise(tmp_path / "a.wav"), tokenizer)


# ---------------------------------------------------------------- texts and voices


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"text": "?!…"}, "nothing to speak"),
        ({"text": "\U0001f600"}, "nothing to speak"),
        ({"text": "\u200f\u202e"}, "nothing to speak"),
        ({"text": "one\x00two"}, r"a control character \(U\+0000\)"),
        ({"text": "\x1b[1mone"}, r"a control character \(U\+001B\)"),
        ({"text": True}, "holds bool, not text"),
        ({"text": float("nan")}, "holds nan, not text"),
        ({"text": float("inf")}, "holds inf, not text"),
        ({"text": "one", "voice": ["x"]}, "voice holds list, not text"),
        ({"text": "one", "voice": float("nan")}, "voice holds nan, not text"),
        ({"text": "one", "voice": "x\0"}, "control character"),
        ({"text": "one", "file_name": "\\\\server\\share\\a.wav"}, "outside the dataset"),
        ({"text": "one", "file_name": "C:\\a.wav"}, "does not exist"),
    ],
)
def test_rows_that_are_left_out(row, fault, tmp_path, tokenizer):
    two_clips(tmp_path)
    rows = [{"file_name": "a.wav"} | row, {"file_name": "b.wav", "text": "fine", "voice": " x\ty "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made, report = rows_of(tmp_path, tokenizer)
    assert len(made) == 1 and report.voices == {"x y": 1}
    with pytest.raises(UserError, match=fault):
        raise UserError(report.left_out[0])
    assert report.reasons.total() == 1 and ("broken row" not in report.reasons), report.reasons


def test_marks_of_right_to_left_text_stay(tmp_path, tokenizer):
    folder = folder_of(tmp_path, [("a.wav", "\u200fשלום\u200f", ""), ("b.wav", "می\u200cروم", "")])
    two_clips(tmp_path)
    assert texts_of(folder, tokenizer) == ["\u200fשלום\u200f", "می\u200cروم"]


@pytest.mark.parametrize("train_on", ["audio", "all"])
def test_no_row_is_longer_than_max_length(train_on, tmp_path, tokenizer):
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "word " * 20_000, ""), ("b.wav", "two", "")])
    rows, report = rows_of(tmp_path, tokenizer, too_long="truncate", train_on=train_on)
    assert [row["text"] for row in rows] == ["two"] and len(report.dropped) == 1
    assert report.reasons == {"too long": 1}


# ---------------------------------------------------------------- sounds


def sound_of(seconds=2.0, **how):
    audio = np.random.default_rng(0).normal(0, 0.1, int(24_000 * seconds))
    file = io.BytesIO()
    soundfile.write(file, audio, 24_000, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    "how",
    [
        {"format": "WAV"},
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "WAV", "subtype": "ALAW"},
        {"format": "WAV", "subtype": "IMA_ADPCM"},
        {"format": "WAVEX"},
        {"format": "FLAC"},
        {"format": "MP3"},
    ],
    ids=str,
)
def test_a_sound_that_is_cut_short(how, tmp_path):
    data = sound_of(**how)
    audio, _, _ = read_audio(data)
    assert abs(len(audio) - 48_000) < 2_400
    with pytest.raises(UserError, match=r"cut short.*: the header says 2\.0 s"):
        read_audio(data[: len(data) // 2])
    if how["format"] not in ("FLAC", "MP3"):
        assert len(read_audio(data[:-20])[0]) > 47_000  # a few samples do not matter


def test_sizes_that_are_unknown_are_not_cut_short():
    """As programs leave them that write into a pipe."""
    data = bytearray(sound_of(format="WAV"))
    for size in (2**32 - 1, 2**31 - 1, 2**31 - 1 - 36):
        data[40:44] = struct.pack("<I", size)
        assert len(read_audio(bytes(data))[0]) == 48_000
    flac = bytearray(sound_of(format="FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    with pytest.raises(UserError, match="does not say how long it is"):
        read_audio(bytes(flac))


@pytest.mark.parametrize("peak, kept", [(0.9, True), (3.0, True), (1e4, False), (1e30, False)])
def test_samples_over_full_scale(peak, kept, tmp_path, tokenizer):
    two_clips(tmp_path)
    audio = np.random.default_rng(0).uniform(-peak, peak, 24_000)
    soundfile.write(tmp_path / "a.wav", audio, 24_000, subtype="FLOAT")
    folder_of(tmp_path, [("a.wav", "one", ""), ("b.wav", "two", "")])
    rows, report = rows_of(tmp_path, tokenizer)
    assert len(rows) == 1 + kept
    assert ("clipped" in report.findings) == (peak == 3.0)
    if not kept:
        assert "a.wav: samples of up to 1e+" in report.left_out[0]
        assert report.reasons == {"far over full scale": 1}


def test_rare_kinds_of_sound(tmp_path, tokenizer):
    draw = np.random.default_rng(0)
    kinds = {"u8": "PCM_U8", "double": "DOUBLE", "alaw": "ALAW", "ulaw": "ULAW", "int": "PCM_32"}
    for name, subtype in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", draw.normal(0, 0.1, 12_000), 24_000, subtype)
    soundfile.write(tmp_path / "many.wav", draw.normal(0, 1, (12_000, 200)), 24_000)
    soundfile.write(tmp_path / "fast.wav", draw.normal(0, 0.1, 1), 192_000)
    names = [*kinds, "many", "fast"]
    folder_of(tmp_path, [(f"{name}.wav", name, "") for name in names])
    rows, report = rows_of(tmp_path, tokenizer, leave_out="[]")
    assert len(rows) + len(report.left_out) == len(names) and len(rows) >= 6
    assert "many" in [row["text"] for row in rows]


# ---------------------------------------------------------------- rows made elsewhere


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"at": 1, "id": -5}, "id -5 at position 1 of its input_ids: ids go from 0"),
        ({"at": 1, "id": 10**9}, "ids go from 0"),
        ({"at": 1, "id": 2.5}, "not a list of whole numbers"),
        ({"at": 1, "id": "7"}, "not a list of whole numbers"),
        ({"at": 1, "id": None}, "not a list of whole numbers"),
        ({"label": 7}, "label 7 at position 0 is neither -100 nor"),
        ({"labels": "none"}, "every label is -100"),
        ({"codes": [["1"] * 7]}, "neither frames of 7"),
        ({"codes": [[1.5] * 7]}, "neither frames of 7"),
        ({"codes": [[True] * 7]}, "neither frames of 7"),
        ({"codes": []}, "no frame"),
        ({"codes": {"0": 1}}, "neither frames of 7"),
    ],
    ids=str,
)
def test_faults_of_rows_made_elsewhere(change, fault, tmp_path, tokenizer, ids):
    codes = np.ones((2, 7), dtype=np.int64)
    prompt = prompt_ids(tokenizer, ids, "one", "x")
    row = [*prompt, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
    labels = [-100] * len(prompt) + row[len(prompt) :]
    if "at" in change:
        row[change["at"]] = change["id"]
    if "labels" in change:
        labels = [-100] * len(row)
    labels[0] = change.get("label", -100)
    made = {"input_ids": row, "labels": labels}
    if "codes" in change:
        made = change | {"text": "one"}
    (tmp_path / "list.jsonl").write_text(json.dumps(made))
    with pytest.raises(UserError, match=fault):
        rows_of(tmp_path / "list.jsonl", tokenizer)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    "broken",
    [
        "[]",
        "7",
        "null",
        "{}",
        '"text"',
        "[" * 100_000,
        {"codes": [[1, 2], [3]]},
        {"codes": [1, 2, 3]},
        {"codes": []},
        {"codes": [-1] * 42},
        {"codes": [10**6] * 42},
        {"codes": [1.5] * 42},
        {"codes": ["1"] * 42},
        {"codes": None},
        {"codes": [1] * 7000},
        {"seconds": "0.5"},
        {"seconds": float("nan")},
        {"seconds": 1e308},
        {"rate": None},
        {"level": float("-inf")},
        {"unknown": 1},
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_cache_entry_of_another_shape_is_made_anew(broken, tmp_path, tokenizer):
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x")])
    cache = {"cache_dir": tmp_path / "cache"}
    rows, _ = rows_of(tmp_path, tokenizer, **cache)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    whole = entry.read_text()
    text = broken if isinstance(broken, str) else json.dumps(json.loads(whole) | broken)
    entry.write_text(text)
    again, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 0 and same(rows, again) and entry.read_text() == whole


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
@pytest.mark.parametrize("path", ["file/below", "/proc/none", "/proc", "x" * 300])
def test_a_folder_that_cannot_be_written_is_told_first(key, path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    path = path if path[0] == "/" else f"{tmp_path}/{path}"
    monkeypatch.setattr(orpheus.encoding, "encode", None)  # it is not reached
    words = ["--config", "data/demo/config.json", "--limit", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--cache_dir", "null"]
    words[words.index(f"--{key}") + 1] = path
    assert f"set --{key} to a folder" in one_line(prepare.main, monkeypatch, *words)


# ---------------------------------------------------------------- encoding


def test_an_error_while_encoding_leaves_no_trace(tmp_path, tokenizer, monkeypatch):
    """Neither in torch's number of threads nor as an open progress bar."""
    import tqdm

    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    closed, threads = [], torch.get_num_threads()

    class Bar(tqdm.tqdm):
        def close(self):
            closed.append(self)
            super().close()

    def broken(codec, clips):
        raise RuntimeError("no encoder")

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(orpheus.encoding, "encode", broken)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no encoder"):
            rows_of(tmp_path, tokenizer)
        assert torch.get_num_threads() == 2 and closed
    finally:
        torch.set_num_threads(threads)


def test_a_codec_that_is_loaded_is_taken(tokenizer, codec, monkeypatch):
    chosen = settings("data/numbers", limit=6, held_out=0.3)
    monkeypatch.setattr(orpheus.encoding, "load_codec", None)
    rows, report = prepare.make_rows(read_clips(chosen), chosen, tokenizer, codec)
    assert report.split == split_rows(rows, chosen)
    assert report.held_out == len(report.split[1]) > 0


# ---------------------------------------------------------------- what is printed


def test_the_console(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(6):
        noise(tmp_path / f"{n}.wav", 1.0, rate=22_050, seed=n)
    soundfile.write(tmp_path / "4.wav", np.zeros(9999), 24_000)
    noise(tmp_path / "long.wav", 3.0)
    names = [f"{n}.wav" for n in range(6)] + ["long.wav"]
    folder_of(tmp_path, [(name, f"text {name} 1", "anna") for name in names])
    root = ROOT
    config = {"codec": root / "data/demo/codec", "max_length": 200, "output_dir": "out"}
    overrides = {"dataset": ".", "cache_dir": "null", **{k: str(v) for k, v in config.items()}}
    chosen = read_settings(root / "data/demo/config.json", overrides)
    _, report = prepare.make_rows(read_clips(chosen), chosen, tokenizer)
    report.tell(chosen)
    lines = capsys.readouterr().out.splitlines()
    counts = "5 of 7 clips, 0.1 min, voice anna; 2 left out (1 silent, 1 too long)"
    assert lines[0] == f"data     .: {counts}: out/data_report.json"
    assert len(lines) == 2 and "digits" in lines[1]
    report.tell(chosen, full=True)
    printed = capsys.readouterr().out
    assert "rows     " in printed and "batches  " in printed and "no_highs" in printed
    assert "silent throughout" in printed and "find a better source" not in printed
    report.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out/data_report.json").read_text())
    assert saved["reasons"] == {"silent": 1, "too long": 1} and "split" not in saved


def test_a_share_that_is_kept_is_told_only_if_it_is_less_than_all(capsys):
    report = Report("x", measures=[Measures("a", "", "t")])
    report.lengths = [100] * 50
    report.tell_rows(settings("x"))
    assert "99 %" not in capsys.readouterr().out
    report.lengths = [100] * 199 + [500]
    report.tell_rows(settings("x"))
    assert "max_length 100 would keep 99 %" in capsys.readouterr().out


def test_a_picture_of_a_voice_that_looks_like_a_formula(tmp_path):
    measures = [Measures("a", "$\\frac$", "text", seconds=1.0)]
    report = Report("a$b$_^", measures=measures)
    draw_report(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size
