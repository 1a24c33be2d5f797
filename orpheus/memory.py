"""The memory plan of a run, and what fits."""

import itertools
import json
import os
import resource
import sys
from collections import namedtuple
from pathlib import Path

from orpheus.hub import as_user_error, fetch, is_adapter
from orpheus.models import LINEAR_LAYERS, read_model_config
from orpheus.runs import SAVED_CONFIG
from orpheus.settings import Settings, UserError, read_json

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# bytes a weight; NF4 with its scales, one per 64 weights and themselves quantised
BYTES_PER_WEIGHT = {"4bit": 0.516, "8bit": 1, "fp8": 1}
FIT_KEYS = ("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")
# A model's config; weights of its linear layers, of all else, of a LoRA of rank 1
Base = namedtuple("Base", "config linear others lora")


def count_weights(config) -> Base:
    """Counted on the meta device: nothing is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [m for n, m in model.named_modules() if n.rpartition(".")[2] in LINEAR_LAYERS]
    held = sum(layer.weight.numel() for layer in linear)
    lora = sum(sum(layer.weight.shape) for layer in linear)
    return Base(config, held, sum(w.numel() for w in model.parameters()) - held, lora)


def read_config(settings: Settings):
    """The base's config.json; `UserError` where max_length is more than it sees."""
    folder = fetch(settings.model, ["*config.json"])
    if is_adapter(folder):
        raise UserError(f"model {folder} is an adapter; give the base that it was trained on")
    config = read_model_config(folder)
    context = config.max_position_embeddings
    if settings.max_length > context:
        over = f"max_length {settings.max_length} is over"
        raise UserError(f"{over} the {context} tokens that {settings.model} sees")
    return config


def read_base(settings: Settings) -> Base:
    """The base's shape."""
    config = read_config(settings)
    with as_user_error(Path(settings.model, "config.json")):
        return count_weights(config)


def state_bytes(optimiser: str) -> float:
    """Bytes of optimiser state on the GPU for each weight that is trained."""
    if any(word in optimiser for word in ("paged", "adafactor", "sgd")):
        return 0  # in RAM when the GPU is full; a row and a column; none
    moments = 1 if any(word in optimiser for word in ("lion", "rmsprop", "adagrad")) else 2
    return moments * (1 if "8bit" in optimiser else 4)


def layer_bytes(keys: dict, config, wide: int) -> int:
    """What one layer keeps of a token for its backward pass.

    Counted with autograd's saved-tensor hooks on PEFT's LoRA in transformers' Llama (a test counts
    again); Unsloth's own kernels keep less.
    """
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, cached = heads * head, 2 * config.num_key_value_heads * head  # elements
    inner, rank = 4 * config.intermediate_size, 0 if keys["full_finetuning"] else 7 * keys["lora_r"]
    casts = 2 * (config.hidden_size + queries) if wide == 2 else 0  # to 16 bit, by autocast
    return wide * (inner + 2 * queries + cached + rank) + 16 * config.hidden_size + casts


def memory_plan(keys: dict, base) -> dict[str, float]:
    """Bytes on the GPU at the worst moment of a step, by what they hold. `keys`: a flat config."""
    config, linear, others, lora = *base[:3], base.lora * keys["lora_r"]
    full, quantised = keys["full_finetuning"], keys["weights"] in BYTES_PER_WEIGHT
    wide = 2 if keys["bf16"] or keys["fp16"] else 4
    plain = 4 if quantised and keys["backend"] == "transformers" else wide  # PEFT casts to fp32
    trained, each = (linear + others, wide) if full else (lora, 4)
    tokens = keys["per_device_train_batch_size"] * keys["max_length"]
    layer, layers = layer_bytes(keys, config, wide), config.num_hidden_layers
    checkpointing, inputs = keys["gradient_checkpointing"], wide * config.hidden_size
    kept = layers * layer if not checkpointing else layer + inputs * layers
    if checkpointing == "unsloth":  # the layers' inputs are offloaded to CPU; two stay
        kept = layer + 2 * inputs
    largest = config.hidden_size * config.intermediate_size
    return {
        "weights": linear * BYTES_PER_WEIGHT.get(keys["weights"], wide) + others * plain,
        "LoRA": 0 if full else lora * 4,
        "gradients": trained * each,
        "optimiser": trained * state_bytes(keys["optim"]),
        "activations": tokens * (kept + 3 * wide * config.intermediate_size)  # and their gradients
        + (wide * largest if quantised else 0),  # one matrix at a time in full
        # TRL's loss and our checks take 256 positions at a time, Unsloth's what memory is left
        "logits and loss": 256 * config.vocab_size * 16,
        "codec, CUDA": 0.7 * GIB,  # a guess: the context, cuBLAS's workspace, fragments
    }


def total_bytes(keys: dict, base) -> float:
    return sum(memory_plan(keys, base).values())


def smallest_change(keys: dict, base, free: float) -> dict | None:
    """The fewest keys to change for a run within `free` bytes, those that cost least first."""
    rows, steps = keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]
    offload = "unsloth" if keys["backend"] == "unsloth" else True
    changes = [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * steps},
        {"gradient_checkpointing": offload},
        {"optim": "paged_adamw_8bit"},
        {"full_finetuning": False, "weights": "4bit"},
        {"max_length": min(1024, keys["max_length"])},
        {"lora_r": min(16, keys["lora_r"])},
    ]
    changes = [change for change in changes if not change.items() <= keys.items()]
    for count in range(len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            change = {name: value for part in chosen for name, value in part.items()}
            if total_bytes(keys | change, base) <= free:
                return {name: value for name, value in change.items() if keys[name] != value}
    return None


def best_fit(keys: dict, base, free: float) -> dict | None:
    """The quickest of the ways that `free` bytes allow, at the same rows for an optimiser step.

    No checkpointing before any, since that does a third of the work twice; then as many rows at
    once as will go.
    """
    rows = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    for checkpointing in (False, True, "unsloth")[: 3 if keys["backend"] == "unsloth" else 2]:
        for once in (n for n in range(rows, 0, -1) if rows % n == 0):
            change = dict(zip(FIT_KEYS, (checkpointing, once, rows // once), strict=True))
            if total_bytes(keys | change, base) <= free:
                return change
    return None


def fit_of(keys: dict) -> dict:
    return {name: keys[name] for name in FIT_KEYS}


def plan_keys(settings: Settings) -> dict:
    return settings.flat()


def format_settings(change: dict | None) -> str:
    if change is None:
        return "no change of settings makes it fit: a smaller base, or a larger card"
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in change.items())


def print_plan(settings: Settings, base) -> None:
    """--plan: where the memory goes, and what this and other cards hold."""
    import torch

    keys = plan_keys(settings)
    print(f"{settings.model}: {settings.max_length} tokens a row, {format_settings(fit_of(keys))}")
    for name, size in memory_plan(keys, base).items():
        print(f"  {name:16}{size / GIB:8.2f} GiB")
    print(f"  {'in all':16}{total_bytes(keys, base) / GIB:8.2f} GiB, an estimate")
    here = torch.cuda.mem_get_info()[0] / GIB if torch.cuda.is_available() else None
    for card in [here] if here else CARDS if isinstance(settings.fit, bool) else [settings.fit]:
        change = smallest_change(keys, base, card * GIB)
        told = "fits" if change == {} else f"too small: {format_settings(change)}"
        fit = best_fit(keys, base, card * GIB)
        print(f"{card:4.4g} GiB: {told}" + (f"; --fit takes {format_settings(fit)}" if fit else ""))


def choose_fit(settings: Settings, base, checkpoint: Path | None) -> Settings:
    """Tells what the run will need, and with `fit` sets rows at once and checkpointing to suit.

    `UserError` with the smallest change where even what no setting of those spares is too much. (Of
    activations the plan is the least sure: where they alone are too much, it only says so.)
    """
    import torch

    keys, gpu = plan_keys(settings), torch.cuda.is_available()
    if not gpu and settings.fit is True:
        raise UserError("settings: fit true asks a GPU for its memory; without, say --fit 12 (GiB)")
    if not gpu and settings.fit is False:
        return settings
    free = torch.cuda.mem_get_info()[0] if isinstance(settings.fit, bool) else settings.fit * GIB
    change, plan = fit_of(keys), memory_plan(keys, base)
    if settings.fit is not False:
        change = best_fit(keys, base, free)
        if checkpoint:  # a resumed run goes on with what it had
            change = fit_of(read_json(Path(settings.output_dir) / SAVED_CONFIG))
    if change is None or sum(plan.values()) - plan["activations"] > free:
        told = f"{total_bytes(keys, base) / GIB:.1f} GiB needed, {free / GIB:.1f} GiB to be had"
        raise UserError(
            f"out of memory: {told}; {format_settings(smallest_change(keys, base, free))}"
        )
    total = total_bytes(keys | change, base)
    print(f"memory   {total / GIB:.1f} GiB planned of {free / GIB:.1f}: {format_settings(change)}")
    if total > free:
        print(
            f"         it may not fit; {format_settings(smallest_change(keys, base, free))} would"
        )
    return settings.replace(**change)


def step_down(settings: Settings) -> None:
    """After running out of memory in the first step: starts anew, planning for a tenth less.

    In a new process, which has all of the GPU's memory again. The clips are in the cache.
    """
    less = 0.9 * total_bytes(plan_keys(settings), read_base(settings)) / GIB
    print(f"out of memory in the first step: starting anew with --fit {less:.2f}", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--fit", f"{less:.2f}"])


def peak_memory() -> int:
    """Bytes held at most so far: of the GPU where there is one, else of RAM."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
