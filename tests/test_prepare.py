"""data/prepare.py: the accepted forms, rows, what is left out, and a person's mistakes."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import soundfile
import torch
from conftest import DEMO, ROOT, one_line, script

import orpheus.codec
import orpheus.encoding
from data import prepare
from orpheus.batching import count_packed
from orpheus.clips import read_clips
from orpheus.doctor import FINDINGS
from orpheus.encoding import measure_clip, trim
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import UserError, read_settings
from orpheus.tokens import FRAME_SAMPLES, codes_to_ids, ids_to_codes, prompt_ids


def settings(folder, **overrides):
    return read_settings(
        "data/demo/config.json",
        {"dataset": str(folder), "cache_dir": "null", **{k: str(v) for k, v in overrides.items()}},
    )


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


def rows_of(folder, tokenizer, **overrides):
    chosen = settings(folder, **overrides)
    return prepare.make_rows(read_clips(chosen), chosen, tokenizer)


def test_every_row_starts_with_the_prompt_that_infer_builds(tokenizer, codec, ids):
    rows, report = rows_of("data/numbers", tokenizer, limit=20)
    clips = read_clips(settings("data/numbers", limit=20)).each
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


def test_kinds_of_sound_files(tmp_path, tokenizer):
    noise(tmp_path / "a.wav", rate=44_100, channels=2)
    noise(tmp_path / "b.flac", rate=16_000)
    noise(tmp_path / "c.mp3", rate=22_050)
    noise(tmp_path / "d.ogg", rate=48_000, format="OGG", subtype="VORBIS")
    noise(tmp_path / "e.opus", rate=48_000, format="OGG", subtype="OPUS")
    folder_of(
        tmp_path, [(f"{n}", "seven", "") for n in ("a.wav", "b.flac", "c.mp3", "d.ogg", "e.opus")]
    )
    rows, report = rows_of(tmp_path, tokenizer, voice="me")
    assert report.left_out == [] and report.voices == {"me": 5}
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) - min(lengths) <= 7  # an encoder may pad by some milliseconds


# ---------------------------------------------------------------- forms


def two_clips(folder, names=("a.wav", "b.wav")):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        noise(folder / name, seed=seed)


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


def parquet_with_bytes(folder):
    import datasets

    two_clips(folder)
    sounds = [{"bytes": (folder / n).read_bytes(), "path": n} for n in ("a.wav", "b.wav")]
    rows = {"audio": sounds, "transcription": ["one", 'two, "three" four'], "speaker": ["x", "y"]}
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    (folder / "data").mkdir()
    table.to_parquet(folder / "data/train-00000-of-00001.parquet")


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


def test_columns_can_be_named(tmp_path, tokenizer):
    two_clips(tmp_path)
    rows = [("a.wav", "one", "wrong", "x"), ("b.wav", "two", "wrong", "y")]
    folder_of(tmp_path, rows, header=("sound", "spoken", "text", "who"))
    names = {"audio_column": "sound", "text_column": "spoken", "voice_column": "who"}
    rows, report = rows_of(tmp_path, tokenizer, **names)
    assert [row["text"] for row in rows] == ["one", "two"] and report.voices == {"x": 1, "y": 1}
    with pytest.raises(UserError, match="no column spoke; there are: sound, spoken, text, who"):
        rows_of(tmp_path, tokenizer, **names | {"text_column": "spoke"})


def test_rows_tokenised_elsewhere(tmp_path, tokenizer, ids):
    """input_ids with and without labels, codes as frames and as SNAC's levels; faults by place."""
    codes = np.random.default_rng(0).integers(0, ids.codebook_size, (3, 7))
    prompt = prompt_ids(tokenizer, ids, "one", "x")
    whole = [*prompt, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    levels = [codes[:, [0]].ravel(), codes[:, [1, 4]].ravel(), codes[:, [2, 3, 5, 6]].ravel()]
    swapped = [*whole]
    swapped[len(prompt) + 1], swapped[len(prompt) + 2] = (
        whole[len(prompt) + 2],
        whole[len(prompt) + 1],
    )
    tables = {
        "input_ids": [
            {"input_ids": whole, "labels": labels},
            {"input_ids": swapped, "labels": labels},
            {"input_ids": whole[:-2], "labels": labels[:-2]},
            {"input_ids": whole, "labels": labels[1:]},
        ],
        "codes": [
            {"codes": codes.tolist(), "text": "one", "voice": "x"},
            {"codes": [level.tolist() for level in levels], "text": "one", "voice": "x"},
            {"codes": (codes + 4096).tolist(), "text": "one", "voice": "x"},
            {"codes": [1, 2, 3, 4], "text": "one", "voice": "x"},
            {"labels": [1], "text": "one", "voice": "x"},
        ],
    }
    for name, table in tables.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, table)))
        (tmp_path / name).rename(tmp_path / f"{name}.jsonl")
        rows, report = rows_of(tmp_path / f"{name}.jsonl", tokenizer, leave_out="[]")
        for row in rows:
            assert row["input_ids"].tolist() == whole and row["labels"].tolist() == labels
        told = " ".join(report.left_out)
        if name == "input_ids":
            assert len(rows) == 1 and len(report.left_out) == 3
            assert "position 1 (frame 0, slot 1) belongs in slot 2" in told
            assert "no EOS" in told and "labels for" in told
        else:
            assert len(rows) == 2 and len(report.left_out) == 3
            assert "no codes in this row" in told
            assert "in frame 0: codes go from 0 to" in told and "neither frames of 7" in told


# ---------------------------------------------------------------- faults

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
    ("phone.m4a", "one"): "ffmpeg -i phone.m4a phone.wav",
    ("phone.webm", "one"): "ffmpeg -i phone.webm phone.wav",
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
    rows = [(name, json.loads(t[1:]) if str(t)[:1] == "L" else t) for name, t in BAD]
    rows = [pair for both in itertools.zip_longest(rows, GOOD.items()) for pair in both if pair]
    table = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(table))
    made, report = rows_of(folder, tokenizer)
    assert len(made) == len(GOOD) and len(report.left_out) == len(BAD)
    told = dict(fault.split(": ", 1) for fault in report.left_out)
    wanted = iter(BAD.values())
    for n, (name, text) in enumerate(rows, 1):
        if f"metadata.jsonl row {n}" in told:
            fault = told[f"metadata.jsonl row {n}"]
            assert next(wanted) in fault and "\n" not in fault, (name, text, fault)
    assert [row["text"] for row in made] == [str(text) for text in GOOD.values()]
    chosen = settings(folder)
    for row, name in zip(made, GOOD, strict=True):
        path = (
            next(
                p
                for form in ("NFC", "NFD")
                if (p := folder / unicodedata.normalize(form, name)).is_file()
            )
            if not (folder / name).is_file()
            else folder / name
        )
        audio, _ = measure_clip(path, chosen)
        codes = codes_to_ids(orpheus.codec.encode(codec, [audio])[0], ids)
        assert (row["input_ids"][-2 - len(codes) : -2] == codes).all(), name


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
        with pytest.raises(UserError, match=line) as told:
            rows_of(folder, tokenizer)
        assert "\n" not in str(told.value)


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


# ---------------------------------------------------------------- doctor and cache


def test_the_doctor_finds_what_is_planted(tmp_path, tokenizer):
    """One clip of every finding among forty sound ones; nothing is found in those."""
    draw = np.random.default_rng(0)

    def clip(name, seconds=1.5, level=0.1, text="one two three four five", **how):
        rate, channels = how.pop("rate", 24_000), how.pop("channels", 1)
        audio = draw.normal(0, level, (int(seconds * rate), channels)) + how.pop("offset", 0)
        audio = np.pad(audio, ((0, int(how.pop("tail", 0) * rate)), (0, 0)))
        soundfile.write(tmp_path / name, np.clip(audio, -1, 1), rate)
        rows.append((name, text, "me"))

    rows = []
    for n in range(40):
        text = " ".join(draw.permutation(["one", "two", "three", "four", "five"])) + " a" * n
        clip(f"{n:02}.wav", seconds=len(text) / 15 * draw.uniform(0.9, 1.1), text=text)
    clip("short.wav", 0.3, text="hi there")
    clip("long.wav", 21, text="a long one " * 28)
    clip("silence.wav", tail=2, text="now wait for it to end")
    clip("clipped.wav", level=0.9, text="this one is too loud by far")
    clip("quiet.wav", level=0.005, text="this one can hardly be heard")
    clip("offset.wav", offset=0.1, text="this one is not in the middle")
    clip("no_highs.wav", rate=22_050, text="this one lacks its highest tones")
    clip("narrow.wav", rate=11_025, text="this one is a telephone line")
    clip("narrower.wav", rate=8_000, text="this one is an older telephone")
    clip("stereo.wav", channels=2, text="this one has two channels")
    clip("digits.wav", text="this one costs 99 cents at most")
    clip("link.wav", text="see https://example.org for more")
    clip("pace.wav", 0.6, text="a text that is much longer than what is spoken " * 3)
    clip("same_text.wav", text=rows[0][1], seconds=len(rows[0][1]) / 15)
    (tmp_path / "same_sound.wav").write_bytes((tmp_path / "07.wav").read_bytes())
    rows.append(("same_sound.wav", rows[7][1] + "!", "me"))
    folder_of(tmp_path, rows)
    _, report = rows_of(tmp_path, tokenizer, max_length=4000)
    named = {
        name: [rows[int(re.search(r"row (\d+):", clip)[1]) - 2][0][:-4] for clip in clips]
        for name, clips in report.findings.items()
    }
    assert set(named) == set(FINDINGS)
    assert named["narrow"] == ["narrower", "narrow"]  # the worst comes first
    for name, clips in named.items():
        assert {"unspeakable": "link", "loudness": "quiet"}.get(name, name) in clips, (name, clips)
        sound = [clip for clip in clips if clip.isdigit()]
        assert not sound, (name, sound)
    _, report = rows_of(tmp_path, tokenizer, max_length=4000, leave_out='["pace", "long"]')
    assert len(report.measures) == len(rows) - len(set(named["pace"]) | set(named["long"]))
    with pytest.raises(UserError, match=r"no finding is named 'pase'; there are .*, pace,"):
        rows_of(tmp_path, tokenizer, leave_out='["pase"]')


def test_trimming_keeps_a_short_tail():
    chosen = settings("x", keep_silence=0.1)
    speech = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    hiss = np.random.default_rng(1).normal(0, 0.0003, 24_000).astype(np.float32)
    audio = np.concatenate([hiss, speech, hiss])
    assert abs(len(trim(audio, chosen)) - 1.2 * 24_000) <= 480
    chosen.keep_silence = None
    assert len(trim(audio, chosen)) == 72_000


@pytest.fixture
def work(monkeypatch):
    """What was done in earnest: sounds that were decoded, encoded, codecs that were loaded."""
    done = {"measure_clip": 0, "encode": 0, "load_codec": 0}

    def count(module, name):
        real = getattr(module, name)

        def counted(*words):
            done[name] += 1
            return real(*words)

        monkeypatch.setattr(module, name, counted)

    for name in done:
        count(orpheus.encoding, name)
    return lambda: (done["measure_clip"], done["encode"], done["load_codec"])


def same(rows, others):
    return all(
        row.keys() == other.keys() and all(np.array_equal(row[k], other[k]) for k in row)
        for row, other in zip(rows, others, strict=True)
    )


def test_a_second_run_neither_decodes_nor_encodes(tmp_path, tokenizer, work):
    """Nor does another set of the same clips; another codec or another trimming does."""
    two_clips(tmp_path / "one")
    folder_of(tmp_path / "one", [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/b.wav").rename(tmp_path / "two/c.wav")
    folder_of(tmp_path / "two", [("a.wav", "five", "y"), ("c.wav", "six", "y")])
    cache = {"cache_dir": tmp_path / "cache"}
    first, report = rows_of(tmp_path / "one", tokenizer, **cache)
    assert work() == (2, 2, 1) and report.cached == 0
    again, told = rows_of(tmp_path / "one", tokenizer, **cache)
    assert work() == (2, 2, 1) and told.cached == 2 and same(first, again)
    assert told.measures == report.measures and told.lengths == report.lengths
    assert rows_of(tmp_path / "two", tokenizer, **cache)[1].cached == 2
    assert work() == (2, 2, 1)
    assert rows_of(tmp_path / "one", tokenizer, keep_silence=0.2, **cache)[1].cached == 0
    shutil.copytree("data/demo/codec", tmp_path / "codec")
    weights = torch.load(tmp_path / "codec/pytorch_model.bin")
    next(iter(weights.values())).add_(1)
    torch.save(weights, tmp_path / "codec/pytorch_model.bin")
    other, report = rows_of(tmp_path / "one", tokenizer, codec=tmp_path / "codec", **cache)
    assert report.cached == 0 and not same(first, other)


def test_parquet_bytes_and_files_share_the_cache(tmp_path, tokenizer, work):
    parquet_with_bytes(tmp_path)
    cache = {"cache_dir": tmp_path / "cache"}
    rows, _ = rows_of(tmp_path / "data", tokenizer, **cache)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", 'two, "three" four', "y")])
    again, report = rows_of(tmp_path / "metadata.csv", tokenizer, **cache)
    assert report.cached == 2 and work() == (2, 2, 1) and same(rows, again)


def test_a_longer_max_length_encodes_what_the_cache_cut_off(tmp_path, tokenizer, work):
    noise(tmp_path / "a.wav", 3.0)
    folder_of(tmp_path, [("a.wav", "one", "x")])
    cache = {"cache_dir": tmp_path / "cache"}
    cut, _ = rows_of(tmp_path, tokenizer, max_length=100, too_long="truncate", **cache)
    whole, report = rows_of(tmp_path, tokenizer, max_length=500, **cache)
    assert len(cut) == 1 and report.cached == 0 and work()[1] == 2
    again, report = rows_of(tmp_path, tokenizer, max_length=100, too_long="truncate", **cache)
    assert report.cached == 1 and work()[1] == 2 and same(cut, again)
    assert same(whole, rows_of(tmp_path, tokenizer, max_length=500)[0])


def test_a_torn_file_in_the_cache_is_made_anew(tmp_path, tokenizer):
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    cache = {"cache_dir": tmp_path / "cache"}
    rows, _ = rows_of(tmp_path, tokenizer, **cache)
    first, second = sorted((tmp_path / "cache").rglob("*.json"))
    first.write_bytes(first.read_bytes()[:-9])
    second.write_bytes(b"")
    again, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 0 and same(rows, again)
    assert rows_of(tmp_path, tokenizer, **cache)[1].cached == 2


def test_a_killed_run_goes_on_where_it_was(tmp_path, tokenizer, monkeypatch):
    two_clips(tmp_path, [f"{n}.wav" for n in range(10)])
    folder_of(tmp_path, [(f"{n}.wav", f"text {n}", "x") for n in range(10)])
    encode, eighth = orpheus.codec.encode, soundfile.read(tmp_path / "8.wav", dtype="float32")[0]

    def killed(codec, clips):
        if np.array_equal(clips[0], eighth):
            raise KeyboardInterrupt
        return encode(codec, clips)

    monkeypatch.setattr(orpheus.encoding, "encode", killed)
    cache = {"cache_dir": tmp_path / "cache", "keep_silence": "null"}
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path, tokenizer, **cache)
    monkeypatch.setattr(orpheus.encoding, "encode", encode)
    rows, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 8 and len(rows) == 10
    assert same(rows, rows_of(tmp_path, tokenizer, keep_silence="null")[0])


def start(*words):
    command = [sys.executable, "data/prepare.py", *DEMO, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_on_one_cold_cache(tmp_path, tokenizer):
    """As the ranks of one run do: both get the same rows, no file is torn or left over."""
    words = ["--limit", 9, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    both = [start(*words), start(*words)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    _, report = rows_of("data/numbers", tokenizer, limit=9)
    saved = json.loads((tmp_path / "out/data_report.json").read_text())
    assert saved["digest"] == report.digest and saved["rows"] == 9
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 9 and all(json.loads(p.read_text())["codes"] for p in files)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["data_report.json", "data_report.png"]


def test_the_doctor_leaves_a_run_its_report(tmp_path, monkeypatch):
    """Which names the voices that the run was trained on."""
    (tmp_path / SAVED_CONFIG).write_text("{}")
    (tmp_path / SAVED_REPORT).write_text("the run's")
    words = [*DEMO, "--limit", "2", "--cache_dir", "null", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    prepare.main()
    assert (tmp_path / SAVED_REPORT).read_text() == "the run's"
    assert json.loads((tmp_path / "doctor" / SAVED_REPORT).read_text())["rows"] == 2


def test_packed_rows_are_counted_as_trl_packs_them():
    from datasets import Dataset
    from trl import pack_dataset

    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(20, 1024, 300).tolist()
        table = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        assert count_packed(lengths, 1024) == len(pack_dataset(table, 1024, "bfd"))


def test_rows_over_max_length_are_dropped_whole(tmp_path, tokenizer):
    noise(tmp_path / "short.wav", 0.5)
    noise(tmp_path / "long.wav", 2.0, seed=1)
    folder_of(tmp_path, [("short.wav", "one", "me"), ("long.wav", "two", "me")])
    rows, report = rows_of(tmp_path, tokenizer, max_length=100)
    assert len(rows) == 1 and report.voices == {"me": 1}
    assert report.dropped == ["metadata.csv row 3: 180 tokens, 2.0 s"]
    with pytest.raises(UserError, match="no rows left of 2 clips"):
        rows_of(tmp_path, tokenizer, max_length=40)


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
        (tmp_path, "no metadata.csv, .* no sound file with a .txt beside it"),
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


def test_prepare_by_itself_reports(tmp_path):
    words = ["data/numbers", "--config", "data/demo/config.json", "--limit", "5"]
    code, printed, errors = script("data/prepare.py", *words, "--output_dir", tmp_path)
    assert code == 0, errors
    assert "5 of 5 clips" in printed and "voice slt\n" in printed
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["rows"] == 5 and report["voices"] == {"slt": 5}
    assert (tmp_path / "data_report.png").read_bytes()[:4] == b"\x89PNG"
