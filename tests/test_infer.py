"""infer.py: ids and recordings in place of texts, options, and a person's mistakes."""

import itertools
import json
import re
import shutil
import sys

import numpy as np
import pytest
import soundfile
from conftest import one_line, script

import infer
import orpheus.codec
import orpheus.options
from orpheus.audio import read_audio
from orpheus.codec import encode
from orpheus.models import load_tokenizer
from orpheus.settings import RUN_KEYS, read_settings
from orpheus.tokens import codes_to_ids, read_tokens


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
        (["hi", "--model", tmp_path / "llama", *demo[:2]], "no adapter or model in it"),
        (["hi", "--model", "outputs/my voice"], "not a hub id"),
        (["hi", "--model", "data/demo/bas"], "no such folder"),
        (["hi", "--model", "some/model"], "the hub cannot be reached"),
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


def words_of(name):
    """An option of infer.py with a value that is right by itself."""
    values = {"best_of": "2", "seed": "1", "speak_batch_size": "2", "language": "de"}
    if name == "texts":
        return ["hello"]
    switch = name in ("stream", "score", "cuda_graph")
    return [f"--{name}"] if switch else [f"--{name}", values.get(name, "1")]


OTHERS = {"voice", "out", "stream", "score", "whisper", "model", "config", *RUN_KEYS}
INPUTS = ("texts", "file", "tokens", "wav")
DECODING = {"model", "config", "out", "codec", "seed"}


def test_every_pair_of_options_works_or_is_refused(monkeypatch):
    monkeypatch.setattr(orpheus.options, "read_settings", lambda path: read_settings())
    for first, second in itertools.combinations(INPUTS, 2):
        line = one_line(infer.read_arguments, monkeypatch, *words_of(first), *words_of(second))
        assert "give one of" in line
    for way in INPUTS:
        for names in itertools.combinations(sorted(OTHERS), 2):
            words = [*words_of(way), *words_of(names[0]), *words_of(names[1])]
            accepted = way in ("texts", "file") or {*names} <= DECODING
            if accepted and ("whisper" not in names or "score" in names):
                monkeypatch.setattr(sys, "argv", ["infer.py", *words])
                infer.read_arguments()
            else:
                line = one_line(infer.read_arguments, monkeypatch, *words)
                assert any(f"--{name}" in line for name in names), words


def test_every_option_is_in_a_pair(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--help"])
    with pytest.raises(SystemExit):
        infer.read_arguments()
    options = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M))
    assert options == OTHERS | set(INPUTS) - {"texts"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hi", "--temprature", "1"], "the nearest is .temperature"),
        (["hi", "--model", "a", "--model", "b"], "only a page takes several"),
        ([], "give one of"),
        (["hi", "--model", "outputs/nothing_here"], "^outputs/nothing_here: no such folder"),
        (["hi", "--model", "tests/nothing_here"], "^tests/nothing_here: no such folder"),
        (["hi", "ho", "--out", "a.wav"], "several texts need a folder, such as --out a/"),
        (["hi", "--config", "none.json"], "none.json: cannot be read"),
        (["hi", "--language", "English", "--model", "data/demo/base"], "language is"),
    ],
)
def test_mistakes_of_infer(words, line, monkeypatch):
    assert re.search(line, one_line(infer.main, monkeypatch, *words)), words


def test_a_checkpoint_speaks_from_any_folder(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.chdir(tmp_path)
    words = ["two", "--model", str(out / "checkpoint-2"), "--max_seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *words])
    infer.main()
    assert soundfile.info(tmp_path / "out.wav").frames >= 2048


def test_an_unfinished_run_names_its_checkpoint(run_copy, monkeypatch):
    (run_copy / "adapter_config.json").unlink()
    line = one_line(infer.main, monkeypatch, "two", "--model", run_copy)
    checkpoint = run_copy / "checkpoint-3"
    assert line == (
        f"{run_copy}: no adapter or model in it; give {checkpoint}, or finish the run with "
        "finetune.py --resume"
    )
