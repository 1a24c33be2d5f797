"""Models: tokenizer, base, adapter or merged model; dtype and quantisation."""

import json
import os
import re
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from orpheus.files import (
    CONFIG_FILES,
    MODEL_FILES,
    check_weights,
    fetch,
    find_base,
    is_adapter,
    is_hub_id,
    weight_names,
    write_text,
)
from orpheus.settings import Settings, UserError, read_json

# cuDNN's attention, which torch 2.11 and newer prefer on Hopper, gives NaN gradients for some
# masks (github.com/pytorch/pytorch/issues/196678).
torch.backends.cuda.enable_cudnn_sdp(False)

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL_BASE = "unsloth/orpheus-3b-0.1-ft"  # of which the default base is the copy in 4 bits
CPU_WEIGHTS = 5 * 10**8  # in the layers of a hub's model: more would take days on a CPU


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_machine(model: str) -> None:
    """Raise a UserError if a hub's model, or a hub's adapter for one, is too large for a CPU."""
    if not is_hub_id(model):
        return
    if model.startswith("outputs/") or os.path.isdir(os.path.dirname(model)):
        raise UserError(f"{model}: no such folder; give a run's folder or a hub id")
    if torch.cuda.is_available():
        return
    large = "orpheus-3b" in model.lower()  # told without asking the hub
    if not large:
        folder = fetch(model, CONFIG_FILES)
        shape = read_model_config(find_base(folder, CONFIG_FILES) if is_adapter(folder) else folder)
        layer = shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
        large = shape.num_hidden_layers * layer > CPU_WEIGHTS
    if large:
        raise UserError(
            f"{model}: {missing_gpu()}, and a model of this size would take days on a CPU; "
            "`make demo` runs the same path on a tiny model, --model takes a local folder"
        )


def missing_gpu() -> str:
    """Return why torch sees no GPU."""
    needed = torch.version.cuda
    # Private: torch.cuda.is_available() is as false for a driver that is too old as for none
    version = torch._C._cuda_getDriverVersion() if needed else 0
    if 0 < version < 1000 * float(needed or 0):
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return f"the driver has CUDA {driver}, and torch needs {needed} here: update the driver"
    return "no GPU found (does nvidia-smi work?)"


def read_model_config(folder: Path):
    """Return the config of a Llama; a UserError for another model, or a foreign quantisation."""
    path = folder / "config.json"
    values = read_json(path)
    if (kind := values.get("model_type")) != "llama":
        raise UserError(f"{path}: model_type is {kind!r}; Orpheus is a llama")
    method = (values.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UserError(f"{path}: its weights are quantised by {method}; give --model {FULL_BASE}")
    return AutoConfig.from_pretrained(str(folder))


def stored_weights(config) -> str | None:
    """Return "4bit" or "8bit" for the config of a base that is stored so, else None."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    return "4bit" if stored["load_in_4bit"] else "8bit"


def is_left_out(config, name: str) -> bool:
    """Return whether a base that is stored quantised has the layer `name` in 16 bits."""
    skipped = config.quantization_config.get("llm_int8_skip_modules")
    return not should_convert_module(name, skipped)  # transformers' own rule


def has_own_head(folder: Path, dtype: torch.dtype) -> bool | None:
    """Return whether a base's head differs from its embeddings in `dtype`, and so is not tied.

    None if no weights are here.
    """
    files = sorted(folder.glob("*.safetensors"))
    names = "lm_head.weight", "model.embed_tokens.weight"
    if not files or names[0] not in weight_names(folder):
        return False if files else None
    opened = [safe_open(file, "pt") for file in files]
    parts = [file.get_slice(name) for file in opened for name in names if name in [*file.keys()]]
    rows = range(0, parts[0].get_shape()[0], 4096)
    return any(not torch.equal(*(part[n : n + 4096].to(dtype) for part in parts)) for n in rows)


def check_stored(settings: Settings, config) -> None:
    """Raise a UserError if a base is stored quantised, and not as `weights` says."""
    stored = stored_weights(config)
    if stored in (None, settings.weights):
        return
    full = re.sub(r"(-unsloth)?-bnb-4bit$", "", settings.model)
    full = full if is_hub_id(full) and full != settings.model else FULL_BASE
    raise UserError(
        f"settings: weights {settings.weights}: {settings.model} is stored in {stored[0]} bits: "
        f'set weights to "{stored}", or train over --model {full}'
    )


def load_tokenizer(folder: Path):
    """Return the tokenizer of a model's folder; a UserError if there is none."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer.json: the tokenizer is missing")
    return AutoTokenizer.from_pretrained(str(folder))


def check_fit(folder: Path, missing: set, unexpected: set) -> None:
    """Raise a UserError for missing weights, which transformers makes up, and for surplus ones."""
    for names, fault in (missing, "are missing"), (unexpected, "have no place in its config"):
        if names:
            raise UserError(f"{folder}: {len(names)} weights {fault}, the first {min(names)}")


def training_dtype(keys) -> torch.dtype:
    """Return the dtype of a run by its Settings, or its SFTConfig, which Unsloth may change."""
    if keys.fp16:
        return torch.float16
    return torch.float32 if keys.bf16 is False else torch.bfloat16


def speaking_dtype(folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Return `dtype`, or for None that of the stored weights, where the machine computes in it.

    A GPU without bfloat16 takes float16 instead. A CPU takes bfloat16 only for weights that are
    stored in it, otherwise float32.
    """
    config = read_json(folder / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    if not torch.cuda.is_available():
        bf16 = stored == "bfloat16" and dtype != torch.float32
        return torch.bfloat16 if bf16 else torch.float32
    dtype = dtype or (torch.float16 if stored == "float16" else torch.bfloat16)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if dtype == torch.bfloat16 and not has_bf16 else dtype


def bitsandbytes_config(weights: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the config of QLoRA's NF4 (arXiv 2305.14314) or LLM.int8 (2208.07339), or None."""
    if weights == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**nf4) if weights == "4bit" else None


def settle_model(model, dtype: torch.dtype) -> None:
    """Set what libraries leave as it was stored, by bitsandbytes' own names.

    A base that is stored in 4 bits names the dtype of the machine that made it, mostly bfloat16,
    in its config and with each weight; a GPU before Ampere would emulate that. And on CPUs with
    avx512_bf16, weights are repacked in eval mode, and would have no gradients after a check.
    """
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head.data_ptr() != embeddings.data_ptr():
        model.config.tie_word_embeddings = False  # transformers 4 would throw this head away
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.compute_dtype = state.dtype = dtype
            module.support_avx512bf16_for_cpu = False


def load_base(folder: Path, weights: str, dtype: torch.dtype, device_map=None, dequantize_to=None):
    """Return transformers' model of a folder, quantised as `weights` says or as it is stored.

    It computes in `dtype`. With `dequantize_to`, a dtype, quantised weights are dequantised, with
    the values that quantisation gave them.
    """
    keys = {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    if not stored_weights(read_model_config(folder)):
        keys["quantization_config"] = bitsandbytes_config(weights, dtype)
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # check_fit says what its table would
    model, info = AutoModelForCausalLM.from_pretrained(str(folder), **keys)
    layers = {name for name in info["unexpected_keys"] if name.startswith("model.layers.")}
    check_fit(folder, set(info["missing_keys"]), layers)
    settle_model(model, dtype)
    if dequantize_to and hasattr(model.config, "quantization_config"):
        model = model.dequantize(dequantize_to).to(dequantize_to)
        # Private: how its 4-bit file was read, which save_pretrained would try to undo
        model._weight_conversions = None
    transformers_logging.set_verbosity(verbosity)
    return model


def load_model(path: str, weights: str = "16bit", merged: bool = False, dtype=torch.float32):
    """Return (model, tokenizer) of an adapter, checkpoint, merged folder, base or hub id.

    The base's weights get the values that they had in training, by the run's `weights`: on a GPU
    they stay in 4 bits; elsewhere they are dequantised, which gives the same logits on every CPU.

    Args:
        merged: merge the adapter into its base, in fp16.
        dtype: of the training, as `speaking_dtype` takes it.
    """
    folder = fetch(path, MODEL_FILES)
    whole = find_base(folder) if is_adapter(folder) else folder
    read_model_config(whole)
    for part in {folder, whole}:
        check_weights(part)
    tokenizer = load_tokenizer(folder)
    dtype = speaking_dtype(whole, dtype)
    target = torch.float16 if merged else dtype
    plain = merged or weights != "4bit" or not torch.cuda.is_available()
    held = dtype if weights in ("4bit", "8bit") else target
    model = load_base(whole, weights, held, device(), target if plain else None)
    if whole != folder:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # the next lines'
            model = PeftModel.from_pretrained(model, str(folder))
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        saved = weight_names(folder)
        check_fit(folder, wanted - saved, {name for name in saved - wanted if "lora_" in name})
        model = model.merge_and_unload() if merged else model
    if torch.cuda.is_available():  # PEFT loads a LoRA in fp32; autocast trained it in `dtype`
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return model.eval(), tokenizer


def add_old_names(folder: Path) -> None:
    """Add to saved configs what transformers 4 reads, and so vLLM before 0.19.1.

    For `rope_parameters` it would take theta 10,000 and no scaling, without a word.
    """
    for path in folder.glob("*config.json"):
        values = read_json(path)
        new = {}
        if path.name == "config.json" and values.get("rope_parameters"):
            scaling = dict(values["rope_parameters"])
            new = {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": values.get("dtype")}
            new["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
        if path.name == "tokenizer_config.json":
            new = {"tokenizer_class": "PreTrainedTokenizerFast"}
            if isinstance(values.get("extra_special_tokens"), list):
                new["additional_special_tokens"] = values.pop("extra_special_tokens")
        if new:
            write_text(path, json.dumps(values | new, indent=2, ensure_ascii=False) + "\n")


def check_loaded(model, settings: Settings, dtype: torch.dtype) -> None:
    """Print what was loaded for training; a UserError if it is not held as `weights` says."""
    quantised = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}.get(settings.weights)
    if quantised and quantised not in {type(module).__name__ for module in model.modules()}:
        raise UserError(
            f"weights {settings.weights}: {settings.backend} loaded 16-bit ones instead; "
            "`python -m bitsandbytes` says what is wrong with it"
        )
    weights = str(model.dtype if settings.weights == "16bit" else dtype).removeprefix("torch.")
    if settings.weights != "16bit":
        weights = f"{settings.weights.replace('bit', '-bit')}, {weights}"
    method = "all weights" if settings.full_finetuning else f"LoRA r={settings.lora_r}"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"model    {settings.model}, {weights}; {method}: {trained:.3g} M parameters to train")
