"""The GPU memory that a run needs, from the base's config alone, and what fits a GPU.

tests/benchmarks/account_memory.py counts the same tensor by tensor; the two agree within 5 %.
"""

import itertools
import json
import math
import resource
from collections import namedtuple

import torch
from transformers import AutoModelForCausalLM

from orpheus import models
from orpheus.files import CONFIG_FILES, fetch, is_adapter
from orpheus.settings import Settings, UserError
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# Bytes per weight; NF4 with its scales: one per 64 weights, which are quantised themselves
BYTES_PER_WEIGHT = {"4bit": 0.516, "8bit": 1, "fp8": 1}
# A model's config; the weights of its linear layers that are or can be quantised, of all else, and
# of a LoRA of rank 1; whether its head differs from its embeddings, None if that is not known
Base = namedtuple("Base", "config linear others lora own_head", defaults=[None])


def count_weights(config, own_head: bool | None = None) -> Base:
    """Return the Base of a model's config, counted on the meta device: nothing is loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = lora = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in models.LINEAR_LAYERS:
            lora += sum(module.weight.shape)
            left_out = models.stored_weights(config) and models.is_left_out(config, name)
            linear += 0 if left_out else module.weight.numel()
    others = sum(weight.numel() for weight in model.parameters()) - linear
    if not config.tie_word_embeddings:
        own_head = True
    elif own_head:
        others += config.vocab_size * config.hidden_size
    return Base(config, linear, others, lora, own_head)


def read_config(settings: Settings):
    """Return the base's config.

    Raises: UserError for an adapter, or a max_length beyond the base's context.
    """
    folder = fetch(settings.model, CONFIG_FILES)
    if is_adapter(folder):
        raise UserError(f"model {folder} is an adapter; give the base that it was trained on")
    config = models.read_model_config(folder)
    models.check_stored(settings, config)
    context = f"{config.max_position_embeddings} tokens that {settings.model} sees"
    if settings.max_length > config.max_position_embeddings:
        raise UserError(f"max_length {settings.max_length} is over the {context}")
    return config


def read_base(settings: Settings) -> Base:
    """Return the Base that `settings.model` names."""
    config, folder = read_config(settings), fetch(settings.model, CONFIG_FILES)
    return count_weights(config, models.has_own_head(folder, models.training_dtype(settings)))


def state_bytes(optimiser: str, weight_value: int) -> float:
    """Bytes of optimiser state on the GPU for each trained weight of `weight_value` bytes."""
    if any(word in optimiser for word in ("paged", "adafactor", "sgd")):
        return 0  # in RAM when the GPU is full; a row and a column; none
    return (1 if "lion" in optimiser else 2) * (1 if "8bit" in optimiser else weight_value)


def bytes_per_value(config: dict) -> tuple[int, int]:
    """Bytes per value of a matrix product; and of hidden states, embeddings and norms."""
    product = 2 if config["bf16"] or config["fp16"] else 4
    # PEFT casts to fp32 what is not quantised; full fine-tuning in fp16 keeps fp32 weights
    peft = config["weights"] in BYTES_PER_WEIGHT and config["backend"] == "transformers"
    return product, 4 if peft or (config["fp16"] and config["full_finetuning"]) else product


def layer_bytes(config: dict, base_config) -> int:
    """What a layer keeps of each token for its backward pass, its copy of the mask aside.

    From autograd's saved-tensor hooks on PEFT's LoRA in transformers' Llama (a test counts again);
    Unsloth's from the forward functions of its kernels/fast_lora.py.
    """
    product, state = bytes_per_value(config)
    hidden, inner = base_config.hidden_size, base_config.intermediate_size
    heads, full = base_config.num_attention_heads, config["full_finetuning"]
    queries = heads * base_config.head_dim
    # Queries; keys and values, a copy for each query head; the output; the sums' logarithms
    attention = 4 * product * queries + 4 * heads
    if config["backend"] == "unsloth" and not full:
        return attention + product * (4 * hidden + 2 * inner)  # norms' inputs, outputs; gate, up
    norms, mlp = 2 * 4 * hidden, inner * (3 * state + product)  # norms keep fp32
    if full:  # what the norms multiply, and the inputs of the linear layers
        return attention + norms + mlp + 4 * product * hidden
    # Autocast makes a 16-bit copy of each LoRA's input, even where three or two have the same
    inputs = (5 if product == 2 else 2) * hidden + (queries if state == 2 else 0)
    return attention + norms + mlp + product * (inputs + 7 * config["lora_r"])


def training_moments(config: dict, base: Base, gradients: float) -> list[dict[str, float]]:
    """Bytes at the moments of a step that can be its peak; `gradients` are those of all weights."""
    shape, (product, state) = base.config, bytes_per_value(config)
    lora, unsloth = not config["full_finetuning"], config["backend"] == "unsloth"
    checkpointing, length = config["gradient_checkpointing"], config["max_length"]
    tokens = config["per_device_train_batch_size"] * length
    # Packed rows are one long row; SDPA copies its mask in each layer, Unsloth's kernels need none
    mask = 0 if unsloth else tokens * (tokens if config["batching"] == "pack" else length)
    layer = tokens * layer_bytes(config, shape) + product * mask
    states, last = tokens * state * shape.hidden_size, mask  # a layer's input; kept to the last
    kept = mask + shape.num_hidden_layers * (states if checkpointing else layer)
    if unsloth and checkpointing == "unsloth":
        # Offloaded to CPU by way of two buffers; the embeddings and the last layer's input stay
        last, kept = 3 * states, 4 * states
    # Autocast keeps 16-bit copies of the LoRA through the forward pass, and beyond it without
    # checkpoints; in the loss's backward pass it keeps a copy of a head that is held in fp32
    copies = 2 * base.lora * config["lora_r"] if lora and product == 2 and not unsloth else 0
    embeddings = product * shape.vocab_size * shape.hidden_size
    head = embeddings if product < state else 0
    # TRL's loss and our checks take 256 positions at a time, Unsloth's up to half of what is free
    loss = 256 * 16 * shape.vocab_size + 4 * states
    loss += max(head, copies) if checkpointing else head + copies
    tied = 0 if lora else 2 * embeddings  # gradients as a head and as embeddings, before their sum
    # The MLP's gradients are three and a cast, or one, since Unsloth reuses what it kept
    lean = product * (shape.intermediate_size + shape.hidden_size)
    work = tokens * (lean if unsloth and lora else 10 * shape.intermediate_size)
    # Without earlier batches in the step, gradients grow as activations are freed
    before = gradients if config["gradient_accumulation_steps"] > 1 else 0
    again = layer if checkpointing else copies
    roots = gradients if config["optim"] == "adamw_torch" else 0  # of all moments at once
    return [
        {"gradients": before, "activations": kept, "loss: logits": loss + tied},
        {"gradients": before, "activations": kept + again, "a layer's gradients": work},
        {"gradients": gradients, "activations": last + layer, "a layer's gradients": work},
        {"gradients": gradients, "the step's end": max(roots, tied)},
    ]


def speaking_bytes(config: dict, base_config) -> float:
    """Return the size of a batch's full cache, with one layer's copy of it per query head."""
    tokens = SLOTS * (config["max_seconds"] * SAMPLE_RATE / FRAME_SAMPLES + 1)
    # About 15 characters are spoken in a second; longer texts are spoken in parts
    parts = sum(math.ceil(len(t) / 15 / config["max_seconds"]) for t in config["sample_texts"])
    parts = min(parts, max(1, config["speak_batch_size"] // config["best_of"]))
    heads = base_config.num_hidden_layers * base_config.num_key_value_heads
    values = 2 * base_config.head_dim * (heads + base_config.num_attention_heads)
    return parts * config["best_of"] * tokens * values * bytes_per_value(config)[1]


def memory_plan(config: dict, base: Base) -> dict[str, float]:
    """Return the bytes on the GPU at the worst moment of a run, by what they hold.

    `config` is a dict of the settings, with bf16 and fp16 resolved.
    """
    shape, (product, state), full = base.config, bytes_per_value(config), config["full_finetuning"]
    lora, linear = base.lora * config["lora_r"], BYTES_PER_WEIGHT.get(config["weights"], state)
    trained, each = (base.linear + base.others, state) if full else (lora, 4)
    # Unsloth's sines and cosines of every position, and two quantised matrices in full
    buffers = shape.max_position_embeddings * shape.head_dim
    buffers += shape.hidden_size * shape.intermediate_size if linear < state else 0
    moments = training_moments(config, base, trained * each)
    moments.append({"samples: keys and values": speaking_bytes(config, shape)})
    return {
        "weights": base.linear * linear + base.others * state,
        "LoRA": 0 if full else lora * 4,
        "optimiser": trained * state_bytes(config["optim"], each),
        "Unsloth's buffers": 2 * product * buffers if config["backend"] == "unsloth" else 0,
        **max(moments, key=lambda moment: sum(moment.values())),
        "codec, CUDA": 0.7 * GIB,  # a guess: the context, cuBLAS's workspace, fragments
    }


def total_bytes(config: dict, base: Base) -> float:
    return sum(memory_plan(config, base).values())


def smallest_change(config: dict, base: Base, free: float) -> dict | None:
    """The fewest settings to change for a run within `free` bytes, those that cost least first."""
    rows, steps = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    remedies = [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * steps},
        {"speak_batch_size": 1},
        {"gradient_checkpointing": "unsloth" if config["backend"] == "unsloth" else True},
        {"optim": "paged_adamw_8bit"},
        {"full_finetuning": False, "weights": "4bit"},
        {"max_length": min(1024, config["max_length"])},
        {"lora_r": min(16, config["lora_r"])},
    ]
    remedies = [remedy for remedy in remedies if not all(config[k] == v for k, v in remedy.items())]
    for count in range(len(remedies) + 1):
        for group in itertools.combinations(remedies, count):
            change = {k: v for remedy in group for k, v in remedy.items() if config[k] != v}
            if total_bytes(config | change, base) <= free:
                return change
    return None


def most_rows(config: dict, base: Base, free: float) -> int:
    """The most rows per batch with which a run needs no more than `free` bytes; 0: not even one."""
    key = "per_device_train_batch_size"
    fits = (total_bytes(config | {key: rows}, base) <= free for rows in range(1, 513))
    return sum(itertools.takewhile(bool, fits))


def format_settings(change: dict | None) -> str:
    if change is None:
        return "only a smaller base, or a larger card"
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in change.items())


def print_plan(settings: Settings, base: Base) -> None:
    """--plan: where the memory goes, and what this GPU or, without one, other cards hold."""
    config = dict(settings)
    keys = "max_length", "gradient_checkpointing", "per_device_train_batch_size"
    print(f"{settings.model}: {format_settings({name: config[name] for name in keys})}")
    for name, size in memory_plan(config, base).items():
        if size:
            print(f"  {name:26}{size / GIB:8.2f} GiB")
    print(f"  {'in all':26}{total_bytes(config, base) / GIB:8.2f} GiB, an estimate")
    if base.own_head is None:  # since the weights are not here
        more = bytes_per_value(config)[1] * base.config.vocab_size * base.config.hidden_size / GIB
        print(f"  taking its head for its embeddings; one of its own is {more:.2f} GiB more")
    for card in [torch.cuda.mem_get_info()[0] / GIB] if torch.cuda.is_available() else CARDS:
        change = smallest_change(config, base, card * GIB)
        verdict = "fits" if change == {} else f"too small: {format_settings(change)}"
        rows = most_rows(config, base, card * GIB)
        room = f"; room for {rows} row{'s' * (rows > 1)} a batch" if rows else ""
        print(f"{card:4.4g} GiB: {verdict}{room}")


def peak_memory() -> int:
    """Bytes held at most so far: of the GPU where there is one, else of RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
