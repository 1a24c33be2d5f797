"""Model folders: damaged ones are named in one line, and the dtype that a model speaks in."""

import shutil

import pytest
import torch
from conftest import DEMO, change, cut, one_line
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import finetune
from orpheus.generation import generate_batch, make_utterance
from orpheus.models import (
    add_old_names,
    bitsandbytes_config,
    choose_dtype,
    load_base,
    load_model,
)
from orpheus.run_info import load_run, load_run_info
from orpheus.settings import UserError, read_json


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


def test_weights_that_are_not_numbers_are_named(adapter, tokenizer, ids):
    weights = {name: weight * float("nan") for name, weight in load_file(adapter / ADAPTER).items()}
    save_file(weights, adapter / ADAPTER, {"format": "pt"})
    run = load_run_info(str(adapter), {})
    model, _ = load_run(run)
    row = make_utterance(model.config, tokenizer, ids, "seven", run.settings, "slt")
    with pytest.raises(UserError, match="computes NaN"):
        generate_batch(model, [row], ids, run.settings)


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


def test_what_is_saved_has_the_names_that_transformers_4_reads(finished, tokenizer, tmp_path):
    """tests/benchmarks/check_transformers4.py lets transformers 4 read it."""
    rotary = {"rope_theta": 500_000.0, "rope_type": "llama3", "factor": 32.0}
    rotary |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rotary |= {"original_max_position_embeddings": 8192}
    config = AutoConfig.from_pretrained("tests/orpheus-3b", dtype="float16")
    assert config.rope_parameters == rotary
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    change(tmp_path / "tokenizer_config.json", extra_special_tokens=["<custom_token_1>"])
    add_old_names(tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert saved["rope_theta"] == rotary["rope_theta"] and saved["torch_dtype"] == "float16"
    assert saved["rope_scaling"] == {n: v for n, v in rotary.items() if n != "rope_theta"}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rotary
    saved = read_json(tmp_path / "tokenizer_config.json")
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<custom_token_1>"]
    assert AutoTokenizer.from_pretrained(tmp_path)("slt: one") == tokenizer("slt: one")
    for folder in finished[0], finished[0] / "checkpoint-2":
        saved = read_json(folder / "tokenizer_config.json")
        assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
