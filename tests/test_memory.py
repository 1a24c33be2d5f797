"""--plan and --fit: the memory that a run needs, from the base's config.json alone."""

import shutil
import sys

import pytest
import torch
from conftest import DEMO, ROOT, one_line, script
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

import finetune
from orpheus.compatibility import resolve_settings
from orpheus.memory import (
    CARDS,
    GIB,
    best_fit,
    choose_fit,
    count_weights,
    layer_bytes,
    memory_plan,
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


def read(folder, **overrides):
    """The Settings of the default config with `overrides`."""
    overrides = {"model": str(folder), **overrides}
    return resolve_settings(read_settings(None, {k: str(v) for k, v in overrides.items()}))


def config_and_base(folder, **overrides):
    settings = read(folder, **overrides)
    return settings.flat(), read_base(settings)


def test_the_plan_needs_only_a_config(orpheus, tmp_path):
    code, printed, errors = script("finetune.py", "--model", orpheus, "--plan", "--fit", "6.5")
    assert code == 0, errors
    assert "in all" in printed and " 6.5 GiB: fits; --fit would choose " in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_weights_are_counted_from_the_shape(orpheus):
    _, base = config_and_base(orpheus)
    layer = 3072 * (3072 + 1024 + 1024 + 3072) + 3 * 3072 * 8192
    sides = 2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)
    assert base.linear == 28 * layer
    assert base.others == 156940 * 3072 + (2 * 28 + 1) * 3072  # tied embeddings; norms
    assert base.lora == 28 * sides


def saved_bytes(layers, value_bytes, full=False, checkpointing=False):
    """(bytes that autograd keeps of a token for a backward pass, weights aside; the base's config).

    The row has a mask, as packed rows do, of which SDPA keeps a copy in each layer.
    """
    base = LlamaConfig(vocab_size=64, num_hidden_layers=layers, **SHAPE)
    model = LlamaForCausalLM(base).to(torch.bfloat16 if value_bytes == 2 else torch.float32)
    if not full:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=LINEAR_LAYERS))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=value_bytes == 2):
        rows = torch.zeros(1, TOKENS, dtype=torch.long)
        mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
        decoder = model.model if full else model.get_base_model().model
        decoder.train()(input_ids=rows, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values()) / TOKENS, base


TOKENS = 512
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.parametrize(("value_bytes", "full"), [(4, False), (2, False), (4, True), (2, True)])
def test_activations_are_what_autograd_keeps(value_bytes, full):
    (two, _), (three, base) = (saved_bytes(layers, value_bytes, full) for layers in (2, 3))
    kept = three - two
    if value_bytes == 2 and not full:  # autocast's copies of a layer's LoRA are planned apart
        kept -= 2 * 8 * count_weights(base).lora / base.num_hidden_layers / TOKENS
    config = {"full_finetuning": full, "lora_r": 8, "weights": "16bit", "backend": "transformers"}
    config |= {"bf16": value_bytes == 2, "fp16": False}
    mask = value_bytes * TOKENS
    assert layer_bytes(config, base) + mask == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("value_bytes", [4, 2])
def test_a_checkpoint_keeps_the_layers_input(value_bytes):
    (two, _), (three, base) = (saved_bytes(n, value_bytes, checkpointing=True) for n in (2, 3))
    assert three - two == value_bytes * base.hidden_size


def test_the_plan_is_of_the_worst_moment(orpheus):
    config, base = config_and_base(orpheus, weights="16bit", bf16="true")
    training = memory_plan(config | {"sample_texts": []}, base)
    texts = {"sample_texts": ["Hello."] * 9, "max_seconds": 8192 / 24_000}  # four frames, the end
    cache = 112 * 1024 * (1 + 24 / (28 * 8)) * 5 * 7  # a row's, of all layers; one layer's repeated
    assert memory_plan(config | texts, base) == training
    texts["max_seconds"] *= 1000
    speaking = memory_plan(config | texts, base)
    assert speaking["samples: keys and values"] == pytest.approx(8 * cache * 800, rel=0.01)
    assert "gradients" not in speaking and "gradients" in training
    total = sum(speaking.values())
    assert smallest_change(config | texts, base, total - 1) == {"speak_batch_size": 1}
    single = memory_plan(config | texts | {"speak_batch_size": 1, "best_of": 2}, base)
    assert single["samples: keys and values"] == pytest.approx(2 * cache * 800, rel=0.01)


def test_a_batch_without_earlier_ones_needs_no_gradients_at_the_loss(orpheus):
    config, base = config_and_base(orpheus, backend="transformers", bf16="true")
    config |= {"gradient_checkpointing": True, "gradient_accumulation_steps": 4}
    several = memory_plan(config, base)
    first = memory_plan(config | {"gradient_accumulation_steps": 1}, base)
    assert several.pop("gradients") == 4 * 64 * base.lora and first.pop("gradients") == 0
    assert several == first


def test_the_mask_grows_with_the_square_of_a_packed_row(orpheus):
    config, base = config_and_base(orpheus, backend="transformers", bf16="true")
    config |= {"gradient_checkpointing": False, "per_device_train_batch_size": 4}
    packed = memory_plan(config, base)["activations"]
    padded = memory_plan(config | {"batching": "pad"}, base)["activations"]
    assert packed - padded == (28 * 2 + 1) * (4 * 4 - 4) * 2048**2


def test_a_fit_changes_a_copy_of_the_settings(orpheus, capsys):
    settings = read(orpheus, fit=20, gradient_accumulation_steps=4)
    before = settings.flat()
    fit = choose_fit(settings, read_base(settings), None)
    chosen = {"gradient_checkpointing": False, "per_device_train_batch_size": 2}
    assert fit.flat() == before | chosen | {"gradient_accumulation_steps": 2}
    assert settings.flat() == before
    assert "planned of 20.0: gradient_checkpointing false" in capsys.readouterr().out
    without = settings.replace(fit=False)
    assert choose_fit(without, read_base(settings), None) == without


def test_a_change_is_the_smallest_and_a_fit_keeps_the_step(orpheus):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    config, base = config_and_base(orpheus, weights="16bit", **batches)
    total = total_bytes(config, base)
    assert smallest_change(config, base, total) == {}
    row_by_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert smallest_change(config, base, total - 1) == row_by_row
    change = smallest_change(config, base, 6 * GIB)
    assert change["weights"] == "4bit"
    assert total_bytes(config | change, base) <= 6 * GIB
    assert smallest_change(config, base, GIB) is None
    last = 0
    for card in CARDS:
        fit = best_fit(config, base, card * GIB)
        if fit is None:
            assert card == 8
            continue
        rows = fit["per_device_train_batch_size"]
        assert rows * fit["gradient_accumulation_steps"] == 8
        assert total_bytes(config | fit, base) <= card * GIB
        speed = (fit["gradient_checkpointing"] is False) * 100 + rows
        assert speed >= last
        last = speed


WORDS = [*DEMO, "--backend", "transformers", "--cache_dir", "null", "--limit", "8"]
WORDS += ["--held_out", "0", "--sample_texts", "[]", "--max_steps", "2"]


def full(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def run(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *WORDS, "--output_dir", str(out), *words])
    finetune.main()
    return read_json(out / SAVED_CONFIG)


def test_fit_sets_rows_and_steps_down_where_the_first_step_is_too_much(
    tmp_path, monkeypatch, capsys
):
    """Eight rows at once are planned; the first step runs out; the next process plans for less."""

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


def test_an_adapter_is_no_base(adapter, tmp_path, monkeypatch):
    words = [*DEMO, "--model", adapter, "--output_dir", tmp_path / "out", "--plan"]
    assert "is an adapter; give the base" in one_line(finetune.main, monkeypatch, *words)
