"""infer.py: settings, ids and recordings in place of texts, and a person's mistakes."""

import json
import re
import resource
import shutil

import numpy as np
import pytest
import soundfile
from conftest import one_line, script

import infer
import orpheus.codec
from orpheus.audio import audio_file, read_audio
from orpheus.codec import encode
from orpheus.models import fetch, load_tokenizer
from orpheus.settings import UserError, read_settings
from orpheus.tokens import (
    codes_to_ids,
    read_tokens,
)

# ---------------------------------------------------------------- speaking


def test_a_gated_model_is_told_in_one_line(monkeypatch):
    import httpx
    import huggingface_hub

    def gated(*_, **__):
        answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise huggingface_hub.errors.GatedRepoError("403", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(UserError, match="some/model: gated: accept its terms"):
        fetch("some/model", ["*"])


# ---------------------------------------------------------------- settings


def test_settings_layers(tmp_path):
    config = tmp_path / "mine.json"
    config.write_text('{"lora_r": 8, "temperature": 1}')
    overrides = {"lora_r": "32", "sample_texts": '["a", "b"]', "limit": "null", "voice": "7"}
    settings = read_settings(config, overrides)
    assert (settings.lora_r, settings.temperature, settings.limit) == (32, 1.0, None)
    assert (settings.sample_texts, settings.voice) == (["a", "b"], "7")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lora_r": "many"}, "lora_r"),
        ({"lora_r": True}, "lora_r"),
        ({"lora_r": 0}, "lora_r is 0: Input should be greater than 0"),
        ({"train_on": "txt"}, "train_on"),
        ({"sample_texts": "one"}, "sample_texts"),
        ({"top_p": 1.5}, "top_p"),
        ({"overwrite": 1}, "overwrite"),
    ],
)
def test_wrong_values_are_named(tmp_path, values, line):
    config = tmp_path / "mine.json"
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=line) as caught:
        read_settings(config)
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", '{"lora_r": 8,}'])
def test_a_config_that_is_no_json_object(tmp_path, text):
    config = tmp_path / "mine.json"
    config.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"mine\.json: (not JSON|must be)"):
        read_settings(config)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "option"),
    [("infer.py", "--out"), ("finetune.py", "--config"), ("data/prepare.py", "--config")],
)
def test_help_imports_no_heavy_library(name, option):
    """So that it answers at once: each of these takes seconds to import."""
    code, printed, times = script("-X", "importtime", name, "--help")
    assert code == 0 and option in printed
    imported = {line.split("|")[-1].strip() for line in times.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "trl", "datasets", "unsloth", "peft", "snac"}


def test_wav_and_tokens(tmp_path, ids, codec):
    recording = tmp_path / "in.wav"
    soundfile.write(recording, np.random.default_rng(4).normal(0, 0.1, (22_050, 2)), 22_050)
    words = ["--model", "data/demo/base", "--codec", "data/demo/codec"]
    code, printed, errors = script(
        "infer.py", "--wav", recording, *words, "--out", tmp_path / "heard.wav"
    )
    assert code == 0, errors
    assert "12 frames" in printed
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
    code, _, errors = script(
        "infer.py", "--tokens", tmp_path / "ids", *words, "--out", tmp_path / "ids.wav"
    )
    assert code == 0, errors
    assert (soundfile.read(tmp_path / "ids.wav", dtype="float32")[0] == heard).all()


def test_lines_of_a_file_in_order(tmp_path, finished):
    lines = tmp_path / "lines.txt"
    lines.write_text("seven two\n\nnine\n")
    out, _ = finished
    code, printed, errors = script(
        "infer.py",
        "--file",
        lines,
        "--model",
        out,
        "--out",
        tmp_path / "said",
        "--max_seconds",
        "1",
    )
    assert code == 0, errors
    assert [line.split()[0][-7:] for line in printed.splitlines()[1:]] == ["001.wav", "002.wav"]
    assert sorted(p.name for p in (tmp_path / "said").iterdir()) == ["001.wav", "002.wav"]


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """The system refuses to write more than 100 KB, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"a\.wav: cannot be written: the disk may be full"),
            audio_file(tmp_path / "a.wav") as write,
        ):
            for _ in range(10):
                write(np.zeros(24_000, "f4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


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
        ([""], "the text is empty"),
        (["--file", tmp_path / "empty"], "the text is empty"),
        (["--file", tmp_path / "none"], "cannot be read"),
        (["hi", "--model", tmp_path / "none"], "no such folder"),
        (["hi", "--model", "data/demo/base", "--codec", tmp_path / "none"], "no such folder"),
        (["hi", "--model", "data/demo/base", "--codec", tmp_path / "llama"], "not a SNAC codec"),
        (["hi", "--model", tmp_path / "llama", *demo[:2]], "config.json: cannot be read"),
        (["hi", "--model", "outputs/my voice"], "not a hub id"),
        (["hi", "--model", "data/demo/bas"], "no such folder"),
        (["hi", "--model", "some/model"], "no GPU for the hub's"),
        (["hi", "--model", "data/demo/base", "--codec", "some/codec"], "hub cannot be reached"),
        (["hi", *demo[2:], "--codec", tmp_path / "snac"], r"pytorch_model\.bin: not plain weights"),
        (["hi", *demo, "--max_seconds", "0.01"], "less than a frame of speech"),
        (["hi", *demo, "--temperature", "warm"], "temperature"),
        (["hi", *demo, "--out", tmp_path / "a.xyz", "--max_seconds", "0.2"], "end the name in"),
        (["--wav", tmp_path / "none.wav", *demo], "does not exist"),
        (["--wav", tmp_path / "text.wav", *demo], "not audio"),
        (bad_tokens(tmp_path, "1 2 3"), "no whole frame"),
        (bad_tokens(tmp_path, "1 2 3 4 5 6 7"), "no whole frame"),
        (bad_tokens(tmp_path, "hello"), "neither a list"),
    ]
    for words, line in cases:
        assert re.search(line, one_line(infer.main, monkeypatch, *words)), words
    code, _, errors = script("infer.py", "hi", "--model", tmp_path / "none")
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: ")
