"""--plan: the memory that a run needs, from the base's config.json alone."""

import shutil

import pytest
import torch
from conftest import DEMO, ROOT, change, one_line, script
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import finetune
from orpheus.memory import (
    CARDS,
    GIB,
    count_weights,
    layer_bytes,
    memory_plan,
    most_rows,
    print_plan,
    read_base,
    smallest_change,
    total_bytes,
)
from orpheus.models import LINEAR_LAYERS
from orpheus.settings import read_settings
from orpheus.trainer import resolve_settings


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
    return dict(settings), read_base(settings)


def test_the_plan_needs_only_a_config(orpheus, tmp_path):
    (tmp_path.parent / "empty.json").write_text("{}")
    words = ["--config", tmp_path.parent / "empty.json", "--model", orpheus, "--plan"]
    code, printed, errors = script("finetune.py", *words)
    assert code == 0, errors
    assert "in all" in printed and "   8 GiB: fits; room for 16 rows a batch" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_weights_are_counted_from_the_shape(orpheus):
    _, base = config_and_base(orpheus)
    layer = 3072 * (3072 + 1024 + 1024 + 3072) + 3 * 3072 * 8192
    sides = 2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)
    assert base.linear == 28 * layer
    assert base.others == 156940 * 3072 + (2 * 28 + 1) * 3072  # tied embeddings; norms
    assert base.lora == 28 * sides


def test_layers_that_a_stored_base_has_in_16_bits_are_counted_so(orpheus):
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    _, whole = config_and_base(orpheus)
    for left_out, count in ((None, 0), (["lm_head", "model.layers.1.mlp"], 3 * 3072 * 8192)):
        keys = stored | {"llm_int8_skip_modules": left_out}
        change(orpheus / "config.json", quantization_config=keys)
        _, base = config_and_base(orpheus)
        assert (base.linear, base.others) == (whole.linear - count, whole.others + count)
        assert base.lora == whole.lora


def test_a_head_of_its_own_is_counted_where_the_weights_are_here(orpheus, tmp_path, capsys):
    settings = read(orpheus)
    print_plan(settings, read_base(settings))
    assert "taking its head for its embeddings; one of its own is" in capsys.readouterr().out
    folder = shutil.copytree("data/demo/base", tmp_path / "demo")
    _, tied = config_and_base(folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    for value in (0, 1):
        save_file(weights | {"lm_head.weight": head + value}, folder / "model.safetensors")
        _, base = config_and_base(folder)
        assert base.others - tied.others == value * head.numel() and base.own_head == bool(value)


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


def test_a_change_is_the_smallest_and_keeps_the_step(orpheus):
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


def test_the_most_rows_are_those_that_still_fit(orpheus):
    config, base = config_and_base(orpheus, weights="16bit", per_device_train_batch_size=2)
    counts = [most_rows(config, base, card * GIB) for card in CARDS]
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1]
    row = {"per_device_train_batch_size": counts[-1]}
    assert total_bytes(config | row, base) <= 80 * GIB
    row = {"per_device_train_batch_size": counts[-1] + 1}
    assert total_bytes(config | row, base) > 80 * GIB


def test_an_adapter_is_no_base(adapter, tmp_path, monkeypatch):
    words = [*DEMO, "--model", adapter, "--output_dir", tmp_path / "out", "--plan"]
    assert "is an adapter; give the base" in one_line(finetune.main, monkeypatch, *words)
