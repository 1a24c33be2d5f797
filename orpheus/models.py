"""Loading models: tokenizer, base, adapter or merged model, dtype and quantisation."""

import json
import os
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from orpheus.files import write_text
from orpheus.hub import (
    MODEL_FILES,
    as_user_error,
    check_weights,
    fetch,
    find_base,
    is_adapter,
    is_hub_id,
    weight_names,
)
from orpheus.settings import UserError, read_json

# cuDNN's attention, which torch 2.11 and newer prefer on Hopper, gives NaN gradients for some
# masks (github.com/pytorch/pytorch/issues/196678).
torch.backends.cuda.enable_cudnn_sdp(False)

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_machine(model: str) -> None:
    """`UserError` for a hub's model on a machine without a GPU; a folder's may be small enough."""
    if not is_hub_id(model):
        return
    if model.startswith("outputs/") or os.path.isdir(os.path.dirname(model)):
        raise UserError(f"{model}: no such folder; give a run's folder or a hub id")
    if device() == "cpu":
        raise UserError(
            f"{model}: no GPU found (does nvidia-smi work?), and Orpheus-3B would take days on a "
            "CPU; `make demo` runs the same path on a tiny model, --model takes a local folder"
        )


def read_model_config(folder: Path):
    """The config of a Llama; `UserError` for a damaged config and for other models."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "llama":
        raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}; Orpheus is a llama")
    with as_user_error(folder / "config.json"):
        return AutoConfig.from_pretrained(str(folder))


def load_tokenizer(folder: Path):
    """The tokenizer of a model's folder; `UserError` if it is missing or damaged."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer.json: the tokenizer is missing")
    with as_user_error(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer("anna: hello")  # some damage shows up only in use
    return tokenizer


def bitsandbytes_config(weights: str, dtype):
    """bitsandbytes' config for `weights` of "4bit" (NF4 with double quantisation, as in QLoRA,
    arXiv 2305.14314) or "8bit" (arXiv 2208.07339), computing in `dtype`; None for others.
    """
    if weights == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if weights != "4bit":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_fit(folder: Path, missing: set, unexpected: set) -> None:
    """`UserError` if weights are not those of the config: transformers makes up missing ones."""
    for names, fault in (missing, "are missing"), (unexpected, "have no place in its config"):
        if names:
            raise UserError(f"{folder}: {len(names)} weights {fault}, the first {min(names)}")


def check_adapter(model, folder: Path) -> None:
    """`UserError` if a PEFT model's adapter and the file that it was loaded from differ."""
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    held = weight_names(folder)
    check_fit(folder, wanted - held, {name for name in held - wanted if "lora_" in name})


def training_dtype(keys) -> torch.dtype:
    """The dtype of a training by `bf16` and `fp16` of its Settings or SFTConfig.

    A `bf16` that is not decided yet, None, counts as true.
    """
    if keys.fp16:
        return torch.float16
    return torch.float32 if keys.bf16 is False else torch.bfloat16


def choose_dtype(folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` where the machine computes in it. On a GPU, None is that of the stored weights.

    A GPU without bfloat16 takes float16 instead. A CPU takes bfloat16 only for weights that are
    stored in it, otherwise float32.
    """
    config = read_json(folder / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    if not torch.cuda.is_available():
        bf16 = stored == "bfloat16" and dtype in (torch.bfloat16, torch.float16)
        return torch.bfloat16 if bf16 else torch.float32
    dtype = dtype or (torch.float16 if stored == "float16" else torch.bfloat16)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if dtype == torch.bfloat16 and not has_bf16 else dtype


def load_base(folder: Path, dequantize_to=None, quantization_config=None, **keys):
    """transformers' model of a folder; `UserError` if it is damaged or lacks weights.

    Args:
        dequantize_to: a dtype, in which a model that is quantised on loading is dequantised layer
            by layer. Its weights keep the values that quantisation gave them.
    """
    transformers_logging.disable_progress_bar()
    keys["output_loading_info"] = True
    if quantization_config:  # given as None, it would hide that of a base that is quantised already
        keys["quantization_config"] = quantization_config
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # check_fit says what its table of weights would
    try:
        with as_user_error(folder / "config.json"):
            model, info = AutoModelForCausalLM.from_pretrained(str(folder), **keys)
            if dequantize_to and hasattr(model.config, "quantization_config"):
                model = model.dequantize(dequantize_to).to(dequantize_to)
    finally:
        transformers_logging.set_verbosity(verbosity)
    layers = {name for name in info["unexpected_keys"] if name.startswith("model.layers.")}
    check_fit(folder, set(info["missing_keys"]), layers)
    return model


def load_model(path: str, weights: str = "16bit", merged: bool = False, dtype=None):
    """(model, tokenizer) of an adapter or checkpoint of finetune.py, a merged folder or a hub id.

    With weights "4bit" or "8bit", the base's weights get the values that they had in training. On
    a GPU those of 4 bits stay quantised; elsewhere they are dequantised, which is faster and gives
    the same logits on every CPU.

    Args:
        weights: how the base's weights were held in training, as in config.json.
        merged: merge the adapter into its base, in fp16.
        dtype: of the training, as `choose_dtype` takes it; None is float32 on a CPU.
    """
    folder = fetch(path, MODEL_FILES)
    whole = find_base(folder) if is_adapter(folder) else folder
    read_model_config(whole)
    for part in {folder, whole}:
        check_weights(part)
    tokenizer = load_tokenizer(folder)
    dtype = choose_dtype(whole, dtype)
    config = bitsandbytes_config(weights, dtype)
    target = torch.float16 if merged else dtype
    keys = {"dtype": dtype if config else target, "device_map": device()}
    keys["quantization_config"] = config
    if merged or weights != "4bit" or not torch.cuda.is_available():
        keys["dequantize_to"] = target
    model = load_base(whole, **keys)
    if whole != folder:
        with as_user_error(folder / "adapter_config.json"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # check_adapter's
            model = PeftModel.from_pretrained(model, str(folder))
            check_adapter(model, folder)
            model = model.merge_and_unload() if merged else model
    if torch.cuda.is_available():  # PEFT loads a LoRA in fp32; autocast trained it in `dtype`
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return model.eval(), tokenizer


def add_old_names(folder: Path) -> None:
    """Add to a saved model's or adapter's configs what transformers 4 reads.

    transformers 5 writes the rotary settings as `rope_parameters` and a tokenizer class of its own.
    Version 4, and so vLLM before 0.19.1, takes theta 10,000 and no scaling instead, without a word,
    and refuses the tokenizer.
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
