"""What a run's folder says of how its model speaks: settings, voices, dtype and weights."""

import shutil

import pytest
import torch
from conftest import change, cut, one_line, over_nf4

import infer
from orpheus.models import load_model
from orpheus.run_info import load_run, load_run_info
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import Settings, UserError

REPORT, SETTINGS = SAVED_REPORT, SAVED_CONFIG
BROKEN_RUNS = {
    "no voices": (lambda d: change(d / REPORT, voices=None), f"{REPORT}: damaged: voices"),
    "voices a list": (lambda d: change(d / REPORT, voices=["anna"]), f"{REPORT}: damaged"),
    "words for numbers": (lambda d: change(d / REPORT, seconds="many"), f"{REPORT}: damaged"),
    "no report": (lambda d: (d / REPORT).unlink(), f"{REPORT}: cannot be read"),
    "codec moved": (
        lambda d: change(d / SETTINGS, codec="/gone/codec"),
        "codec there, or give --codec",
    ),
    "codec moved, relative": (
        lambda d: change(d / SETTINGS, codec="gone"),
        "codec there, or give --codec",
    ),
    "torn settings": (lambda d: cut(d / SETTINGS, 50), f"{SETTINGS}: not JSON"),
    "odd settings": (lambda d: change(d / SETTINGS, lora_r="many"), f"{SETTINGS}: lora_r"),
}


@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_a_broken_run_is_named_in_one_line(name, adapter):
    spoil, line = BROKEN_RUNS[name]
    spoil(adapter)
    with pytest.raises(UserError, match=line):
        load_run_info(str(adapter), {})


def test_a_report_without_characters_has_no_pace(adapter):
    change(adapter / REPORT, characters=0)
    assert load_run_info(str(adapter), {}).pace is None


def test_a_given_codec_is_not_blamed_on_the_run(adapter, monkeypatch):
    line = one_line(infer.main, monkeypatch, "hi", "--model", adapter, "--codec", "gone")
    assert line.startswith("gone: no such folder")


@pytest.mark.parametrize(("bf16", "dtype"), [(False, "float32"), (None, "bfloat16")])
def test_a_run_speaks_in_the_precision_of_its_training(bf16, dtype, adapter, capsys):
    """The demo's base is stored in bfloat16; a run that says bf16 false gets fp32 on a CPU."""
    change(adapter / SETTINGS, bf16=bf16)
    assert bf16 or Settings().bf16 is None  # change() leaves keys of null out
    model, _ = load_run(load_run_info(str(adapter), {}))
    assert f"model    {adapter}: {dtype}\n" in capsys.readouterr().out
    kinds = {weight.dtype for name, weight in model.named_parameters() if "lora" not in name}
    assert kinds == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("16bit", "float32"),
        ("4bit", "float32; 4-bit weights"),
        ("8bit", "float32; 8-bit weights"),
        ("fp8", "float32; trained over fp8 weights, speaks over 16-bit ones instead"),
    ],
)
def test_a_run_speaks_over_the_weights_of_its_training_or_says_so(weights, words, adapter, capsys):
    change(adapter / SETTINGS, weights=weights)
    model, _ = load_run(load_run_info(str(adapter), {}))
    assert f"model    {adapter}: {words}\n" in capsys.readouterr().out
    tokens = torch.arange(300)[None]
    with torch.no_grad():
        plain, logits, nf4 = (
            other(input_ids=tokens).logits
            for other in (load_model(str(adapter))[0], model, over_nf4(adapter))
        )
    assert (weights in ("16bit", "fp8")) == bool((logits - plain).abs().max() < 1e-4)
    assert (weights == "4bit") == bool((logits - nf4).abs().max() < 1e-4)


def test_a_base_that_no_run_trained_speaks_in_16_bits_on_a_cpu(capsys):
    run = load_run_info("data/demo/base", {})
    assert run.settings.weights == "4bit"
    model, _ = load_run(run)
    assert "data/demo/base: bfloat16\n" in capsys.readouterr().out
    assert model.dtype == torch.bfloat16


def test_infer_takes_a_config(tmp_path, monkeypatch):
    """Its speaking keys go over those of the run, the rest of which is kept."""
    config = tmp_path / "mine.json"
    config.write_text('{"temperature": 0.9, "lora_r": 3, "output_dir": "elsewhere"}')
    home = tmp_path / "run"
    home.mkdir()
    shutil.copy("data/demo/base/config.json", home)
    (home / SAVED_CONFIG).write_text('{"temperature": 0.2, "lora_r": 5, "top_p": 0.5}')
    (home / SAVED_REPORT).write_text('{"voices": {}, "seconds": 1, "characters": 1}')
    settings = load_run_info(str(home), {"seed": "4"}, config=config).settings
    assert (settings.temperature, settings.lora_r, settings.top_p) == (0.9, 5, 0.5)
    assert load_run_info(str(home), {"temperature": "0.4"}, config=config).settings.seed == 3407
    config.write_text('{"temprature": 0.9}')
    line = one_line(infer.main, monkeypatch, "hi", "--config", config)
    assert "mine.json: no key is named 'temprature'" in line
