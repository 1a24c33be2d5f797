"""Models: what is wrong with a folder in one line, dtypes, bases that are stored quantised."""

import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import DEMO, change, cut, one_line
from running import PLAIN, run_here
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import finetune
import orpheus.models
from orpheus.models import (
    add_old_names,
    check_machine,
    load_base,
    load_model,
    speaking_dtype,
)
from orpheus.settings import UserError, read_json
from orpheus.voice import load_voice


@pytest.fixture
def base(tmp_path):
    return shutil.copytree("data/demo/base", tmp_path / "base")


BROKEN_BASES = {
    "weights cut short": (
        lambda d: cut(d / "model.safetensors", 5000),
        "model.safetensors: damaged",
    ),
    "weights cut late": (lambda d: cut(d / "model.safetensors", -9), "model.safetensors: damaged"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "must be one JSON object"),
    "BERT": (lambda d: change(d / "config.json", model_type="bert"), "model_type is 'bert'"),
    "GPTQ": (
        lambda d: change(d / "config.json", quantization_config={"quant_method": "gptq"}),
        "its weights are quantised by gptq; give --model unsloth/orpheus-3b-0.1-ft",
    ),
    "fewer layers": (
        lambda d: change(d / "config.json", num_hidden_layers=3),
        "weights of 4 layers, and 3 in its config",
    ),
    "other weights": (
        lambda d: save_file({"x": torch.zeros(1)}, d / "model.safetensors", {"format": "pt"}),
        "weights of 0 layers, and 4 in its config",
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


@pytest.mark.parametrize("name", ["weights cut short", "fewer layers", "BERT", "no tokenizer"])
def test_training_names_a_broken_base_in_one_line(name, base, tmp_path, monkeypatch):
    spoil, line = BROKEN_BASES[name]
    spoil(base)
    words = [*DEMO, "--model", base, "--backend", "transformers", "--limit", "2"]
    words += ["--cache_dir", "null", "--output_dir", tmp_path / "out", "--max_steps", "1"]
    assert line in one_line(finetune.main, monkeypatch, *words)


ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BROKEN_ADAPTERS = {
    "weights cut short": (lambda d: cut(d / ADAPTER, 5000), f"{ADAPTER}: damaged"),
    "no weights": (lambda d: (d / ADAPTER).unlink(), f"no {ADAPTER}: the weights"),
    "base moved": (
        lambda d: change(d / CONFIG, base_model_name_or_path="/gone/x"),
        "no folder /gone",
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
    "torn": (lambda d: cut(d / CONFIG, 20), f"{CONFIG}: not JSON"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_named_in_one_line(name, adapter):
    spoil, line = BROKEN_ADAPTERS[name]
    spoil(adapter)
    with pytest.raises(UserError, match=line) as caught:
        load_model(str(adapter))
    assert len(str(caught.value)) < 400


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
    assert speaking_dtype(base, asked) == used


def test_a_head_that_differs_from_the_embeddings_is_told_in_the_config(base):
    """transformers 4 would tie the two."""
    assert load_base(base, "16bit", torch.float32).config.tie_word_embeddings
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert not load_base(base, "16bit", torch.float32).config.tie_word_embeddings


LEFT_OUT = ["lm_head", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"]


@pytest.fixture(scope="module", params=[None, LEFT_OUT], ids=["all", "some in 16 bits"])
def stored(request, tmp_path_factory):
    """The demo's base stored in 4 bits with bfloat16 as the dtype to compute in, as Unsloth's is.

    With `LEFT_OUT` in 16 bits, or without.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("stored") / "base-bnb-4bit"
    shutil.copytree("data/demo/base", folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=request.param,
    )
    keys = {"dtype": torch.bfloat16, "quantization_config": config}
    AutoModelForCausalLM.from_pretrained("data/demo/base", **keys).save_pretrained(folder)
    return folder


def layers_in_4_bits(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}


def test_a_stored_base_computes_in_the_dtype_that_is_asked_for(stored):
    """On a T4, bfloat16 is emulated: neither its config's nor its weights' may stay."""
    model = load_base(stored, "4bit", torch.float16)
    layers = layers_in_4_bits(model)
    left_out = read_json(stored / "config.json")["quantization_config"]["llm_int8_skip_modules"]
    assert len(layers) == (28 if left_out is None else 28 - 4)
    assert {layer.compute_dtype for layer in layers.values()} == {torch.float16}
    assert {layer.weight.quant_state.dtype for layer in layers.values()} == {torch.float16}
    assert model.model.layers[1].mlp.up_proj.weight.dtype == (
        torch.uint8 if left_out is None else torch.float16
    )


@pytest.mark.parametrize("weights", ["16bit", "4bit"])
@pytest.mark.filterwarnings("error")
def test_a_stored_base_speaks_over_the_weights_it_has(weights, stored):
    model, _ = load_model(str(stored), weights)
    found = dict(model.named_parameters())
    full = dict(load_model("data/demo/base")[0].named_parameters())
    quantised = dict(load_model("data/demo/base", "4bit")[0].named_parameters())
    in_4_bits = layers_in_4_bits(load_base(stored, "4bit", torch.float32))
    for name, value in found.items():
        wanted = quantised if name.removesuffix(".weight") in in_4_bits else full
        assert value.equal(wanted[name]), name


def test_a_stored_base_is_trained_over_checked_resumed_spoken_over_and_merged_over(
    stored, tmp_path, monkeypatch, capsys
):
    keys = {"model": stored, "weights": "4bit", "held_out": "0.2", "max_seconds": "0.3"}
    keys |= {"sample_texts": '["two"]', "sample_steps": "2", "save_steps": "2", "report_to": "none"}
    run_here(monkeypatch, tmp_path / "whole", **keys, max_steps="4")
    stopped = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "checkpoint-4")
    for path in stopped.glob("adapter*"):
        path.unlink()
    run_here(monkeypatch, stopped, **keys, max_steps="4", resume="true")
    weights = [load_file(out / ADAPTER) for out in (tmp_path / "whole", stopped)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    adapter, merged = (load_model(str(stopped), "4bit", merged)[0] for merged in (False, True))
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in read_json(tmp_path / "merged/config.json")
    tokens = torch.arange(300, 600)[None]
    with torch.no_grad():
        wanted = adapter(input_ids=tokens).logits
        found = load_base(tmp_path / "merged", "16bit", torch.float32)(input_ids=tokens).logits
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()
    spoken = load_voice(stopped).say("two")
    sample, _ = soundfile.read(stopped / "samples/step-000004/01.wav", dtype="float32")
    assert len(spoken) == len(sample) and abs(spoken - sample).max() < 1e-4


def test_other_weights_than_the_stored_ones_name_the_full_base(stored, monkeypatch, tmp_path):
    words = [*DEMO, *PLAIN, "--model", stored, "--output_dir", tmp_path / "out"]
    line = one_line(finetune.main, monkeypatch, *words, "--weights", "16bit")
    assert "is stored in 4 bits: set weights to" in line
    assert line.endswith(f"or train over --model {orpheus.models.FULL_BASE}")


def test_a_cpu_takes_hub_models_by_their_size(adapter, base, monkeypatch):
    hub = {"you/anna": adapter, "you/tiny": base, "you/orpheus": Path("tests/orpheus-3b")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (orpheus.models, orpheus.files):
        monkeypatch.setattr(module, "fetch", lambda path, patterns: hub[path])
    check_machine("you/tiny")
    change(adapter / CONFIG, base_model_name_or_path="you/tiny")
    check_machine("you/anna")
    change(adapter / CONFIG, base_model_name_or_path="you/orpheus")
    for model in ("you/orpheus", "you/anna"):
        with pytest.raises(UserError, match=f"{model}: no GPU found .does nvidia-smi work.*CPU"):
            check_machine(model)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 11040, raising=False)
    with pytest.raises(UserError, match=r"the driver has CUDA 11\.4, and torch needs 12\.8"):
        check_machine("you/orpheus")


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
