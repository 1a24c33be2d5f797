"""Whole files, and where a path or hub id lies; models as files."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orpheus.settings import UserError, read_json

CONFIG_FILES = ["*config.json"]
TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer*"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
GB = 10**9
TOLD = GB // 20  # bytes; smaller downloads go without a line and bars


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a new name for a file, or a folder, which is renamed to `path` at the end.

    So `path` is whole or not there, whatever other processes write. A folder replaces only an
    empty one.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:  # after an error it is still there
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def make_folder(path: str, name: str) -> None:
    """Make a folder and try to write into it; the error names the key that it is set by."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        remedy = f"set --{name} to a folder that can be written"
        raise UserError(f"{path}: {error.strerror}; {remedy}") from error


def absolute_path_or_hub_id(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path


def is_hub_id(path: str) -> bool:
    """Return whether `path` can only be a hub id: owner/name, and no such folder here."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None
    return named and not os.path.exists(path)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def is_model(folder: Path) -> bool:
    return is_adapter(folder) or (folder / "config.json").is_file()


def fetch(path: str, patterns: list[str]) -> Path:
    """Return the folder `path`, or that of a hub repository's files that match `patterns`.

    The hub is not asked for what its cache has already. A UserError says why there is neither.
    """
    if os.path.isdir(path):
        return Path(path)
    if not is_hub_id(path):
        raise UserError(f"{path}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import errors, snapshot_download

    files = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        folder = Path(snapshot_download(path, local_files_only=True, **files))
        if any(folder.glob(patterns[-1])):  # what an old version of the library left may lack it
            return folder
    try:
        bars = announce_download(path, files)
        return Path(snapshot_download(path, tqdm_class=bars, **files))
    except OSError as error:
        cause = error.__cause__ or error
        if isinstance(cause, errors.GatedRepoError):
            message = "gated: accept its terms on its page, then `hf auth login`"
        elif isinstance(cause, errors.RepositoryNotFoundError):
            message = "no such folder here, and no such repository on the hub"
        else:
            message = "no such folder here, and the hub cannot be reached; check the network, or "
            message += f"give a downloaded folder ({str(cause).strip().splitlines()[0]})"
        raise UserError(f"{path}: {message}") from error


def announce_download(path: str, files: dict):
    """Print what is missing here, unless it is little, and return the class of its bars, or None.

    A UserError if the cache's disk has no room for it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys | {"disable": True})

    found = snapshot_download(path, dry_run=True, tqdm_class=NoBar, **files)
    missing = sum(file.file_size or 0 for file in found if file.will_download)
    os.makedirs(cache := constants.HF_HUB_CACHE, exist_ok=True)
    free = shutil.disk_usage(cache).free
    sizes = f"{missing / GB:.1f} GB to download to {cache}, where {free / GB:.1f} GB are free"
    if missing > free:
        raise UserError(f"{path}: {sizes}: make room, or set HF_HOME to a folder on another disk")
    if missing < TOLD:
        return NoBar
    print(f"download {path}: {sizes}")
    return None


def weight_names(folder: Path) -> set[str]:
    """Return the names of the weights in a folder; a UserError for a damaged file, or none."""
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
            raise UserError(f"{file}: damaged or cut short: {error}") from error
    return names


def check_weights(folder: Path) -> None:
    """Raise a UserError if weights are missing or damaged, or a base lacks layers of its config.

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


def find_base(adapter: Path, patterns: list[str] = MODEL_FILES) -> Path:
    """Return the folder of the base that an adapter names; a UserError if it is not there."""
    config = adapter / "adapter_config.json"
    base = read_json(config)["base_model_name_or_path"]
    if not os.path.isdir(base) and not is_hub_id(base):
        raise UserError(f"{config}: no folder {base}; correct base_model_name_or_path")
    return fetch(base, patterns)
