"""Models by hub id or folder: tokenizer, base, adapter or merged model, dtype and 4-bit."""

import contextlib
import os
import re
import warnings
from pathlib import Path

from orpheus.settings import UserError, first_reason, out_of_memory, read_json


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def local(path: str) -> str:
    """An absolute path where `path` exists here, else the hub id as it was asked for."""
    return os.path.abspath(path) if os.path.exists(path) else path


def on_hub(path: str) -> bool:
    """Whether `path` can only mean a hub id: owner/name, and nothing of that name here."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None
    return named and not os.path.exists(path)


def check_machine(model: str) -> None:
    """`UserError` for a hub's model where there is no GPU; a local one may be small enough."""
    if on_hub(model) and (model.startswith("outputs/") or os.path.isdir(os.path.dirname(model))):
        raise UserError(f"{model}: no such folder; --model takes a run's folder or a hub id")
    if on_hub(model) and device() == "cpu":
        told = f"{model}: no such folder here, and no GPU for the hub's: Orpheus-3B would take days"
        remedy = "`make demo` runs the same path on a tiny model, --model takes a local folder"
        raise UserError(f"{told} on a CPU; {remedy}")


def fetch(path: str, patterns: list[str]) -> Path:
    """The local folder of `path`: itself, or a hub repository's files that match `patterns`."""
    if os.path.isdir(path):
        return Path(path)
    if not on_hub(path):
        raise UserError(f"{path}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except errors.GatedRepoError:
        remedy = "gated: accept its terms on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        remedy = "no such folder here, and no such repository on the hub"
    except OSError as error:
        why = " ".join(str(error).split())[:200]
        remedy = (
            f"no such folder here, and the hub cannot be reached ({why}); give a local folder by "
            "--model or --codec, or take the tiny ones of --config data/demo/config.json"
        )
    raise UserError(f"{path}: {remedy}")


TOKENIZER_FILES = ["*.json", "tokenizer*", "*.jinja"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def is_model(folder: Path) -> bool:
    return is_adapter(folder) or (folder / "config.json").is_file()


@contextlib.contextmanager
def loads(path: Path):
    """What libraries raise for a damaged file at `path` becomes a `UserError` that names it."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damaged = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    damaged += (NameError, OSError, RuntimeError, TypeError, re.error)
    try:
        yield
    except (UserError, *out_of_memory()):
        raise
    except (*damaged, ValueError, StrictDataclassError, SafetensorError) as error:
        raise UserError(f"{path}: does not load: {first_reason(error)}") from None
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own
            raise
        raise UserError(f"{path}: does not load: {first_reason(error)}") from None


def read_model_config(folder: Path):
    """The config of a Llama; `UserError` for a damaged one and for other models."""
    from transformers import AutoConfig

    kind = read_json(folder / "config.json").get("model_type")
    if kind != "llama":
        raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}; Orpheus is a llama")
    with loads(folder / "config.json"):
        return AutoConfig.from_pretrained(str(folder))


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder; `UserError` where there is none."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer.json: the tokenizer is missing")
    with loads(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer("anna: hello")  # some damage shows up only in use
    return tokenizer


def quantization_config(weights: str, dtype):
    """bitsandbytes' config for `weights` of "4bit" (NF4 with double quantisation, as in QLoRA,
    arXiv 2305.14314) or "8bit" (arXiv 2208.07339), computing in `dtype`; None for others.
    """
    from transformers import BitsAndBytesConfig

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


def find_base(adapter: Path) -> Path:
    """The folder of the base that an adapter names; `UserError` for an adapter that is damaged."""
    config = adapter / "adapter_config.json"
    values = read_json(config)
    base, kind = values.get("base_model_name_or_path"), values.get("peft_type")
    if not isinstance(base, str) or not base:
        raise UserError(f"{config}: base_model_name_or_path must name the base; set it")
    if kind != "LORA":
        raise UserError(f"{config}: peft_type is {kind!r}; only LORA adapters are supported")
    if not os.path.isdir(base) and not on_hub(base):
        raise UserError(f"{config}: no folder {base}; correct base_model_name_or_path")
    return fetch(base, MODEL_FILES)


def check_weights(folder: Path) -> None:
    """`UserError` where weights are missing or damaged, or a base has not the layers it claims.

    Whichever library loads the base: transformers fills in missing layers at random.
    """
    from safetensors import SafetensorError, safe_open

    files, layers = sorted(folder.glob("*.safetensors")), set()
    if not files:
        name = "adapter_model.safetensors" if is_adapter(folder) else "model.safetensors"
        raise UserError(f"{folder}: no {name}: the weights are missing")
    for file in files:
        try:
            with safe_open(file, "np") as weights:
                names = list(weights.keys())
            layers |= {m[1] for m in map(re.compile(r"model\.layers\.(\d+)\.").match, names) if m}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or cut short: {first_reason(error)}") from None
    if not is_adapter(folder):
        claimed = read_model_config(folder).num_hidden_layers
        if claimed != len(layers):
            fault = f"weights of {len(layers)} layers, and {claimed} in its config.json"
            raise UserError(f"{folder}: {fault}; download or copy it again")


def check_fit(folder: Path, missing: set, unexpected: set) -> None:
    """`UserError` where weights are not those of the config: transformers makes up missing ones."""
    for names, fault in (missing, "are missing"), (unexpected, "have no place in its config"):
        if names:
            raise UserError(f"{folder}: {len(names)} weights {fault}, the first {min(names)}")


def check_adapter(model, folder: Path) -> None:
    """`UserError` where a PEFT model's adapter and the file that it was loaded from differ."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        held = set(file.keys())
    check_fit(folder, wanted - held, {name for name in held - wanted if "lora_" in name})


def choose_dtype(folder: Path, fp32: bool):
    """The dtype to speak in: 16-bit on a GPU; on a CPU bfloat16 if stored so and not `fp32`."""
    import torch

    config = read_json(folder / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) and stored != "float16"
        return torch.bfloat16 if bf16 else torch.float16
    return torch.bfloat16 if stored == "bfloat16" and not fp32 else torch.float32


def load_base(folder: Path, dequantize_to=None, **keys):
    """transformers' model of a folder; `UserError` where that is damaged or lacks weights.

    With `dequantize_to`, a dtype, a quantised model is dequantised layer by layer: it keeps the
    values that quantisation gave its weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    keys["output_loading_info"] = True
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # check_fit says what its table of weights would
    try:
        with loads(folder / "config.json"):
            model, info = AutoModelForCausalLM.from_pretrained(str(folder), **keys)
            if dequantize_to and hasattr(model.config, "quantization_config"):
                model = model.dequantize(dequantize_to).to(dequantize_to)
    finally:
        transformers_logging.set_verbosity(verbosity)
    layers = {name for name in info["unexpected_keys"] if name.startswith("model.layers.")}
    check_fit(folder, set(info["missing_keys"]), layers)
    return model


def load_model(path: str, weights: str = "16bit", merged: bool = False, fp32: bool = True):
    """(model, tokenizer) of an adapter or checkpoint of finetune.py, a merged folder or a hub id.

    Quantised weights stay quantised on a GPU that holds them in 4 bits. Elsewhere they are
    dequantised, since that is faster and gives the same numbers on every machine.

    Args:
        weights: how the base's weights were held in training; "4bit" and "8bit" quantise them.
        merged: merge the adapter into its base, in fp16.
        fp32: on a CPU, compute in fp32 even where the base is stored in bfloat16.
    """
    import torch

    folder = fetch(path, MODEL_FILES)
    whole = find_base(folder) if is_adapter(folder) else folder
    read_model_config(whole)
    for part in {folder, whole}:
        check_weights(part)
    tokenizer = load_tokenizer(folder)
    dtype = choose_dtype(whole, fp32)
    config = quantization_config(weights, dtype)
    target = torch.float16 if merged else dtype
    keys = {"dtype": dtype if config else target, "quantization_config": config}
    if torch.cuda.is_available() or merged:
        keys["device_map"] = device()
    if merged or weights != "4bit" or not torch.cuda.is_available():
        keys["dequantize_to"] = target
    model = load_base(whole, **keys)
    if whole != folder:
        from peft import PeftModel

        with loads(folder / "adapter_config.json"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # check_adapter's
            model = PeftModel.from_pretrained(model, str(folder))
            check_adapter(model, folder)
            model = model.merge_and_unload() if merged else model
    return model.eval(), tokenizer


LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
