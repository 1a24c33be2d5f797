"""--plan and --fit: the memory a run needs, told from the base's config.json alone."""

import shutil
import sys

import pytest
import torch
from conftest import DEMO, ROOT, one_line, script

import finetune
from orpheus.compatibility import resolve_settings
from orpheus.memory import (
    CARDS,
    GIB,
    best_fit,
    layer_bytes,
    plan_keys,
    read_base,
    smallest_change,
    total_bytes,
)
from orpheus.models import LINEAR_LAYERS
from orpheus.runs import SAVED_CONFIG
from orpheus.settings import read_json, read_settings


@pytest.fixture
def orpheus(tmp_path):
    """A folder with Orpheus-3B's config.json and nothing else."""
    shutil.copy(ROOT / "tests/orpheus-3b/config.json", tmp_path)
    return tmp_path


def keys_and_base(folder, **overrides):
    overrides = {"model": str(folder), **overrides}
    settings = read_settings(None, {k: str(v) for k, v in overrides.items()})
    return plan_keys(resolve_settings(settings)), read_base(settings)


def test_the_plan_needs_only_a_config(orpheus, tmp_path):
    code, printed, errors = script("finetune.py", "--model", orpheus, "--plan", "--fit", "6.5")
    assert code == 0, errors
    assert "in all" in printed and " 6.5 GiB: fits; --fit takes " in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_weights_are_counted_from_the_shape(orpheus):
    _, base = keys_and_base(orpheus)
    layer = 3072 * (3072 + 1024 + 1024 + 3072) + 3 * 3072 * 8192
    sides = 2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)
    assert base.linear == 28 * layer
    assert base.others == 156940 * 3072 + (2 * 28 + 1) * 3072  # tied embeddings; norms
    assert base.lora == 28 * sides


def saved_bytes(layers, wide, checkpointing):
    """What autograd keeps of a token for a backward pass, its weights aside."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {name: size for name, size in SHAPE.items() if name != "lora_r"}
    base = LlamaConfig(vocab_size=64, num_hidden_layers=layers, **shape)
    dtype = torch.bfloat16 if wide == 2 else torch.float32
    lora = LoraConfig(r=SHAPE["lora_r"], target_modules=LINEAR_LAYERS)
    model = get_peft_model(LlamaForCausalLM(base).to(dtype), lora).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept, tokens = {}, 512

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=wide == 2):
        rows = torch.zeros(1, tokens, dtype=torch.long)
        model.get_base_model().model(input_ids=rows, use_cache=False)
    return sum(size for size, _ in kept.values()) / tokens, base


SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "lora_r": 8,
}


@pytest.mark.parametrize("wide", [4, 2])
def test_activations_are_what_autograd_keeps(wide):
    (two, _), (three, base) = saved_bytes(2, wide, False), saved_bytes(3, wide, False)
    planned = layer_bytes({"full_finetuning": False, "lora_r": 8}, base, wide)
    assert planned == pytest.approx(three - two, rel=0.03)
    (two, _), (three, _) = saved_bytes(2, wide, True), saved_bytes(3, wide, True)
    assert three - two == wide * base.hidden_size


def test_a_change_is_the_smallest_and_a_fit_keeps_the_step(orpheus):
    keys, base = keys_and_base(orpheus, weights="16bit", per_device_train_batch_size=2)
    total, gib = total_bytes(keys, base), GIB
    assert smallest_change(keys, base, total) == {}
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert smallest_change(keys, base, total - 1) == one
    change = smallest_change(keys, base, 6 * gib)
    assert change["weights"] == "4bit"
    assert total_bytes(keys | change, base) <= 6 * gib
    assert smallest_change(keys, base, gib) is None
    last = 0
    for card in CARDS:
        fit = best_fit(keys, base, card * gib)
        if fit is None:
            assert card == 8
            continue
        rows = fit["per_device_train_batch_size"]
        assert rows * fit["gradient_accumulation_steps"] == 8
        assert total_bytes(keys | fit, base) <= card * gib
        speed = (fit["gradient_checkpointing"] is False) * 100 + rows
        assert speed >= last
        last = speed


WORDS = [*DEMO, "--backend", "transformers", "--cache_dir", "null", "--limit", "8"]
WORDS += ["--held_out", "0", "--sample_texts", "[]", "--max_steps", "2"]


def full(*_, **__):
    raise torch.cuda.OutOfMemoryError("out of memory")


def run(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *WORDS, "--output_dir", str(out), *words])
    finetune.main()
    return read_json(out / SAVED_CONFIG)


def test_fit_sets_rows_and_steps_down_where_the_first_step_is_too_much(
    tmp_path, monkeypatch, capsys
):
    """Eight rows at once are planned; the first step runs out; the next process plans for less."""
    from trl import SFTTrainer

    def start(program, words):
        raise SystemExit(" ".join(words[-2:]))

    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", full)
        patch.setattr(finetune.os, "execv", start)
        with pytest.raises(SystemExit) as ended:
            run(patch, tmp_path / "out", *words, "--fit", "3")
    first = capsys.readouterr().out
    assert "per_device_train_batch_size 8, gradient_accumulation_steps 1" in first
    assert "starting anew with --fit" in first
    saved = run(monkeypatch, tmp_path / "out", *words, *str(ended.value).split())
    assert saved["per_device_train_batch_size"] * saved["gradient_accumulation_steps"] == 8
    assert saved["per_device_train_batch_size"] < 8 or saved["gradient_checkpointing"]


def test_without_fit_a_full_gpu_is_one_line(tmp_path, monkeypatch):
    from trl import SFTTrainer

    monkeypatch.setattr(SFTTrainer, "training_step", full)
    words = [*WORDS, "--output_dir", tmp_path / "out"]
    line = one_line(finetune.main, monkeypatch, *words)
    assert line == "step 1: out of GPU memory: try --plan, or --fit; last checkpoint: none yet"


def test_what_cannot_fit_is_told_before_it_is_loaded(tmp_path, monkeypatch):
    words = [*WORDS, "--output_dir", tmp_path / "out"]
    line = one_line(finetune.main, monkeypatch, *words, "--fit", "0.5")
    assert line.startswith("out of memory: ") and "no change of settings makes it fit" in line
    line = one_line(finetune.main, monkeypatch, *words, "--fit")
    assert "fit true asks a GPU" in line
