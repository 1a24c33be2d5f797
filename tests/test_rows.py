"""orpheus/rows.py: codes and their cache, rows, and rows of unequal length in batches.

All on the transformers backend: importing unsloth would patch TRL for the whole process.
"""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from clip_folders import folder_of, noise, parquet_with_bytes, rows_of, same, settings, two_clips
from conftest import DEMO, ROOT, script
from datasets import Dataset
from running import settings_of
from tqdm import tqdm

import finetune
import orpheus.codec
import orpheus.rows
from orpheus.audio import measure_clip
from orpheus.clips import Clip, Clips, read_clips
from orpheus.rows import (
    Rows,
    choose_held_out,
    count_packed,
    length_batches,
    make_row,
    make_rows,
    slots_used,
    steps_per_epoch,
)
from orpheus.settings import UserError, read_settings
from orpheus.tokens import FRAME_SAMPLES, codes_to_ids, ids_to_codes, prompt_ids
from orpheus.trainer import check_compatibility, resolve_settings


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
    monkeypatch.setattr(orpheus.rows, "load_codec", None)
    train, held_out, report = make_rows(read_clips(chosen), chosen, tokenizer, codec)
    assert len(train) + len(held_out) == len(report.measures) == 6
    assert report.held_out == len(held_out) > 0


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
        ({"at": 1, "id": None}, "not a list of whole numbers"),
        ({"label": 7}, "label 7 at position 0 is neither -100 nor"),
        ({"labels": "none"}, "every label is -100"),
        ({"codes": [[1.5] * 7]}, "not a list of whole numbers"),
        ({"codes": []}, "no frame"),
        ({"codes": {"0": 1}}, "not a list of whole numbers"),
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
    done = {"measure_clip": 0, "encode": 0}

    def count(module, name):
        real = getattr(module, name)

        def counted(*words):
            done[name] += 1
            return real(*words)

        monkeypatch.setattr(module, name, counted)

    for name in done:
        count(orpheus.rows, name)
    return lambda: (done["measure_clip"], done["encode"])


def test_a_second_run_neither_decodes_nor_encodes(tmp_path, tokenizer, work):
    """Nor does another set of the same clips; another codec or another trimming does."""
    two_clips(tmp_path / "one")
    folder_of(tmp_path / "one", [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/b.wav").rename(tmp_path / "two/c.wav")
    folder_of(tmp_path / "two", [("a.wav", "five", "y"), ("c.wav", "six", "y")])
    cache = {"cache_dir": tmp_path / "cache"}
    first, report = rows_of(tmp_path / "one", tokenizer, **cache)
    assert work() == (2, 2) and report.cached == 0
    again, second = rows_of(tmp_path / "one", tokenizer, **cache)
    assert work() == (2, 2) and second.cached == 2 and same(first, again)
    assert second.measures.table == report.measures.table and second.lengths == report.lengths
    assert rows_of(tmp_path / "two", tokenizer, **cache)[1].cached == 2
    assert work() == (2, 2)
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
    assert report.cached == 2 and work() == (2, 2) and same(rows, again)


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


def test_ranks_share_the_encoding(tmp_path, tokenizer, monkeypatch):
    """Each encodes every other clip; then the first makes the rows, and they are those of one."""
    two_clips(tmp_path, [f"{n}.wav" for n in range(7)])
    folder_of(tmp_path, [(f"{n}.wav", f"text {n}", "x") for n in range(7)])
    cache, encoded, sent = {"cache_dir": tmp_path / "cache"}, [], []
    load = orpheus.rows.load_recording

    def counted(made, *words):
        load(made, *words)
        encoded.append(int(made.text[5:]))

    def broadcast(made):
        sent.extend(made)
        return sent[-1:] if made != [None] else [rank_0]

    monkeypatch.setattr(orpheus.rows, "load_recording", counted)
    monkeypatch.setattr(orpheus.rows, "broadcast_object_list", broadcast)
    monkeypatch.setattr(orpheus.rows, "WORLD_SIZE", 2)
    monkeypatch.setattr(orpheus.rows, "RANK", 1)
    rank_0 = (tmp_path / "not there", None)
    rows_of(tmp_path, tokenizer, **cache)  # the first rank's file is not on this machine
    assert sorted(encoded[:3]) == [1, 3, 5] and len(encoded) == 7
    shutil.rmtree(tmp_path / "cache")
    encoded.clear()
    monkeypatch.setattr(orpheus.rows, "RANK", 0)
    rows, report = rows_of(tmp_path, tokenizer, **cache)
    assert sorted(encoded[:4]) == [0, 2, 4, 6]
    monkeypatch.setattr(orpheus.rows, "WORLD_SIZE", 1)
    alone, other = rows_of(tmp_path, tokenizer)
    assert same(rows, alone) and report.digest == other.digest


def cached_files(folder):
    return sorted(path for path in folder.glob("*/*/*") if path.is_file())


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"[]\n"])
def test_a_torn_file_in_the_cache_is_made_anew(damage, tmp_path, tokenizer):
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    cache = {"cache_dir": tmp_path / "cache"}
    rows, _ = rows_of(tmp_path, tokenizer, **cache)
    whole = {path: path.read_bytes() for path in cached_files(tmp_path / "cache")}
    for path, data in whole.items():
        path.write_bytes(damage(data))
    again, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 0 and same(rows, again)
    assert {path: path.read_bytes() for path in cached_files(tmp_path / "cache")} == whole
    assert rows_of(tmp_path, tokenizer, **cache)[1].cached == 2


def test_a_second_start_opens_no_recording(tmp_path, tokenizer, monkeypatch):
    """Their names, sizes and times are enough; what has changed is read anew."""
    two_clips(tmp_path)
    folder_of(tmp_path, [("a.wav", "one", "x"), ("b.wav", "two", "x")])
    cache = {"cache_dir": tmp_path / "cache"}
    rows, _ = rows_of(tmp_path, tokenizer, **cache)
    opened = []
    load = orpheus.rows.load_recording
    monkeypatch.setattr(
        orpheus.rows, "load_recording", lambda *words: (opened.append(words[1].audio), load(*words))
    )
    again, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 2 and same(rows, again) and not opened
    times = os.stat(tmp_path / "b.wav")
    size = len((tmp_path / "b.wav").read_bytes())
    noise(tmp_path / "b.wav", seed=5)
    os.utime(tmp_path / "b.wav", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len((tmp_path / "b.wav").read_bytes()) == size
    other, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 1 and opened == [tmp_path / "b.wav"]
    assert same(rows[:1], other[:1]) and not same(rows[1:], other[1:])
    (tmp_path / "b.wav").rename(tmp_path / "c.wav")  # hashed, and found by that
    folder_of(tmp_path, [("a.wav", "one", "x"), ("c.wav", "two", "x")])
    moved, report = rows_of(tmp_path, tokenizer, **cache)
    assert report.cached == 2 and len(opened) == 2 and same(other, moved)
    rows_of(tmp_path, tokenizer, **cache)
    assert len(opened) == 2


def test_the_cache_has_its_files_in_many_folders(tmp_path, tokenizer):
    rows_of("data/numbers", tokenizer, cache_dir=tmp_path, leave_out="[]")
    files = cached_files(tmp_path)
    assert len(files) == 96 + 94 and len({path.parent for path in files}) > 96
    assert len(list(tmp_path.iterdir())) == 1 + len(list(tmp_path.glob("rows-*")))


def peak(count, tokenizer, ids):
    """Bytes that Python and numpy hold at most while `count` rows of 980 tokens are made."""
    prompt = prompt_ids(tokenizer, ids, "one two three", "x")
    audio = codes_to_ids(np.ones((137, 7), dtype=int), ids).tolist()
    columns = {"input_ids": [*prompt, *audio, ids.eos, ids.eoa]}
    chosen = settings("x", leave_out="[]", max_length=1024)
    tracemalloc.start()
    clips = Clips((Clip(f"row {n}", pretokenized=columns) for n in range(count)), count)
    rows, _, report = make_rows(clips, chosen, tokenizer)
    texts = sum(len(row["text"]) for row in rows)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == len(report.measures) == count and texts == report.characters
    return held


def test_memory_does_not_grow_with_the_rows(tokenizer, ids):
    """But for the report's lines on clips with findings: 16 bytes a token would be 28 MB here."""
    few, many = (peak(count, tokenizer, ids) for count in (200, 2000))
    assert many - few < 4e6


def test_a_killed_run_goes_on_where_it_was(tmp_path, tokenizer, monkeypatch):
    two_clips(tmp_path, [f"{n}.wav" for n in range(10)])
    folder_of(tmp_path, [(f"{n}.wav", f"text {n}", "x") for n in range(10)])
    encode, eighth = orpheus.codec.encode, soundfile.read(tmp_path / "8.wav", dtype="float32")[0]

    def killed(codec, clips):
        if np.array_equal(clips[0], eighth):
            raise KeyboardInterrupt
        return encode(codec, clips)

    monkeypatch.setattr(orpheus.rows, "encode", killed)
    cache = {"cache_dir": tmp_path / "cache", "keep_silence": "null"}
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path, tokenizer, **cache)
    monkeypatch.setattr(orpheus.rows, "encode", encode)
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
    assert len(cached_files(tmp_path / "cache")) == 2 * 9
    assert not list((tmp_path / "cache").glob("rows-*"))
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

    monkeypatch.setattr(orpheus.rows, "tqdm", Bar)
    monkeypatch.setattr(orpheus.rows, "encode", broken)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no encoder"):
            rows_of(tmp_path, tokenizer)
        assert torch.get_num_threads() == 2 and closed
    finally:
        torch.set_num_threads(threads)


PLAIN = {"backend": "transformers", "gradient_checkpointing": "false"}


@pytest.fixture
def rows(ids):
    """Twelve rows as prepare makes them, 40 to 240 tokens, of random legal codes."""
    draw = np.random.default_rng(5)
    settings = read_settings("data/demo/config.json")
    codes = [draw.integers(0, ids.codebook_size, (n, 7)) for n in draw.integers(3, 32, 12)]
    rows = [make_row([ids.soh, ids.bos, 65, ids.sos], c, ids, settings) for c in codes]
    return Rows(Dataset.from_list([row | {"text": "a", "voice": ""} for row in rows]))


@pytest.fixture
def trainer_of(tmp_path, tokenizer, rows):
    """A trainer over `rows`, and its settings, for these keys."""

    def make(**overrides):
        assert "unsloth" not in sys.modules
        overrides = {"output_dir": str(tmp_path / "out"), **PLAIN, **overrides}
        settings = resolve_settings(read_settings("data/demo/config.json", overrides))
        arguments = finetune.make_sft_config(settings)
        check_compatibility(settings, arguments)
        model = finetune.load_model(settings, arguments)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():  # else half of the gradients are zero
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        return finetune.make_trainer(model, tokenizer, rows.dataset, arguments, settings, None)

    return make


def losses_and_gradients(model, batches):
    """(summed loss, gradients end to end) over batches, in fp32."""
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        part = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        part.backward()
        loss += part.item()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss, torch.cat(grads)


def one_by_one(rows):
    return [
        {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "labels")} for row in rows
    ]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_packed_equals_row_by_row_and_a_contaminated_pack_does_not(trainer_of, rows):
    trainer = trainer_of(batching="pack", per_device_train_batch_size="1", max_length="512")
    model = trainer.model.float().eval()
    packed = list(trainer.get_train_dataloader())
    assert len(packed) < len(rows) and all("attention_mask" not in batch for batch in packed)
    assert all("position_ids" in batch for batch in packed)
    alone, alone_grads = losses_and_gradients(model, one_by_one(rows))
    again = [dict(batch) for batch in packed]
    loss, grads = losses_and_gradients(model, again)
    assert abs(loss / alone - 1) < 1e-5
    assert relative(grads, alone_grads) < 1e-5
    spoilt = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in packed]
    loss, grads = losses_and_gradients(model, spoilt)
    assert abs(loss / alone - 1) > 1e-5 and relative(grads, alone_grads) > 1e-3


@pytest.mark.parametrize("batching", ["pad", "pad_to_max"])
def test_padded_equals_row_by_row(trainer_of, rows, ids, batching):
    trainer = trainer_of(batching=batching, per_device_train_batch_size="4", max_length="256")
    model = trainer.model.float().eval()
    batches = list(trainer.get_train_dataloader())
    for batch in batches:
        shape = batch["input_ids"].shape
        assert batch["attention_mask"].shape == batch["labels"].shape == shape
        blank = batch["attention_mask"] == 0
        assert (batch["labels"][blank] == -100).all()
        assert (batch["input_ids"][blank] == ids.pad).all()
        longest = 256 if batching == "pad_to_max" else int(batch["attention_mask"].sum(1).max())
        assert shape[1] == longest
    alone, alone_grads = losses_and_gradients(model, one_by_one(rows))
    loss, grads = losses_and_gradients(model, batches)
    assert abs(loss / alone - 1) < 1e-5
    assert relative(grads, alone_grads) < 1e-5


@pytest.mark.parametrize("batching", ["pack", "pad", "pad_to_max"])
def test_the_doctor_tells_of_batches_what_the_trainer_does(trainer_of, rows, capsys, batching):
    keys = {"batching": batching, "per_device_train_batch_size": "2", "max_length": "256"}
    trainer_of(**keys)
    lengths = [len(row["input_ids"]) for row in rows]
    used = slots_used(lengths, read_settings("data/demo/config.json", keys))
    assert f"{100 * used[batching]:.1f} % used; 2 rows a step; " in capsys.readouterr().out


@pytest.mark.parametrize("batching", ["pack", "pad", "pad_to_max"])
@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_the_doctor_counts_steps_as_the_trainer_does(trainer_of, rows, batching, accumulation):
    keys = {"batching": batching, "per_device_train_batch_size": "2", "max_length": "256"}
    keys |= {"gradient_accumulation_steps": accumulation, "max_steps": "-1"}
    trainer = trainer_of(**keys, num_train_epochs="1")
    settings = read_settings("data/demo/config.json", keys)
    lengths = [len(row["input_ids"]) for row in rows]
    assert trainer.total_steps == steps_per_epoch(lengths, settings) > 1


def test_packed_rows_are_counted_as_trl_packs_them():
    """Which packs each thousand rows by itself."""
    from trl import pack_dataset

    for count in (300, 1000, 3000):
        lengths = np.random.default_rng(count).integers(20, 1024, count).tolist()
        table = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        assert count_packed(lengths, 1024) == len(pack_dataset(table, 1024, "bfd")), count


def test_length_batches_are_alike_whole_and_repeatable():
    lengths = np.random.default_rng(0).integers(50, 2000, 1003).tolist()
    order = length_batches(lengths, 8, seed=1)
    assert sorted(order) == list(range(1003))
    assert order == length_batches(lengths, 8, seed=1)
    assert order != length_batches(lengths, 8, seed=2)
    batches = [[lengths[row] for row in order[n : n + 8]] for n in range(0, 1003, 8)]
    slots = sum(len(batch) * max(batch) for batch in batches)
    assert sum(lengths) / slots > 0.95
    assert len(batches[-1]) == 3


def test_length_sampler_changes_with_the_epoch(trainer_of):
    sampler = trainer_of(batching="pad", per_device_train_batch_size="2")._get_train_sampler()
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == sorted(first)


def test_truncated_rows_end_at_a_frames_edge_without_an_end(ids):
    settings = read_settings("data/demo/config.json", {"too_long": "truncate"})
    settings.max_length = 40
    prompt = [ids.soh, ids.bos, 65, 66, ids.sos]
    codes = np.random.default_rng(0).integers(0, ids.codebook_size, (10, 7))
    row = make_row(prompt, codes, ids, settings)
    assert len(row["input_ids"]) == 5 + 35  # five frames fit, and no end
    assert (ids_to_codes(row["input_ids"][5:], ids) == codes[:5]).all()
    short = make_row(prompt, codes[:4], ids, settings)
    assert short["input_ids"][-2:].tolist() == [ids.eos, ids.eoa] and len(short["input_ids"]) == 35
    settings.max_length = 41  # 5 + 35 + 2 would be over by one: cut, though the frames fit
    assert ids.eos not in make_row(prompt, codes[:5], ids, settings)["input_ids"]


def losses(out):
    state = max(out.glob("checkpoint-*"), key=lambda p: int(p.name[11:])) / "trainer_state.json"
    return [log["loss"] for log in json.loads(state.read_text())["log_history"] if "loss" in log]


@pytest.mark.parametrize("native", ["0", "1"])
def test_both_backends_give_the_same_losses(native, tmp_path, monkeypatch):
    """In fp32, as the demo's config says, whether or not Unsloth finds bfloat16 instructions."""
    monkeypatch.setenv("UNSLOTH_CPU_BF16", native)
    words = [*DEMO, "--limit", "16", "--max_steps", "4", "--logging_steps", "1"]
    words += ["--lr_scheduler_type", "constant", "--sample_texts", "[]"]
    words += ["--per_device_train_batch_size", "4"]
    printed = {}
    for backend in ("unsloth", "transformers"):
        out = tmp_path / backend
        code, printed[backend], errors = script(
            "finetune.py", *words, "--backend", backend, "--output_dir", out
        )
        assert code == 0, errors
    first, second = losses(tmp_path / "unsloth"), losses(tmp_path / "transformers")
    assert len(first) == 4 and first[-1] < first[0]
    assert np.allclose(first, second, rtol=1e-4), (first, second)
    batches = [text.split("batches")[1][:80] for text in printed.values()]
    assert batches[0] == batches[1]


def test_no_text_stands_on_both_sides():
    texts = pa.chunked_array([[f"text {n % 40}" for n in range(60)], ["text 0"] * 40])
    settings = settings_of(held_out="0.25")
    held = choose_held_out(texts, settings)
    texts = np.array(texts.to_pylist())
    assert len(held) == 100 and len(set(texts[held])) == 10
    assert not set(texts[held]) & set(texts[~held])


def test_rows_are_a_sequence(tokenizer):
    rows, report = rows_of("data/numbers", tokenizer, limit=5)
    assert len(rows) == 5 and rows[-1]["text"] == rows[4]["text"] == list(rows)[4]["text"]
    assert [row["text"] for row in rows[1:3]] == [clip.text for clip in report.measures][1:3]
    assert rows[0]["input_ids"].dtype == rows[0]["labels"].dtype == np.int64
    with pytest.raises(IndexError):
        rows[5]
