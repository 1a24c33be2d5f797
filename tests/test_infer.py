"""infer.py: ids and recordings in place of texts, options, and a person's mistakes."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import soundfile
from conftest import one_line
from running import same_file
from speaking import SHORT, say

import infer
import orpheus.codec
from orpheus.audio import read_audio
from orpheus.codec import encode
from orpheus.models import load_tokenizer
from orpheus.tokens import codes_to_ids, read_tokens


def test_wav_and_tokens(tmp_path, ids, codec, monkeypatch, capsys):
    recording = tmp_path / "in.wav"
    soundfile.write(recording, np.random.default_rng(4).normal(0, 0.1, (22_050, 2)), 22_050)
    words = ["--model", "data/demo/base", "--codec", "data/demo/codec"]
    say(monkeypatch, "--wav", recording, *words, "--out", tmp_path / "heard.wav")
    assert "12 frames" in capsys.readouterr().out
    heard, rate = soundfile.read(tmp_path / "heard.wav", dtype="float32")
    assert (len(heard), rate) == (12 * 2048, 24_000)
    codes = encode(codec, [read_audio(recording)[0]])[0]
    assert abs(orpheus.codec.decode(codec, codes) - heard).max() < 1e-3  # 16-bit wav

    speech = [ids.sos, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
    names = "".join(f"<custom_token_{n - ids.audio + 10}>" for n in speech[1:-2])
    for n, text in enumerate([json.dumps(speech), " ".join(map(str, speech)), names]):
        (tmp_path / "ids").write_text(text)
        read = read_tokens(tmp_path / "ids", load_tokenizer("data/demo/base"), codec.codebook_size)
        assert (read == codes).all(), n
    say(monkeypatch, "--tokens", tmp_path / "ids", *words, "--out", tmp_path / "ids.wav")
    assert (soundfile.read(tmp_path / "ids.wav", dtype="float32")[0] == heard).all()


def test_stream_pipe_and_file_are_bit_for_bit_the_same(tmp_path, monkeypatch, capfdbinary):
    words = ["seven two nine", *SHORT, "--voice", "rms"]
    say(monkeypatch, *words, "--out", tmp_path / "whole.wav")
    whole = soundfile.read(tmp_path / "whole.wav", dtype="int16")[0]
    assert len(whole) > 0
    say(monkeypatch, *words, "--stream", "--out", tmp_path / "grown.wav")
    printed = capfdbinary.readouterr().out
    assert b"first audio after" in printed and b"real-time factor" in printed
    assert np.array_equal(soundfile.read(tmp_path / "grown.wav", dtype="int16")[0], whole)
    for name, header in (("-", 44), ("pcm", 0)):
        say(monkeypatch, *words, "--out", name)
        sys.__stdout__.flush()
        piped = capfdbinary.readouterr()
        assert np.array_equal(np.frombuffer(piped.out[header:], "<i2"), whole), name
        assert b"first audio after" in piped.err


def test_texts_of_a_file_have_their_numbers(tmp_path, monkeypatch, capsys):
    """An empty line separates paragraphs, of which each has its wav; they are as said alone."""
    lines = tmp_path / "lines.txt"
    lines.write_text("seven\ntwo\n\nnine\n")
    say(monkeypatch, "--file", lines, *SHORT, "--out", tmp_path / "said")
    assert f"{lines}: 2 paragraphs" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "said").iterdir()) == ["001.wav", "002.wav"]
    for text, name in (("seven two", "001.wav"), ("nine", "002.wav")):
        say(monkeypatch, text, *SHORT, "--out", tmp_path / "alone.wav")
        assert same_file(tmp_path / "alone.wav", tmp_path / "said" / name)


def test_the_settings_of_a_config_go_over_those_of_the_run(run_folder, tmp_path, monkeypatch):
    """From any folder, with a checkpoint."""
    (tmp_path / "mine.json").write_text('{"max_seconds": 0.2, "lora_r": 3, "output_dir": "other"}')
    monkeypatch.chdir(tmp_path)
    say(monkeypatch, "two", "--model", run_folder / "checkpoint-3", "--config", "mine.json")
    assert soundfile.info("out.wav").frames == 2 * 2048


def bad_tokens(tmp_path, text):
    path = tmp_path / f"ids{len(list(tmp_path.iterdir()))}.txt"
    path.write_text(text)
    return ["--tokens", path, "--model", "data/demo/base", "--codec", "data/demo/codec"]


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "llama").mkdir()
    shutil.copytree("data/demo/codec", tmp_path / "snac")
    (tmp_path / "snac/pytorch_model.bin").write_bytes(b"no weights")
    demo = ["--codec", "data/demo/codec", "--model", "data/demo/base"]
    cases = [
        ([*demo, "?!"], "nothing to speak"),
        ([*demo, "seven", "\U0001f600"], "nothing to speak"),
        (["--file", tmp_path / "empty"], "the text is empty"),
        (["--file", tmp_path / "none"], "cannot be read"),
        (["hi", "--model", tmp_path / "none"], "no such folder"),
        (["hi", "--model", "data/demo/base", "--codec", tmp_path / "none"], "no such folder"),
        (
            ["hi", "--model", "data/demo/base", "--codec", tmp_path / "llama"],
            "of a codec, as snac_24khz has",
        ),
        (["hi", "--model", tmp_path / "llama", *demo[:2]], "no adapter or model in it"),
        (["hi", "--model", "outputs/my voice"], "not a hub id"),
        (["hi", "--model", "data/demo/bas"], "no such folder"),
        (["hi", "--model", "some/model"], "the hub cannot be reached"),
        (["hi", "--model", "data/demo/base", "--codec", "some/codec"], "hub cannot be reached"),
        (["hi", *demo[2:], "--codec", tmp_path / "snac"], r"pytorch_model\.bin: damaged"),
        (["hi", *demo, "--temperature", "warm"], "temperature"),
        (["hi", *demo, "--out", tmp_path / "a.xyz", "--max_seconds", "0.2"], "end the name in"),
        (["--wav", tmp_path / "none.wav", *demo], "does not exist"),
        (["--wav", tmp_path / "text.wav", *demo], "not audio"),
        ([*demo, "hi", "--stream", "--out", tmp_path / "a.flac"], "a stream goes to a .wav"),
        ([*demo, "hi", "--stream", "--best_of", "2"], "leave out best_of"),
        ([*demo, "hi", "again", "--out", "-"], "several texts need a folder"),
        ([*demo, "hi", "--out", tmp_path / "empty/a.wav"], "cannot be written"),
        ([*demo, "hi", "--stream", "--out", tmp_path / "empty/a.wav"], "cannot be written"),
        (bad_tokens(tmp_path, "1 2 3"), "no whole frame"),
        (bad_tokens(tmp_path, "1 2 3 4 5 6 7"), "no whole frame"),
        (bad_tokens(tmp_path, "hello"), "neither <custom"),
    ]
    for words, line in cases:
        assert re.search(line, one_line(infer.main, monkeypatch, *words)), words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hi", "--temprature", "1"], "the nearest is .temperature"),
        ([], "give one of"),
        (["hi", "--model", "outputs/nothing_here"], "^outputs/nothing_here: no such folder"),
        (["hi", "--model", "tests/nothing_here"], "^tests/nothing_here: no such folder"),
        (["hi", "ho", "--out", "a.wav"], "several texts need a folder, such as --out out/"),
        (["hi", "--config", "none.json"], "none.json: cannot be read"),
        (["hi", "--language", "English", "--model", "data/demo/base"], "language is"),
    ],
)
def test_mistakes_of_infer(words, line, monkeypatch):
    assert re.search(line, one_line(infer.main, monkeypatch, *words)), words
