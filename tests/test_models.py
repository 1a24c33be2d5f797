"""Model folders: damaged ones are named in one line, and the dtype that a model speaks in."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import DEMO, ROOT, change, one_line, over_nf4
from safetensors.torch import load_file, save_file

import finetune
import infer
from orpheus.codec import load_codec
from orpheus.generation import generate_batch, make_utterance
from orpheus.models import bitsandbytes_config, choose_dtype, load_base, load_model
from orpheus.run_info import load_run, load_run_info
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import UserError


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.fixture
def base(tmp_path):
    return shutil.copytree("data/demo/base", tmp_path / "base")


BROKEN_BASES = {
    "weights cut short": (
        lambda d: cut(d / "model.safetensors", 5000),
        "model.safetensors: damaged",
    ),
    "weights cut late": (lambda d: cut(d / "model.safetensors", -9), "model.safetensors: damaged"),
    "empty weights": (lambda d: cut(d / "model.safetensors", 0), "model.safetensors: damaged"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "wrong type": (lambda d: change(d / "config.json", hidden_size="x"), "hidden_size"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "must be one JSON object"),
    "BERT": (lambda d: change(d / "config.json", model_type="bert"), "model_type is 'bert'"),
    "other shapes": (lambda d: change(d / "config.json", hidden_size=128), "does not load"),
    "no heads": (lambda d: change(d / "config.json", num_attention_heads=0), "ZeroDivisionError"),
    "pad out of range": (lambda d: change(d / "config.json", pad_token_id=9999), "Padding_idx"),
    "odd activation": (lambda d: change(d / "config.json", hidden_act="odd"), "KeyError 'odd'"),
    "no GPTQ here": (
        lambda d: change(d / "config.json", quantization_config={"quant_method": "gptq"}),
        "config.json: does not load",
    ),
    "more layers": (
        lambda d: change(d / "config.json", num_hidden_layers=5),
        "weights of 4 layers, and 5 in its config",
    ),
    "fewer layers": (
        lambda d: change(d / "config.json", num_hidden_layers=3),
        "weights of 4 layers, and 3 in its config",
    ),
    "other weights": (
        lambda d: save_file({"x": torch.zeros(1)}, d / "model.safetensors", {"format": "pt"}),
        "weights of 0 layers, and 4 in its config",
    ),
    "empty index": (
        lambda d: (
            (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"),
            (d / "model.safetensors.index.json").write_text("{}"),
        ),
        "KeyError 'weight_map'",
    ),
    "empty tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "tokenizer.json: does not load",
    ),
    "cut tokenizer": (
        lambda d: cut(d / "tokenizer.json", 500),
        "tokenizer.json: does not load",
    ),
    "odd tokenizer": (
        lambda d: change(d / "tokenizer.json", pre_tokenizer={"type": "odd"}),
        "tokenizer.json: does not load",
    ),
    "tokenizer of BERT": (
        lambda d: change(d / "tokenizer_config.json", tokenizer_class="BertTokenizer"),
        "tokenizer.json: does not load",
    ),
    "odd length": (
        lambda d: change(d / "tokenizer_config.json", model_max_length="x"),
        "tokenizer.json: does not load",
    ),
    "no tokenizer": (
        lambda d: [p.unlink() for p in d.glob("tokenizer*")],
        "no tokenizer.json: the tokenizer is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_a_broken_base_is_named_in_one_line(name, base):
    spoil, line = BROKEN_BASES[name]
    spoil(base)
    with pytest.raises(UserError, match=line) as caught:
        load_model(str(base))
    assert len(str(caught.value)) < 400 and str(base) in str(caught.value)


# (Training replaces the quantisation that a config claims, so that one is no fault there.)
@pytest.mark.parametrize("name", [name for name in BROKEN_BASES if name != "no GPTQ here"])
def test_training_names_a_broken_base_in_one_line(name, base, tmp_path, monkeypatch):
    spoil, _ = BROKEN_BASES[name]
    spoil(base)
    words = [*DEMO, "--model", base, "--backend", "transformers", "--limit", "2"]
    words += ["--cache_dir", "null", "--output_dir", tmp_path / "out", "--max_steps", "1"]
    assert str(base) in one_line(finetune.main, monkeypatch, *words)


def test_an_adapter_is_no_base(adapter, tmp_path, monkeypatch):
    words = [*DEMO, "--model", adapter, "--output_dir", tmp_path / "out", "--plan"]
    assert "is an adapter; give the base" in one_line(finetune.main, monkeypatch, *words)


ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BROKEN_ADAPTERS = {
    "weights cut short": (lambda d: cut(d / ADAPTER, 5000), f"{ADAPTER}: damaged"),
    "empty weights": (lambda d: cut(d / ADAPTER, 0), f"{ADAPTER}: damaged"),
    "no weights": (lambda d: (d / ADAPTER).unlink(), f"no {ADAPTER}: the weights"),
    "no base": (
        lambda d: change(d / CONFIG, base_model_name_or_path=None),
        f"{CONFIG}: base_model",
    ),
    "base moved": (
        lambda d: change(d / CONFIG, base_model_name_or_path="/gone/x"),
        "no folder /gone",
    ),
    "base moved, relative": (
        lambda d: change(d / CONFIG, base_model_name_or_path="gone"),
        f"{CONFIG}: no folder gone",
    ),
    "other targets": (
        lambda d: change(d / CONFIG, target_modules=["q_proj"]),
        "have no place in its config, the first base_model",
    ),
    "more targets": (lambda d: change(d / CONFIG, use_dora=True), "weights are missing"),
    "other weights": (
        lambda d: save_file({"x": torch.zeros(1)}, d / ADAPTER, {"format": "pt"}),
        "weights are missing",
    ),
    "odd pattern": (lambda d: change(d / CONFIG, rank_pattern="x"), f"{CONFIG}: does not load"),
    "odd regex": (lambda d: change(d / CONFIG, target_modules="("), f"{CONFIG}: does not load"),
    "odd type": (lambda d: change(d / CONFIG, peft_type="WARP"), "peft_type is 'WARP'"),
    "other rank": (lambda d: change(d / CONFIG, r=3), "size mismatch"),
    "not an object": (lambda d: (d / CONFIG).write_text("[]"), f"{CONFIG}: must be one JSON"),
    "torn": (lambda d: cut(d / CONFIG, 20), f"{CONFIG}: not JSON"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_named_in_one_line(name, adapter):
    spoil, line = BROKEN_ADAPTERS[name]
    spoil(adapter)
    with pytest.raises(UserError, match=line) as caught:
        load_model(str(adapter))
    assert len(str(caught.value)) < 400


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


def test_weights_that_are_not_numbers_are_named(adapter, tokenizer, ids):
    weights = {name: weight * float("nan") for name, weight in load_file(adapter / ADAPTER).items()}
    save_file(weights, adapter / ADAPTER, {"format": "pt"})
    run = load_run_info(str(adapter), {})
    model, _ = load_run(run)
    row = make_utterance(model, tokenizer, ids, "seven", run.settings, "slt")
    with pytest.raises(UserError, match="computes NaN"):
        generate_batch(model, [row], ids, run.settings)


BROKEN_CODECS = {
    "cut weights": (lambda d: cut(d / "pytorch_model.bin", 5000), "pytorch_model.bin"),
    "empty weights": (lambda d: cut(d / "pytorch_model.bin", 0), "pytorch_model.bin: not plain"),
    "odd weights": (
        lambda d: torch.save({1: torch.zeros(1)}, d / "pytorch_model.bin"),
        "pytorch_model.bin: does not load",
    ),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: does not load"),
    "no rates": (lambda d: change(d / "config.json", decoder_rates=[]), "config.json: does not"),
    "other shapes": (lambda d: change(d / "config.json", encoder_dim=32), "size mismatch"),
    "16 kHz": (lambda d: change(d / "config.json", sampling_rate=16_000), "not SNAC at 24 kHz"),
}


@pytest.mark.parametrize("name", BROKEN_CODECS)
def test_a_broken_codec_is_named_in_one_line(name, tmp_path):
    codec = shutil.copytree(ROOT / "data/demo/codec", tmp_path / "codec")
    spoil, line = BROKEN_CODECS[name]
    spoil(codec)
    with pytest.raises(UserError, match=line) as caught:
        load_codec(str(codec))
    assert len(str(caught.value)) < 400 and "weights_only" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_malicious_codec_is_not_loaded_nor_excused(tmp_path, capsys):
    codec = shutil.copytree(ROOT / "data/demo/codec", tmp_path / "codec")
    torch.save({"x": Evil()}, codec / "pytorch_model.bin")
    with pytest.raises(UserError, match="not plain weights") as caught:
        load_codec(str(codec))
    assert "weights_only" not in str(caught.value) and capsys.readouterr().out == ""
    (codec / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_codec(str(codec))


@pytest.mark.parametrize(("bf16", "dtype"), [(False, "float32"), (None, "bfloat16")])
def test_a_run_speaks_in_the_precision_of_its_training(bf16, dtype, adapter, capsys):
    """The demo's base is stored in bfloat16; a run that says bf16 false gets fp32 on a CPU."""
    change(adapter / SETTINGS, bf16=bf16)
    if bf16 is None:  # change() leaves keys of null out, and config.json says null
        assert json.loads((ROOT / "config.json").read_text())["bf16"] is None
    model, _ = load_run(load_run_info(str(adapter), {}))
    assert f"model    {adapter}: {dtype}\n" in capsys.readouterr().out
    kinds = {weight.dtype for name, weight in model.named_parameters() if "lora" not in name}
    assert kinds == {getattr(torch, dtype)}


def test_a_base_stored_in_fp32_stays_fp32(base):
    change(base / "config.json", dtype="float32")
    model, _ = load_model(str(base), dtype=torch.bfloat16)
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("stored", "asked", "has_bf16", "used"),
    [
        ("bfloat16", None, True, torch.bfloat16),
        ("bfloat16", None, False, torch.float16),
        ("float16", None, True, torch.float16),
        ("float16", torch.bfloat16, True, torch.bfloat16),
        ("bfloat16", torch.float16, True, torch.float16),
        ("bfloat16", torch.bfloat16, False, torch.float16),
        ("bfloat16", torch.float32, True, torch.float32),
    ],
)
def test_a_run_speaks_in_its_dtype_on_a_gpu(base, stored, asked, has_bf16, used, monkeypatch):
    change(base / "config.json", dtype=stored)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert choose_dtype(base, asked) == used


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


@pytest.mark.parametrize("weights", ["16bit", "4bit"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_base_that_is_quantised_already_keeps_its_weights(weights, base):
    config = bitsandbytes_config("4bit", torch.float32)
    load_base(base, dtype=torch.float32, quantization_config=config).save_pretrained(base)
    tokens = torch.arange(300)[None]
    models = load_model(str(base), weights)[0], load_model("data/demo/base", "4bit")[0]
    with torch.no_grad():
        found, wanted = (model(input_ids=tokens).logits for model in models)
    assert found.equal(wanted)
