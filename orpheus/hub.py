"""Models as files, by folder or hub id: finding them, and checking that they are whole."""

import contextlib
import os
import re
from pathlib import Path

from orpheus.settings import UserError, first_reason, is_out_of_memory, read_json

TOKENIZER_FILES = ["*.json", "tokenizer*", "*.jinja"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def absolute_path_or_hub_id(path: str) -> str:
    """An absolute path if `path` exists on this machine, otherwise `path`, a hub id."""
    return os.path.abspath(path) if os.path.exists(path) else path


def is_hub_id(path: str) -> bool:
    """Whether `path` can only be a hub id: owner/name, and no such folder on this machine."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None
    return named and not os.path.exists(path)


def fetch(path: str, patterns: list[str]) -> Path:
    """The folder `path`, or the download of a hub repository's files that match `patterns`.

    Raises `UserError` if there is neither, if the repository is gated, or if the hub cannot be
    reached.
    """
    if os.path.isdir(path):
        return Path(path)
    if not is_hub_id(path):
        raise UserError(f"{path}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        message = "gated: accept its terms on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        message = "no such folder here, and no such repository on the hub"
    except OSError as error:
        message = (
            "no such folder here, and the hub cannot be reached; check the network, or give a "
            f"downloaded folder ({first_reason(error)})"
        )
    raise UserError(f"{path}: {message}")


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def is_model(folder: Path) -> bool:
    """Whether a folder holds an adapter or a whole model."""
    return is_adapter(folder) or (folder / "config.json").is_file()


@contextlib.contextmanager
def as_user_error(path: Path):
    """Turns what libraries raise for a damaged file into a `UserError` that names `path`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damaged = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    damaged += (NameError, OSError, RuntimeError, TypeError, re.error)
    try:
        yield
    except UserError:
        raise
    except (*damaged, ValueError, StrictDataclassError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: does not load: {first_reason(error)}") from None
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own
            raise
        raise UserError(f"{path}: does not load: {first_reason(error)}") from None


def find_base(adapter: Path) -> Path:
    """The folder of the base that an adapter names; `UserError` for a damaged adapter config."""
    config = adapter / "adapter_config.json"
    values = read_json(config)
    base, kind = values.get("base_model_name_or_path"), values.get("peft_type")
    if not isinstance(base, str) or not base:
        raise UserError(f"{config}: base_model_name_or_path must name the base; set it")
    if kind != "LORA":
        raise UserError(f"{config}: peft_type is {kind!r}; only LORA adapters are supported")
    if not os.path.isdir(base) and not is_hub_id(base):
        raise UserError(f"{config}: no folder {base}; correct base_model_name_or_path")
    return fetch(base, MODEL_FILES)


def weight_names(folder: Path) -> set[str]:
    """The names of the weights in a folder, from the headers of its safetensors files.

    Raises `UserError` for a file that is damaged, and if there is none.
    """
    from safetensors import SafetensorError, safe_open

    files, names = sorted(folder.glob("*.safetensors")), set()
    if not files:
        name = "adapter_model.safetensors" if is_adapter(folder) else "model.safetensors"
        raise UserError(f"{folder}: no {name}: the weights are missing")
    for file in files:
        try:
            with safe_open(file, "np") as weights:
                names |= set(weights.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or cut short: {first_reason(error)}") from None
    return names


def check_weights(folder: Path) -> None:
    """`UserError` if weights are missing or damaged, or if a base lacks layers of its config.

    Both backends need this check: transformers fills missing layers with random numbers.
    """
    names = weight_names(folder)
    if is_adapter(folder):
        return
    layers = {m[1] for m in map(re.compile(r"model\.layers\.(\d+)\.").match, names) if m}
    claimed = read_json(folder / "config.json").get("num_hidden_layers")
    if claimed != len(layers):
        fault = f"weights of {len(layers)} layers, and {claimed!r} in its config.json"
        raise UserError(f"{folder}: {fault}; download or copy it again")
