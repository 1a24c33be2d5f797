"""orpheus/encoding.py: codes and the cache of them, pretokenised rows."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from clip_folders import folder_of, noise, parquet_with_bytes, rows_of, same, two_clips
from conftest import DEMO, ROOT
from tqdm import tqdm

import orpheus.codec
import orpheus.encoding
from orpheus.settings import UserError
from orpheus.tokens import codes_to_ids, prompt_ids


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
        faults = " ".join(report.left_out)
        if name == "input_ids":
            assert len(rows) == 1 and len(report.left_out) == 3
            assert "position 1 (frame 0, slot 1) belongs in slot 2" in faults
            assert "no EOS" in faults and "labels for" in faults
        else:
            assert len(rows) == 2 and len(report.left_out) == 3
            assert "no codes in this row" in faults
            assert "in frame 0: codes go from 0 to" in faults and "neither frames of 7" in faults


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
def test_faults_of_rows_tokenised_elsewhere(change, fault, tmp_path, tokenizer, ids):
    codes = np.ones((2, 7), dtype=np.int64)
    prompt = prompt_ids(tokenizer, ids, "one", "x")
    row = [*prompt, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
    labels = [-100] * len(prompt) + row[len(prompt) :]
    if "at" in change:
        row[change["at"]] = change["id"]
    if "labels" in change:
        labels = [-100] * len(row)
    labels[0] = change.get("label", -100)
    table = {"input_ids": row, "labels": labels}
    if "codes" in change:
        table = change | {"text": "one"}
    (tmp_path / "list.jsonl").write_text(json.dumps(table))
    with pytest.raises(UserError, match=fault):
        rows_of(tmp_path / "list.jsonl", tokenizer)


@pytest.fixture
def made(tokenizer, ids):
    """make(text, frames): the ids of a clip as a notebook makes them, with its prompt's length."""

    def make(text, frames):
        codes = np.random.default_rng(frames).integers(0, ids.codebook_size, (frames, 7))
        prompt = prompt_ids(tokenizer, ids, text)
        row = [*prompt, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
        return row, [-100] * len(prompt) + row[len(prompt) :]

    return make


def test_every_way_to_save_tokenised_rows(tmp_path, tokenizer, ids, made):
    """With and without labels, padded on either side with any id, chained, with columns of texts.

    As the published notebook saves them: labels are the input_ids, with an attention_mask.
    """
    (one, masked), (two, masked_two) = made("anna: one <laugh>", 3), made("ben: two", 5)

    def pad(row, pads, value, left=False):
        return [value] * pads + row if left else row + [value] * pads

    mask = [1] * len(one)
    cases = {"notebook": ({"input_ids": one, "labels": one, "attention_mask": mask}, one)}
    cases["bare"] = {"input_ids": one}, masked
    cases["prompt masked"] = {"input_ids": one, "labels": masked}, masked
    cases["without EOA"] = {"input_ids": one[:-1]}, masked[:-1]
    for value in (ids.pad, ids.eot, ids.eos, ids.eoa, 0):
        for left in (False, True):
            padded = pad(one, 9, value, left)
            keys = {"input_ids": padded, "labels": padded}
            cases[f"pads {value}, left {left}"] = keys, one
            if value != ids.eoa or left:
                keys = {"input_ids": padded, "attention_mask": pad(mask, 9, 0, left)}
                cases[f"pads {value} hidden, left {left}"] = keys, masked
    cases["pads without loss"] = {"input_ids": pad(one, 3, -1), "labels": pad(one, 3, -100)}, one
    for name, (columns, labels) in cases.items():
        (tmp_path / "rows.jsonl").write_text(json.dumps(columns))
        (row,), report = rows_of(tmp_path / "rows.jsonl", tokenizer)
        assert row["input_ids"].tolist() == one[: len(labels)], name
        assert row["labels"].tolist() == labels, name
        assert (row["text"], row["voice"]) == ("one <laugh>", "anna"), name
        assert report.characters == len("one <laugh>") and report.tags == {"<laugh>": 1}
    chained = one[9:] + one + two + one[:15]  # as pre-training cuts a stream of clips into rows
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": chained}))
    rows, report = rows_of(tmp_path / "rows.jsonl", tokenizer, leave_out="[]")
    assert [row["labels"].tolist() for row in rows[1:]] == [masked, masked_two]
    assert report.voices == {"anna": 1, "ben": 1}
    assert report.left_out == []
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": one, "text": "anna: One!"}))
    rows, _ = rows_of(tmp_path / "rows.jsonl", tokenizer, voice="eve")
    assert (rows[0]["text"], rows[0]["voice"]) == ("One!", "anna")


@pytest.mark.parametrize(
    "prompt, text, voice",
    [
        ("tara: hello", "hello", "tara"),
        ("p225: the plan: wait", "the plan: wait", "p225"),
        ("Anna Lee: hello", "hello", "Anna Lee"),  # the voice that the settings name
        ("she said: hello", "she said: hello", ""),
        ("at 10:30 sharp", "at 10:30 sharp", ""),
        ("hello", "hello", ""),
    ],
)
def test_the_voice_of_a_tokenised_row_is_that_of_its_prompt(
    prompt, text, voice, tmp_path, tokenizer, made
):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": made(prompt, 3)[0]}))
    rows, report = rows_of(tmp_path / "rows.jsonl", tokenizer, voice="Anna Lee")
    assert (rows[0]["text"], rows[0]["voice"]) == (text, voice)
    assert list(report.voices) == ([voice] if voice else [])


def test_codes_with_their_slots_are_codes(tmp_path, tokenizer, ids, made):
    """As the notebook's codes_list has them: the ids of the audio."""
    (row, labels), codes = made("one", 4), "codes_list"
    audio = [label for label in labels if label != -100][:-2]
    (tmp_path / "rows.jsonl").write_text(json.dumps({codes: audio, "text": "one"}))
    rows, _ = rows_of(tmp_path / "rows.jsonl", tokenizer)
    assert rows[0]["input_ids"].tolist() == row
    audio[8] = ids.audio
    (tmp_path / "rows.jsonl").write_text(json.dumps({codes: audio, "text": "one"}))
    with pytest.raises(UserError, match=r"frame 1, slot 1\) belongs in slot 0"):
        rows_of(tmp_path / "rows.jsonl", tokenizer)


def test_ids_come_before_codes(tmp_path, tokenizer, ids):
    """In a table that has both, whose rows then need no text."""
    codes = np.ones((2, 7), dtype=np.int64)
    prompt = prompt_ids(tokenizer, ids, "one", "x")
    row = [*prompt, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
    table = {"input_ids": row, "codes": (codes + 1).tolist()}
    (tmp_path / "list.jsonl").write_text(json.dumps(table))
    rows, _ = rows_of(tmp_path / "list.jsonl", tokenizer)
    assert rows[0]["input_ids"].tolist() == row


@pytest.fixture
def work(monkeypatch):
    """Counts the recordings that are decoded and encoded, and the codecs that are loaded."""
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
    again, second = rows_of(tmp_path / "one", tokenizer, **cache)
    assert work() == (2, 2, 1) and second.cached == 2 and same(first, again)
    assert second.measures == report.measures and second.lengths == report.lengths
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
    output = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    _, report = rows_of("data/numbers", tokenizer, limit=9)
    saved = json.loads((tmp_path / "out/data_report.json").read_text())
    assert saved["digest"] == report.digest and saved["rows"] == 9
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 9 and all(json.loads(p.read_text())["codes"] for p in files)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["data_report.json", "data_report.png"]


def test_an_error_while_encoding_leaves_no_trace(tmp_path, tokenizer, monkeypatch):
    """Neither in torch's number of threads nor as an open progress bar."""
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    closed, threads = [], torch.get_num_threads()

    class Bar(tqdm):
        def close(self):
            closed.append(self)
            super().close()

    def broken(codec, clips):
        raise RuntimeError("no encoder")

    monkeypatch.setattr(orpheus.encoding, "tqdm", Bar)
    monkeypatch.setattr(orpheus.encoding, "encode", broken)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no encoder"):
            rows_of(tmp_path, tokenizer)
        assert torch.get_num_threads() == 2 and closed
    finally:
        torch.set_num_threads(threads)
