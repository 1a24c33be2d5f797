"""orpheus/clips.py: every accepted form of data, and rows that are left out by name."""

import itertools
import json
import os
import unicodedata

import numpy as np
import pandas
import pytest
import soundfile
from clip_folders import (
    folder_of,
    noise,
    parquet_with_bytes,
    rows_of,
    settings,
    texts_of,
    two_clips,
)
from conftest import ROOT

import orpheus.codec
import orpheus.rows
from data import prepare
from orpheus.audio import measure_clip
from orpheus.clips import read_clips
from orpheus.settings import UserError, read_settings
from orpheus.tokens import codes_to_ids, prompt_ids


def audio_folder_csv(folder):
    two_clips(folder)
    folder_of(folder, [("a.wav", "one", "x"), ("b.wav", 'two, "three"\nfour', "y")])


def audio_folder_jsonl(folder):
    two_clips(folder / "clips")
    rows = [
        {"file_name": f"clips/{n}.wav", "sentence": t, "source": v}
        for n, t, v in (("a", "one", "x"), ("b", 'two, "three" four', "y"))
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))


def audio_folder_parquet(folder):
    import datasets

    two_clips(folder)
    rows = {
        "file_name": ["a.wav", "b.wav"],
        "text": ["one", 'two, "three" four'],
        "voice": ["x", "y"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / "metadata.parquet")


def bom_crlf_and_windows_paths(folder):
    two_clips(folder / "clips")
    rows = 'path;text;speaker\r\nclips\\a.wav;one;x\r\nclips\\b.wav;"two, ""three"" four";y\r\n'
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + rows.replace(";", ",").encode())


WITH_VOICES = [
    audio_folder_csv,
    audio_folder_jsonl,
    audio_folder_parquet,
    parquet_with_bytes,
    bom_crlf_and_windows_paths,
]


@pytest.mark.parametrize("form", WITH_VOICES)
def test_forms_with_voices(form, tmp_path, tokenizer, ids):
    form(tmp_path / "set")
    rows, report = rows_of(tmp_path / "set", tokenizer)
    assert report.left_out == [] and report.voices == {"x": 1, "y": 1}
    for row, (text, voice) in zip(rows, (("one", "x"), ('two, "three" four', "y")), strict=True):
        prompt = prompt_ids(tokenizer, ids, text, voice)
        assert row["input_ids"][: len(prompt)].tolist() == prompt
    assert len(rows_of(tmp_path / "set", tokenizer, limit=1)[0]) == 1


def ljspeech(folder):
    two_clips(folder / "wavs", ("LJ1-1.flac", "LJ1-2.flac"))
    lines = ['LJ1-1|No. 1|number "one', "LJ1-2|two|two"]
    (folder / "metadata.csv").write_text("\n".join(lines))


def bare(folder):
    two_clips(folder, ("10.wav", "9.wav"))
    (folder / "10.txt").write_text("two\n")
    (folder / "9.txt").write_text('number "one\n')


def csv_manifest(folder):
    two_clips(folder / "sounds")
    rows = [("sounds/a.wav", 'number "one'), ("sounds/b.wav", "two")]
    folder_of(folder, rows, header=("audio_path", "normalized_text"))
    (folder / "metadata.csv").rename(folder / "list.csv")
    return folder / "list.csv"


def jsonl_manifest(folder):
    two_clips(folder)
    rows = [{"audio": "a.wav", "text": 'number "one'}, {"audio": "b.wav", "text": "two"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "list.jsonl"


@pytest.mark.parametrize("form", [ljspeech, bare, csv_manifest, jsonl_manifest])
def test_forms_of_one_voice(form, tmp_path, tokenizer, ids):
    dataset = form(tmp_path / "set") or tmp_path / "set"
    rows, report = rows_of(dataset, tokenizer)
    assert report.left_out == [] and report.voices == {}
    for row, text in zip(rows, ('number "one', "two"), strict=True):
        prompt = prompt_ids(tokenizer, ids, text)
        assert row["input_ids"][: len(prompt)].tolist() == prompt


def test_a_hub_dataset(tmp_path, monkeypatch, tokenizer):
    """load_dataset reads a local parquet as the hub gives it; with a limit it is streamed."""
    import datasets

    parquet_with_bytes(tmp_path)
    load, asked = datasets.load_dataset, []

    def local(name, config, **how):
        asked.append((name, config, how["split"], how["revision"], how["streaming"]))
        files = str(next(tmp_path.rglob("*.parquet")))
        return load("parquet", data_files=files, split="train", streaming=how["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", local)
    rows, report = rows_of("someone/speech", tokenizer, dataset_config="en")
    assert len(rows) == 2 and report.voices == {"x": 1, "y": 1}
    rows, report = rows_of("someone/speech", tokenizer, limit=1, dataset_revision="v1")
    assert len(rows) == report.clips == 1
    assert asked == [
        ("someone/speech", "en", "train", None, False),
        ("someone/speech", None, "train", "v1", True),
    ]


def test_a_streamed_csv(tmp_path, monkeypatch):
    """Its columns are known once a row is read."""
    import datasets

    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\n")
    files = {"data_files": str(tmp_path / "metadata.csv"), "split": "train"}
    stream = datasets.load_dataset("csv", streaming=True, **files)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    clips = read_clips(settings("someone/speech", limit=5))
    assert clips.count == 5 and [clip.text for clip in clips] == ["one"]


@pytest.mark.parametrize("name", ["dataset_config", "dataset_revision"])
def test_keys_of_the_hub_do_nothing_for_a_folder(name, tokenizer):
    with pytest.raises(UserError, match=f"{name} is for hub datasets"):
        rows_of("data/numbers", tokenizer, **{name: "x"})


def test_columns_can_be_named(tmp_path, tokenizer):
    two_clips(tmp_path)
    rows = [("a.wav", "one", "wrong", "x"), ("b.wav", "two", "wrong", "y")]
    folder_of(tmp_path, rows, header=("sound", "spoken", "text", "who"))
    names = {"audio_column": "sound", "text_column": "spoken", "voice_column": "who"}
    rows, report = rows_of(tmp_path, tokenizer, **names)
    assert [row["text"] for row in rows] == ["one", "two"] and report.voices == {"x": 1, "y": 1}
    with pytest.raises(UserError, match="no column spoke; there are: sound, spoken, text, who"):
        rows_of(tmp_path, tokenizer, **names | {"text_column": "spoke"})


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
    rows = {"Audio": ["a.wav"], "Text": [[1]]}  # of another type than b's
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    rows, report = rows_of(tmp_path, tokenizer)
    assert [row["text"] for row in rows] == ["1"]
    assert "row 0: Text holds list, not text" in report.left_out[0]


def test_parquet_that_is_damaged_behind_its_first_rows(tmp_path, tokenizer):
    two_clips(tmp_path)
    rows = {"audio": ["a.wav"] * 500, "text": [f"text {n} " + "x" * 99 for n in range(500)]}
    path = tmp_path / "metadata.parquet"
    pandas.DataFrame(rows).to_parquet(path, compression=None, row_group_size=100)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"metadata\.parquet: parquet that does not load"):
        rows_of(tmp_path, tokenizer)


def test_parquet_without_rows(tmp_path, tokenizer):
    rows = pandas.DataFrame({"audio": [], "text": []})
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"^{tmp_path}: no rows in it"):
        rows_of(tmp_path, tokenizer)


def test_a_bare_folder_leaves_out_one_clip_alone(tmp_path, tokenizer):
    two_clips(tmp_path, ("1.wav", "2.wav", "3.wav", "4.wav", "²³.wav", "._1.wav"))
    for n, text in (("1", "one"), ("2", "fünf"), ("4", "..."), ("²³", "five"), ("._1", "x")):
        (tmp_path / f"{n}.txt").write_text(text, encoding="latin-1")
    rows, report = rows_of(tmp_path, tokenizer)
    assert [row["text"] for row in rows] == ["one", "five"]
    faults = dict(fault.split(": ", 1) for fault in report.left_out)
    assert "2.txt: cannot be read as UTF-8" in faults["2.wav"]
    assert faults["3.wav"] == "no 3.txt beside it" and "no letter or digit" in faults["4.wav"]
    assert report.clips == 5


def test_names_that_are_no_utf_8(tmp_path, tokenizer, capsys):
    """They are printed and saved with a question mark, and do not end the run."""
    two_clips(tmp_path, ("a.wav", "b.wav", "c.wav"))
    (tmp_path / "b.wav").rename(tmp_path / os.fsdecode(b"f\xfcnf.wav"))
    (tmp_path / "c.wav").rename(tmp_path / os.fsdecode(b"\xfc.wav"))
    (tmp_path / os.fsdecode(b"f\xfcnf.txt")).write_text("five 5")
    (tmp_path / "a.txt").write_text("one 1")
    rows, report = rows_of(tmp_path, tokenizer)
    report.print_summary(settings(tmp_path), full=True)
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
        rows, *_ = prepare.make_rows(read_clips(chosen), chosen, tokenizer)
        assert len(rows) == 1


def test_an_audio_file_is_no_dataset(tmp_path, tokenizer):
    with pytest.raises(UserError, match="a single audio file; set --dataset to a folder"):
        rows_of(noise(tmp_path / "a.wav"), tokenizer)


BAD = {  # file_name, text: what the report says
    ("gone.wav", "one"): "gone.wav does not exist",
    ("words.wav", "one"): "not audio that libsndfile reads",
    ("bytes.wav", "one"): "not audio that libsndfile reads",
    ("nothing.wav", "one"): "not audio that libsndfile reads",
    ("cut.flac", "one"): "not audio that libsndfile reads",
    ("folder.wav", "one"): "folder.wav is a folder",
    ("loop.wav", "one"): "loop.wav does not exist",
    ("none.wav", "one"): "no samples in it",
    ("nan.wav", "one"): "samples that are not numbers",
    ("inf.wav", "one"): "samples that are not numbers",
    ("silent.wav", "one"): "silent throughout",
    ("three_hours.wav", "one"): "11000 s long; cut it into sentences",
    ("phone.m4a", "one"): "ffmpeg -i phone.m4a phone.flac",
    ("phone.webm", "one"): "ffmpeg -i phone.webm phone.flac",
    ("../good.wav", "one"): "is outside the dataset's folder",
    ("sub/../../good.wav", "one"): "is outside the dataset's folder",
    ("..\\good.wav", "one"): "is outside the dataset's folder",
    ("/etc/hostname", "one"): "is outside the dataset's folder",
    ("https://example.org/a.wav", "one"): "does not exist",
    ("a\0b.wav", "one"): "does not exist",
    ("a" * 5000 + ".wav", "one"): "does not exist",
    ("b" * 5000, "one"): "does not exist",
    ("no_suffix", "one"): "no_suffix does not exist",
    (".", "one"): "is outside the dataset's folder",
    ("", "one"): "no sound is named",
    (None, "one"): "no sound is named",
    (7, "one"): "no sound is named",
    ("good.wav", ""): "the text is empty",
    ("good.wav", None): "the text is empty",
    ("good.wav", " \t\n\u3000"): "the text is empty",
    ("good.wav", "\ud800"): "lone surrogate",
    ("good.wav", 'L["one"]'): "holds list, not text",
    ("good.wav", 'L{"one": 1}'): "holds dict, not text",
}


GOOD = {  # file_name: text
    "8bit.wav": "one",
    "float.wav": "two",
    "24bit.wav": "three",
    "mp3_inside.wav": "four",
    "stereo.flac": "five",
    "8000.wav": "six",
    "one_sample.wav": "seven",
    "na\u0131\u0308ve caf\u00e9.wav": "cafe\u0301",
    "cafe\u0301.wav": "caf\u00e9",
    "rtl.wav": "\u05e9\u05dc\u05d5\u05dd",
    "number.wav": 7,
    "emoji.wav": "\U0001f600 <laugh>",
}


def plant(folder):
    """The files that BAD and GOOD name."""
    (folder / "words.wav").write_text("no audio")
    (folder / "bytes.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt " + bytes(range(200)))
    (folder / "nothing.wav").touch()
    noise(folder / "cut.flac")
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:40])
    (folder / "folder.wav").mkdir()
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    soundfile.write(folder / "none.wav", np.zeros(0), 24_000)
    soundfile.write(folder / "nan.wav", np.full(99, np.nan), 24_000, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", np.full(99, np.inf), 24_000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(9999), 24_000)
    soundfile.write(folder / "three_hours.wav", np.ones(1_100_000) / 9, 100, subtype="PCM_U8")
    for name in ("phone.m4a", "phone.webm"):
        (folder / name).write_bytes(b"\0\0\0 ftypM4A ")
    noise(folder / "good.wav", seed=99)
    for seed, name in enumerate(GOOD):
        kind = {"8bit.wav": "PCM_U8", "float.wav": "FLOAT", "24bit.wav": "PCM_24"}.get(name)
        how = {"format": "MP3"} if name == "mp3_inside.wav" else {"subtype": kind}
        rate = 8000 if name == "8000.wav" else 24_000
        seconds = 1 / 24_000 if name == "one_sample.wav" else 0.5
        on_disk = unicodedata.normalize("NFC", name) if seed % 2 else name
        noise(folder / on_disk, seconds, rate, 2 if "stereo" in name else 1, seed, **how)


def test_forty_planted_faults(tmp_path, tokenizer, codec, ids):
    """Each is left out by name and reason, and every good clip gives the row it gives alone."""
    folder = tmp_path / "set"
    folder.mkdir()
    noise(tmp_path / "good.wav")
    plant(folder)
    bad = [(name, json.loads(t[1:]) if str(t)[:1] == "L" else t) for name, t in BAD]
    pairs = [pair for both in itertools.zip_longest(bad, GOOD.items()) for pair in both if pair]
    table = [json.dumps({"file_name": name, "text": text}) for name, text in pairs]
    (folder / "metadata.jsonl").write_text("\n".join(table))
    rows, report = rows_of(folder, tokenizer)
    assert len(rows) == len(GOOD) and len(report.left_out) == len(BAD)
    faults = dict(fault.split(": ", 1) for fault in report.left_out)
    wanted = iter(BAD.values())
    for n, (name, text) in enumerate(pairs, 1):
        if f"metadata.jsonl row {n}" in faults:
            fault = faults[f"metadata.jsonl row {n}"]
            assert next(wanted) in fault and "\n" not in fault, (name, text, fault)
    assert [row["text"] for row in rows] == [str(text) for text in GOOD.values()]
    chosen = settings(folder)
    for row, name in zip(rows, GOOD, strict=True):
        forms = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        path = next(path for path in (folder / name, *forms) if path.is_file())
        audio, _ = measure_clip(path, chosen)
        codes = codes_to_ids(orpheus.codec.encode(codec, [audio])[0], ids)
        assert (row["input_ids"][-2 - len(codes) : -2] == codes).all(), name


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
    rows, report = rows_of(tmp_path, tokenizer)
    assert len(rows) == 1 and report.voices == {"x y": 1}
    with pytest.raises(UserError, match=fault):
        raise UserError(report.left_out[0])
    assert report.reasons.total() == 1 and ("broken row" not in report.reasons), report.reasons


def test_marks_of_right_to_left_text_stay(tmp_path, tokenizer):
    folder = folder_of(tmp_path, [("a.wav", "\u200fשלום\u200f", ""), ("b.wav", "می\u200cروم", "")])
    two_clips(tmp_path)
    assert texts_of(folder, tokenizer) == ["\u200fשלום\u200f", "می\u200cروم"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path, tokenizer):
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    (tmp_path / "a.wav").chmod(0)
    rows, report = rows_of(tmp_path, tokenizer)
    assert len(rows) == 1 and "a.wav" in report.left_out[0]


def test_absolute_paths_on_request(tmp_path, tokenizer):
    two_clips(tmp_path / "sounds")
    folder_of(tmp_path / "set", [(str(tmp_path / "sounds/a.wav"), "one", "x")])
    with pytest.raises(UserError, match="outside the dataset's folder"):
        rows_of(tmp_path / "set", tokenizer)
    assert len(rows_of(tmp_path / "set", tokenizer, absolute_paths="true")[0]) == 1


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["a.flac", "texts.csv"], "; save texts.csv as metadata.csv with a header"),
        (["a.m4a", "a.txt"], "; convert a.m4a with ffmpeg to flac"),
        (["state.json", "data-00000-of-00001.arrow"], "write it with to_parquet instead"),
        (["train/metadata.csv", "test/metadata.csv"], "/test has a table: give it as --dataset"),
        (["a.flac"], "(data/README.md has the forms)"),
    ],
)
def test_a_folder_without_a_table_is_told_what_to_do(names, remedy, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_clips(read_settings("data/demo/config.json", {"dataset": str(tmp_path)}))
    assert str(caught.value).startswith(f"{tmp_path}: no metadata.csv, ")
    assert remedy in str(caught.value)
