"""The speech language of Orpheus (prompt, slots, codec), and speaking with it: text → tokens → wav.

python infer.py "Hello there"                                 # the run of config.json
python infer.py "Hello there" --model outputs/numbers --voice slt --out hello.wav
python infer.py --file lines.txt --out lines/                 # lines/001.wav, lines/002.wav, …
python infer.py --wav recording.flac --out heard.wav          # what the codec alone does to it
python infer.py --tokens ids.txt --out ids.wav                # ids that something else made
python infer.py "Hello there" --stream --out - | aplay         # heard while it is made
python infer.py --file lines.txt --page out --model outputs/a --model outputs/b --blind
python infer.py --merge merged                                # adapter and base as one 16-bit model
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import functools
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import textwrap
import time
import warnings
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, get_args

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

# bitsandbytes warns that an optional package is missing, which would make 4-bit a bit faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parent
SAMPLE_RATE = 24_000  # Hz
FRAME_SAMPLES = 2_048  # samples in one frame of 7 ids, 85.3 ms
SLOTS = 7
MOST_SECONDS = 600  # of one recording
LOUDEST = 10  # times full scale; a recording above that was saved with the wrong scale
SAVED_CONFIG = "finetune_config.json"  # the resolved settings of a run, beside its adapter
PREVIOUS = ".previous_run"  # where finetune.py --overwrite keeps a run until the new one saves
SAVED_REPORT = "data_report.json"  # what the run was trained on: its voices, among others


# ---------------------------------------------------------------- mistakes


class Mistake(ValueError):
    """Something a person can mend: what, where and the remedy, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a file's name may hold anything


def out_of_memory() -> tuple:
    """What a full GPU raises; nothing, as long as torch is not imported."""
    torch = sys.modules.get("torch")
    return (torch.cuda.OutOfMemoryError,) if torch else ()


def run(main):
    """Calls `main`; a Mistake becomes one line and exit code 2, Ctrl-C one line and 130."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone, as in `… | head -1`: end as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: {error}; `make` installs what is needed", file=sys.stderr)
        sys.exit(2)
    except out_of_memory():
        remedy = "README, Out of memory, says what to change in which order"
        print(f"error: the GPU's memory is full: {remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- settings


def key(description: str, **bounds):
    """A settings field: its words for --help, and pydantic's bounds (gt, ge, le, …)."""
    return dataclasses.field(metadata={"description": description, **bounds})


@dataclass
class Settings:
    """Our own keys. They have no defaults here: config.json is the only home of defaults.

    Every other key of a config goes to TRL's SFTConfig, by way of `trainer`.
    """

    model: str = key("base model: hub id or folder")
    codec: str = key("SNAC 24 kHz codec: hub id or folder")
    dataset: str = key("folder of clips (data/README.md), or the hub id of a dataset")
    dataset_config: str | None = key("configuration of a hub dataset")
    dataset_split: str = key("split of a hub dataset")
    dataset_revision: str | None = key("branch, tag or commit of a hub dataset")
    text_column: str | None = key("column of the texts; null: by convention")
    audio_column: str | None = key("column of the sounds; null: by convention")
    voice_column: str | None = key("column of the voices; null: by convention")
    absolute_paths: bool = key("let rows name sounds outside the dataset's folder")
    voice: str | None = key("voice name for clips that name no speaker")
    limit: int | None = key("take the first N clips only", gt=0, le=10**9)
    keep_silence: float | None = key(
        "seconds of silence kept at a clip's ends; null: all", ge=0, le=600
    )
    silence_db: float = key("softer than the loudest moment by this much is silence", gt=0, le=200)
    leave_out: list[str] = key("the doctor's findings whose clips are not trained on")
    cache_dir: str | None = key("where encoded clips are kept; null: nowhere")
    train_on: Literal["audio", "all"] = key("loss on the audio alone, or on the prompt too")
    max_length: int = key("longest row, and length of a packed row, in tokens", gt=0, le=10**6)
    too_long: Literal["drop", "truncate"] = key("what becomes of a row over max_length")
    batching: Literal["pack", "pad", "pad_to_max"] = key("how rows of unequal length share a batch")
    backend: Literal["unsloth", "transformers"] = key("Unsloth, or plain TRL and PEFT")
    weights: Literal["4bit", "8bit", "fp8", "16bit"] = key("how the base's weights are held")
    full_finetuning: bool = key("train every weight, instead of a LoRA")
    lora_r: int = key("LoRA rank", gt=0, le=4096)
    lora_alpha: int = key("LoRA scale is lora_alpha / lora_r", gt=0, le=10**5)
    lora_dropout: float = key("LoRA dropout", ge=0, lt=1)
    gradient_checkpointing: bool | Literal["unsloth"] = key("off, on, or Unsloth's, which offloads")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = key(
        "auto: one model over several GPUs, a part on each"
    )
    plan: bool = key("tell where the memory would go, and stop")
    fit: bool | Annotated[float, Gt(0), Le(10_000)] = key(
        "let rows at once and checkpointing follow the free memory, or GiB"
    )
    output_dir: str = key("folder for the adapter, checkpoints and samples")
    overwrite: bool = key("replace the run that output_dir holds")
    resume: bool = key("go on from the last checkpoint in output_dir")
    seed: int = key("seed of training and of speaking", ge=0, lt=2**32)
    held_out: float = key("share of the texts kept from training, to be judged on", ge=0, lt=1)
    sample_steps: int = key(
        "steps between checks: held-out loss, sample_texts spoken", gt=0, le=10**9
    )
    sample_texts: list[str] = key("texts spoken at every check, and when training is done")
    temperature: Annotated[float, Ge(0), Le(0)] | Annotated[float, Ge(0.01), Le(100)] = key(
        "sampling temperature; 0 is greedy"
    )
    top_p: float = key("nucleus sampling", ge=0.01, le=1)
    repetition_penalty: float = key("over prompt and audio alike; 1 is off", ge=0.1, le=10)
    max_seconds: float = key("speech longer than this is cut off", gt=0, le=3600)
    speak_batch_size: int = key("texts, or candidates of one, spoken at once", gt=0, le=1024)
    best_of: int = key("candidates spoken of every text, the best of which is kept", gt=0, le=256)
    # sentencex takes any code; without rules for a language it uses those that most share
    language: str = key("ISO code, by whose rules sentences are split", pattern="^[a-z]{2,3}$")
    cuda_graph: bool = key("speak by one CUDA graph a frame, where there is a GPU")
    trainer: dict[str, tuple[Any, str]] = key("every other key, with the file it came from")

    def flat(self) -> dict[str, Any]:
        """One flat dict, as config.json has it."""
        own = dataclasses.asdict(self)
        return own | {name: value for name, (value, _) in own.pop("trainer").items()}


OWN_KEYS = {f.name: f for f in dataclasses.fields(Settings) if f.name != "trainer"}
PATHS = ("model", "codec", "dataset")  # looked for beside the config file that names them, too

# SFTConfig's own types have no bounds. These keys are checked before anything is imported.
Count = Annotated[int, Ge(1), Le(10**6)]
Steps = Annotated[float, Gt(0), Le(10**9)]  # under 1: a share of all steps
Share = Annotated[float, Ge(0), Lt(1)]
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
TRAINER_TYPES = {
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Annotated[float, Gt(0), Le(1)],
    "data_seed": Annotated[int, Ge(0), Lt(2**32)] | None,
    "dataloader_num_workers": Annotated[int, Ge(0), Le(1024)],
    "dataloader_prefetch_factor": Count | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_timeout": Annotated[int, Ge(1), Le(10**9)],
    "gradient_accumulation_steps": Count,
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
    "label_smoothing_factor": Share,
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "learning_rate": Annotated[float, Gt(0), Le(10)],
    "logging_steps": Steps,
    "max_grad_norm": Annotated[float, Ge(0), Le(10**6)],
    "max_steps": Literal[-1] | Annotated[int, Ge(1), Le(10**9)],
    "neftune_noise_alpha": Annotated[float, Ge(0), Le(1000)] | None,
    "num_train_epochs": Annotated[float, Gt(0), Le(10**6)],
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "per_device_train_batch_size": Count,
    "save_steps": Steps,
    "save_total_limit": Count | None,
    "torch_compile_mode": CompileMode | None,
    "torch_empty_cache_steps": Count | None,
    "warmup_steps": Annotated[float, Ge(0), Le(10**9)],
    "weight_decay": Annotated[float, Ge(0), Le(100)],
}


def parsed(word: str) -> Any:
    """A word of the command line as JSON, or as it is where it is none."""
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        return word
    return word if isinstance(value, str) else value


def checked(name: str, value: Any, hint: Any, source: str, bounds: dict | None = None) -> Any:
    """`value` as the type `hint` says; a str from the command line may be JSON or a bare word."""
    from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

    finite = ConfigDict(allow_inf_nan=False)
    adapter = TypeAdapter(Annotated[hint, Field(**(bounds or {}))], config=finite)
    word = source == "command line" and isinstance(value, str)
    given = parsed(value) if word else value
    strict = not (word and isinstance(given, str))  # a bare word such as True may mean true
    readings = [(given, strict)]
    if word and isinstance(given, int | float):
        readings.append((value, True))  # a name may look like a number
    errors = []
    for reading, strict in readings:
        try:
            result = adapter.validate_json(json.dumps(reading), strict=strict)
        except ValidationError as error:
            errors = errors or error.errors()
            continue
        check_strings(name, result, source)
        return result
    message = " or ".join(dict.fromkeys(error["msg"] for error in errors))
    raise Mistake(f"{source}: {name} is {json.dumps(value)[:80]}: {message}")


def check_strings(name: str, value: Any, source: str) -> None:
    """`Mistake` for a string that no file or text can have, and for an empty one of our keys."""
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if "\0" in text:
            raise Mistake(f"{source}: {name} holds a NUL byte; remove it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Mistake(f"{source}: {name} is {text[:80]!r}: not valid UTF-8") from None
        if name in OWN_KEYS and not text.strip():
            what = f"{name}: the text" if isinstance(value, list) else name
            raise Mistake(f"{source}: {what} is empty; give one, or leave it out")


def unknown_key(name: str, known, source: str) -> Mistake:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return Mistake(f"{source}: no key is named {name[:80]!r}; the nearest is {near[0]!r}")


def check_names(settings: Settings) -> None:
    """`Mistake` for a key that neither this project nor SFTConfig has.

    SFTConfig takes seconds to import, so only a key that config.json lacks is looked up there.
    """
    shipped = read_json(ROOT / "config.json")
    others = [name for name in settings.trainer if name not in shipped]
    if others:
        from trl import SFTConfig

        known = [field.name for field in dataclasses.fields(SFTConfig)]
        for name in others:
            if name not in known:
                raise unknown_key(name, [*OWN_KEYS, *known], settings.trainer[name][1])


def check_regular(path: str | Path) -> None:
    """`Mistake` for a folder, pipe or device: reading one could wait or go on forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Mistake(f"{path}: cannot be read: not a regular file")


def read_json(path: Path) -> dict[str, Any]:
    """A flat JSON object from a file; `Mistake` with the place where it is not one."""

    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise Mistake(f"{path}: the key {twice[:80]!r} is there twice; remove one")
        return values

    check_regular(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise Mistake(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise Mistake(f"{path}: not JSON of keys and values: nested too deep") from None
    except ValueError as error:  # bad syntax, bad UTF-8, a number of thousands of digits
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise Mistake(f"{path}: must be one JSON object of keys and values")
    return values


def beside(path: str, source: str) -> str:
    """A path in a config: from the current folder, else from the config's, else from this one.

    Only what is read is looked for. output_dir and cache_dir, which are written, always are
    relative to the current folder.
    """
    folders = ("", Path(source).parent, ROOT)
    return next((p for f in folders if os.path.exists(p := os.path.join(f, path))), path)


def read_settings(config: str | Path | None = None, overrides: dict | None = None) -> Settings:
    """config.json, then `config` over it, then the command line's `--key value` over both."""
    layers = [(str(ROOT / "config.json"), read_json(ROOT / "config.json"))]
    if config is not None:
        layers.append((str(config), read_json(Path(config))))
    layers.append(("command line", overrides or {}))
    own, trainer = {}, {}
    for source, values in layers:
        for name, value in values.items():
            if name in OWN_KEYS:
                field = OWN_KEYS[name]
                value = checked(name, value, field.type, source, dict(field.metadata))
                in_config = name in PATHS and source != "command line"
                own[name] = beside(value, source) if in_config else value
            elif name in TRAINER_TYPES:
                trainer[name] = checked(name, value, TRAINER_TYPES[name], source), source
            else:
                trainer[name] = (value, source)
    missing = [name for name in OWN_KEYS if name not in own]
    if missing:
        raise Mistake(f"{ROOT / 'config.json'}: lacks {', '.join(missing)}; every key stands there")
    return Settings(**own, trainer=trainer)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, without the usage."""

    def error(self, message: str):
        raise Mistake(f"command line: {message}")


def read_command_line(description: str) -> Settings:
    """--config FILE, and any key as --key value, of finetune.py and data/prepare.py."""
    keys = [f"  --{name:24}{f.metadata['description']}" for name, f in OWN_KEYS.items()]
    parser = Parser(
        description=description,
        epilog="\n".join(["keys, with their defaults in config.json:", *keys]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings that go over config.json's")
    known, rest = parser.parse_known_args()
    words = [part for word in rest for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    overrides = {}
    while words:
        name = words.pop(0)
        bare = not words or words[0].startswith("--")  # a switch, as --overwrite
        own = OWN_KEYS.get(name[2:])
        switch = own is None or bool in (own.type, *get_args(own.type))
        if not name.startswith("--") or (bare and not switch):
            raise Mistake(f"command line: {name}: write keys as --key value")
        overrides[name[2:]] = "true" if bare else words.pop(0)
    return read_settings(known.config, overrides)


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
    """`Mistake` for a hub's model where there is no GPU; a local one may be small enough."""
    if on_hub(model) and (model.startswith("outputs/") or os.path.isdir(os.path.dirname(model))):
        raise Mistake(f"{model}: no such folder; --model takes a run's folder or a hub id")
    if on_hub(model) and device() == "cpu":
        told = f"{model}: no such folder here, and no GPU for the hub's: Orpheus-3B would take days"
        remedy = "`make demo` runs the same path on a tiny model, --model takes a local folder"
        raise Mistake(f"{told} on a CPU; {remedy}")


def fetch(path: str, patterns: list[str]) -> Path:
    """The local folder of `path`: itself, or a hub repository's files that match `patterns`."""
    if os.path.isdir(path):
        return Path(path)
    if not on_hub(path):
        raise Mistake(f"{path}: no such folder, and not a hub id (owner/name)")
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
    raise Mistake(f"{path}: {remedy}")


# ---------------------------------------------------------------- prompt


# In Orpheus `<custom_token_N>` is 128256 + N; BOS and EOT are Llama 3's (github.com/canopyai).
TOKEN_NAMES = {
    "bos": "<|begin_of_text|>",
    "eot": "<|eot_id|>",
    "sos": "<custom_token_1>",
    "eos": "<custom_token_2>",
    "soh": "<custom_token_3>",
    "eoh": "<custom_token_4>",
    "soa": "<custom_token_5>",
    "eoa": "<custom_token_6>",
    "pad": "<custom_token_7>",
    "audio": "<custom_token_10>",  # the first of 7 × codebook_size audio ids
}
SpeechIds = namedtuple("SpeechIds", [*TOKEN_NAMES, "codebook_size"])


def read_speech_ids(tokenizer, codebook_size: int = 4096) -> SpeechIds:
    """The ids, by name; `Mistake` for a tokenizer that lacks one of them."""
    vocabulary = tokenizer.get_vocab()
    last = f"<custom_token_{9 + SLOTS * codebook_size}>"
    missing = [name for name in [*TOKEN_NAMES.values(), last] if name not in vocabulary]
    if missing:
        where = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise Mistake(f"{where}: no token {missing[0]}: not an Orpheus model for this codec")
    ids = {field: vocabulary[name] for field, name in TOKEN_NAMES.items()}
    if vocabulary[last] != ids["audio"] + SLOTS * codebook_size - 1:
        where = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise Mistake(f"{where}: its audio tokens are not in order: not an Orpheus model")
    return SpeechIds(**ids, codebook_size=codebook_size)


def prompt_ids(tokenizer, ids: SpeechIds, text: str, voice: str | None = None) -> list[int]:
    """SOH BOS "voice: text" EOT EOH SOA SOS: the one prompt of training and of speaking.

    White space is folded. What looks like a special token in `text` stays text.
    """
    line = " ".join(text.split())
    if not line:
        raise Mistake("the text is empty")
    if voice:
        line = f"{voice}: {line}"
    keys = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    words = tokenizer(line, **keys)["input_ids"]
    return [ids.soh, ids.bos, *words, ids.eot, ids.eoh, ids.soa, ids.sos]


# ---------------------------------------------------------------- slots


def codes_to_ids(codes: np.ndarray, ids: SpeechIds) -> np.ndarray:
    """(frames, 7) codes in slot order → (frames × 7,) ids: audio + code + codebook_size × slot."""
    codes = np.asarray(codes, dtype=np.int64).reshape(-1, SLOTS)
    assert codes.size == 0 or 0 <= codes.min() <= codes.max() < ids.codebook_size, codes.max()
    return (codes + ids.audio + ids.codebook_size * np.arange(SLOTS)).reshape(-1)


def ids_to_codes(speech: np.ndarray, ids: SpeechIds) -> np.ndarray:
    """(frames × 7,) ids → (frames, 7) codes; `Mistake` names the first id in a wrong slot."""
    speech = np.asarray(speech, dtype=np.int64)
    if speech.size % SLOTS:
        raise Mistake(f"{speech.size} audio ids are no whole frames of {SLOTS}")
    codes = speech.reshape(-1, SLOTS) - ids.audio - ids.codebook_size * np.arange(SLOTS)
    wrong = np.flatnonzero((codes < 0) | (codes >= ids.codebook_size))
    if wrong.size:
        at = int(wrong[0])
        slot = (int(speech[at]) - ids.audio) // ids.codebook_size
        fault = f"belongs in slot {slot}" if 0 <= slot < SLOTS else "is no audio id"
        place = f"position {at} (frame {at // SLOTS}, slot {at % SLOTS})"
        raise Mistake(f"id {speech[at]} at {place} {fault}")
    return codes


# ---------------------------------------------------------------- codec

# SNAC's three levels side by side, (frames, 1 + 2 + 4), are slots 0 to 6 in this order, and back.
LEVELS_TO_SLOTS = [0, 1, 3, 4, 2, 5, 6]
SLOTS_TO_LEVELS = [0, 1, 4, 2, 3, 5, 6]


def levels_to_slots(levels: list[np.ndarray]) -> np.ndarray:
    """SNAC's three levels, (…, T), (…, 2T) and (…, 4T) → (…, T, 7) codes in slot order."""
    side = [level.reshape(*levels[0].shape, -1) for level in levels]
    return np.concatenate(side, axis=-1)[..., LEVELS_TO_SLOTS]


def slots_to_levels(codes):
    """A (batch, T, 7) tensor of codes in slot order → SNAC's levels, (batch, T), 2T and 4T."""
    parts = codes[..., SLOTS_TO_LEVELS].split([1, 2, 4], dim=-1)
    return [part.flatten(1) for part in parts]


CODEC_FILES = ["config.json", "pytorch_model.bin"]


def load_codec(path: str, device: str = "cpu"):
    """A `snac.SNAC` at 24 kHz with levels of 1, 2 and 4 codes a frame."""
    folder = fetch(path, CODEC_FILES)
    for name in CODEC_FILES:
        if not (folder / name).is_file():
            raise Mistake(f"{folder}: no {name}: not a SNAC codec, as hubertsiuzdak/snac_24khz is")
    import torch
    from snac import SNAC
    from snac.layers import Snake1d
    from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

    weights = folder / "pytorch_model.bin"
    with loads(folder / "config.json"):
        codec = SNAC.from_config(folder / "config.json")
    with loads(weights):
        try:
            codec.load_state_dict(torch.load(weights, "cpu", weights_only=True))
        except (UnpicklingError, EOFError):  # torch advises to load it all the same
            raise Mistake(f"{weights}: not plain weights: damaged, or unsafe to load") from None
    codec = codec.eval().to(device)
    shape = (codec.sampling_rate, int(codec.hop_length) * 4, list(codec.vq_strides))
    if shape != (SAMPLE_RATE, FRAME_SAMPLES, [4, 2, 1]):
        raise Mistake(f"{folder}: not SNAC at 24 kHz with three levels: {shape}")
    for module in codec.modules():  # fold the weight norm, else every call computes it anew
        if is_parametrized(module):
            remove_parametrizations(module, "weight")
        if isinstance(module, Snake1d) and device == "cpu":
            module.forward = functools.partial(snake, module.alpha)
    return codec


def snake(alpha, x):
    """SNAC's x + sin²(αx)/α, bit for bit, in place: on a CPU it saves a sixth of a codec's time."""
    wave = (alpha * x).sin_()
    return wave.mul_(wave).mul_((alpha + 1e-9).reciprocal()).add_(x)


LOOKAHEAD = 4864  # samples that follow a frame: the full size sees 4,757, in 256s is quicker


def encode(codec, clips: list[np.ndarray]) -> list[np.ndarray]:
    """Clips of (samples,) at 24 kHz → codes of (frames, 7) each, frames = ⌈samples / 2048⌉.

    A clip gets the same codes alone and in any batch: zeros follow it as far as the encoder sees.
    """
    import torch

    frames = [-(-len(clip) // FRAME_SAMPLES) for clip in clips]
    batch = np.zeros((len(clips), 1, max(frames) * FRAME_SAMPLES + LOOKAHEAD), dtype=np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[0, : len(clip)] = clip
    where = next(codec.parameters()).device
    with torch.inference_mode():
        latents = codec.encoder(torch.from_numpy(batch).to(where))[..., : 4 * max(frames)]
        _, levels = codec.quantizer(latents)
    codes = levels_to_slots([level.cpu().numpy() for level in levels])  # (clips, T, 7)
    return [row[:n] for row, n in zip(codes, frames, strict=True)]


def decode(codec, codes: np.ndarray) -> np.ndarray:
    """(frames, 7) codes → (frames × 2048,) samples at 24 kHz, float32.

    The full-size decoder adds noise of its own: seed torch for equal samples.
    """
    import torch

    where = next(codec.parameters()).device
    levels = slots_to_levels(torch.as_tensor(np.asarray(codes), device=where)[None])
    with torch.inference_mode():
        return codec.decode(levels)[0, 0].float().cpu().numpy()


CONTEXT = 3  # frames on each side that a frame's samples depend on: the decoder sees 2.5
STREAM_FRAMES = 4  # in one piece of a stream: the first comes after 7 frames, 0.6 s of speech


def decode_stream(codec, frames, size: int = STREAM_FRAMES):
    """(7,) codes as they come → pieces of samples that together are the whole decode's."""
    codes, done = [], 0

    def piece(end):
        first = max(done - CONTEXT, 0)
        audio = decode(codec, codes[first : end + CONTEXT])
        return audio[(done - first) * FRAME_SAMPLES : (end - first) * FRAME_SAMPLES]

    for frame in frames:
        codes.append(frame)
        if len(codes) == done + size + CONTEXT:
            yield piece(done + size)
            done += size
    if done < len(codes):
        yield piece(len(codes))


# ---------------------------------------------------------------- files


def read_text(path: str | Path) -> str:
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16" if utf_16 else f"another encoding ({error})"
        raise Mistake(f"{path}: cannot be read as UTF-8: it is {kind}; save it as UTF-8") from None
    except OSError as error:
        raise Mistake(f"{path}: cannot be read: {error.strerror}") from None


def wav_bytes(file) -> tuple[int, int] | None:
    """(bytes of samples that a RIFF header declares, bytes that the file holds after it).

    None for other formats, and for the huge sizes that programs write into a pipe.
    """
    head = file.read(12)
    while head[:4] == b"RIFF" and head[8:] == b"WAVE" and len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            start = file.tell()
            return (size, file.seek(0, os.SEEK_END) - start) if size < 0x7FFF0000 else None
        file.seek(size + size % 2, os.SEEK_CUR)
    return None


def read_samples(file, where) -> tuple[np.ndarray, int, int]:
    """An open sound file → (samples,) mono at its own rate, the rate, the number of channels.

    Raises `Mistake` for a file that holds less sound than its header declares, as after a
    download that broke off.
    """
    import soundfile

    declared, held = wav_bytes(file) or (0, 0)
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        rate, channels, frames = sound.samplerate, sound.channels, sound.frames
        if frames == 2**63 - 1:  # a FLAC that was written into a pipe
            raise Mistake(f"{where}: its header does not say how long it is; make it a wav")
        if frames > MOST_SECONDS * rate:
            raise Mistake(f"{where}: {frames / rate:.0f} s long; cut it into sentences")
        try:
            audio = sound.read(dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError as error:
            fault = f"cut short or damaged: the header says {frames / rate:.1f} s"
            raise Mistake(f"{where}: {fault}: {error.error_string}") from None
    frames = round(len(audio) * declared / held) if declared > held > 0 else frames
    if frames - len(audio) > rate / 10:
        sizes = f"the header says {frames / rate:.1f} s, the file holds {len(audio) / rate:.1f} s"
        raise Mistake(f"{where}: cut short: {sizes}")
    return audio, rate, channels


def read_audio(source: Path | bytes) -> tuple[np.ndarray, int, int]:
    """A recording that libsndfile reads → (samples,) at 24 kHz, mono; its own rate and channels."""
    import soundfile
    import soxr

    where = "its audio" if isinstance(source, bytes) else source
    if where is source and not os.path.isfile(source):
        fault = "is a folder, not a sound" if os.path.isdir(source) else "does not exist"
        raise Mistake(f"{where} {fault}")
    if where is source and source.suffix.lower() in (".m4a", ".mp4", ".aac", ".webm", ".wma"):
        made = source.with_suffix(".wav").name
        raise Mistake(f"{where}: not read here; ffmpeg -i {source.name} {made} makes it a wav")
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            audio, rate, channels = read_samples(file, where)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", None) or error.strerror
        raise Mistake(f"{where}: not audio that libsndfile reads: {reason}") from None
    if not np.isfinite(audio).all():
        raise Mistake(f"{where}: samples that are not numbers (NaN or infinite)")
    if (peak := np.abs(audio).max(initial=0)) > LOUDEST:
        fault = f"samples of up to {peak:.3g}, far over full scale (1.0)"
        raise Mistake(f"{where}: {fault}; scale it down")
    audio = soxr.resample(audio, rate, SAMPLE_RATE)
    if not len(audio):
        raise Mistake(f"{where}: no samples in it")
    return audio, rate, channels


@contextlib.contextmanager
def whole_file(path: Path):
    """Yields a path to write to, renamed to `path` once that is done: it is whole or not there.

    What a killed process left is written over by the next one, since the name is always the same.
    It is locked; while another process writes to it, a name of our own is used.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(lock.fileno()), part.stat())
            except OSError:  # another process writes to it, or has just renamed it
                free = False
            if not free:
                part = part.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
            try:
                yield part
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Mistake(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def sixteen_bit(audio: np.ndarray) -> np.ndarray:
    """Rounded here, since libsndfile cuts off: so a file and a stream hold the same samples."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype("<i2")


@contextlib.contextmanager
def audio_file(path: Path):
    """write(samples) at 24 kHz to a file of the kind its name ends in, whole or not at all."""
    import soundfile

    kind = path.suffix[1:].upper()
    if kind not in soundfile.available_formats():
        raise Mistake(f"{path}: end the name in .wav or .flac")
    try:
        with (
            whole_file(path) as part,
            soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format=kind) as file,
        ):
            yield lambda audio: file.write(sixteen_bit(audio))
    except soundfile.LibsndfileError as error:  # 2: an error of the system, which it does not name
        reason = "the disk may be full" if error.code == 2 else error.error_string
        raise Mistake(f"{path}: cannot be written: {reason}") from None


def wav_header(size: int) -> bytes:
    """The 44 bytes before `size` bytes of 16-bit mono samples; 2³² − 1 where they are more."""
    sizes, rate = (min(36 + size, 2**32 - 1), min(size, 2**32 - 1)), SAMPLE_RATE
    fields = (b"RIFF", sizes[0], b"WAVEfmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", sizes[1])
    return struct.pack("<4sI8sIHHIIHH4sI", *fields)


@contextlib.contextmanager
def growing_audio(out: Path):
    """write(samples) to be heard at once, from a growing wav, standard output or the speakers."""
    piped, size = str(out) in ("-", "pcm"), 0
    if str(out) == "speakers":
        with speakers() as write:
            yield write
        return
    if not piped and out.suffix != ".wav":
        raise Mistake(f"{out}: a stream goes to a .wav, - (standard output), pcm (bare), speakers")

    def write(audio):
        nonlocal size
        samples = sixteen_bit(audio).tobytes()
        file.write(samples)
        size += len(samples)
        if not piped:
            file.seek(0)
            file.write(wav_header(size))
            file.seek(0, os.SEEK_END)
        file.flush()

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = sys.__stdout__.buffer if piped else out.open("wb")
        with contextlib.nullcontext() if piped else file:
            file.write(b"" if str(out) == "pcm" else wav_header(2**32 if piped else 0))
            yield write
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Mistake(f"{out}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def speakers():
    """write(samples) to the loudspeakers, which play while the next samples are made."""
    try:
        import sounddevice

        stream = sounddevice.OutputStream(SAMPLE_RATE, channels=1, dtype="float32")
    except (ImportError, OSError) as error:  # OSError: no PortAudio
        raise Mistake(f"speakers: {error}; `pip install sounddevice`, or --out a file") from None
    except sounddevice.PortAudioError as error:
        raise Mistake(f"speakers: {error}; --out takes a file") from None
    with stream, ThreadPoolExecutor(1) as player:
        yield lambda audio: player.submit(stream.write, audio[:, None])


# ---------------------------------------------------------------- generation

BY_ITSELF = "ended by itself"
CUT_OFF = "cut off at the limit: no end came (--max_seconds)"


@dataclass
class Utterance:
    """One text on its way through the model: what goes in, and what came of it."""

    text: str
    prompt: list[int]
    most: int  # frames: max_seconds, or what the model's context leaves
    candidate: int = 0  # each has random numbers of its own
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)  # (7,) codes each
    end: str = ""  # how it ended, empty while it speaks; whoever looks on may end it, too
    audio: np.ndarray | None = None  # (samples,) of its frames, once they are decoded

    @property
    def codes(self) -> np.ndarray:
        return np.array(self.frames, dtype=np.int64).reshape(-1, SLOTS)  # (frames, 7)


def begin(model, tokenizer, ids: SpeechIds, text: str, settings: Settings, voice, candidate=0):
    """The Utterance of `text`, nothing spoken yet; `Mistake` where a frame would not fit."""
    prompt = prompt_ids(tokenizer, ids, text, voice)
    frames = int(settings.max_seconds * SAMPLE_RATE / FRAME_SAMPLES)
    room = (model.config.max_position_embeddings - len(prompt) - 1) // SLOTS  # frames
    if min(frames, room) < 1:
        what = f"a text of {len(prompt)} tokens leaves no room for a frame of speech; shorten it"
        if frames < 1:
            what = f"max_seconds {settings.max_seconds} is less than a frame of speech; raise it"
        raise Mistake(f"{text[:40]!r}: {what}")
    return Utterance(text, prompt, min(frames, room), candidate)


def slot_scores(model, ids: SpeechIds):
    """score(hidden, slot): (rows, width) → (rows, codebook_size + 1), the slot's codes and the end.

    Of a plain head only those rows are multiplied: 4,097 of Orpheus's 156,940.
    """
    import torch

    head, size, end = model.get_output_embeddings(), ids.codebook_size, slice(ids.eos, ids.eos + 1)
    plain = type(head) is torch.nn.Linear and head.bias is None  # else quantised or wrapped

    def score(hidden, slot: int):
        codes = slice(ids.audio + slot * size, ids.audio + (slot + 1) * size)
        if plain:
            parts = [torch.nn.functional.linear(hidden, head.weight[s]) for s in (codes, end)]
        else:
            whole = head(hidden)
            parts = [whole[:, s] for s in (codes, end)]
        return torch.cat(parts, dim=-1).float()

    return score


def draw(scores, used, settings: Settings, chance):
    """(rows, choices) scores, the same of bool: drawn before; (rows,) chances under 1 → choices."""
    import torch

    if (penalty := settings.repetition_penalty) != 1:
        lower = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(used, lower, scores)
    if settings.temperature == 0:
        return scores.argmax(-1)
    shares, order = (scores / settings.temperature).softmax(-1).sort(descending=True)
    shares.masked_fill_(shares.cumsum(-1) - shares >= settings.top_p, 0)
    edges = shares.cumsum(-1)
    at = torch.searchsorted(edges, chance[:, None] * edges[:, -1:], right=True)
    at = at.minimum((shares > 0).sum(-1, keepdim=True) - 1)  # rounding may step past the last
    return order.gather(-1, at)[:, 0]


def start_batch(model, rows: list[Utterance], seed: int, static: bool):
    """Left-padded (rows, length) tokens, mask and positions; (rows, frames, 7) chances; the cache.

    A row's chances come from the seed and its `candidate` alone, whatever else is in the batch.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    longest = max(len(row.prompt) for row in rows)
    frames = max(row.most for row in rows) + 1  # the end token, too
    pads = torch.tensor([longest - len(row.prompt) for row in rows])
    tokens = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows])
    length = longest + frames * SLOTS
    mask = torch.arange(length) >= pads[:, None]
    positions = (torch.arange(longest) - pads[:, None]).clamp(min=0)
    draws = [np.random.default_rng([seed, row.candidate]) for row in rows]
    chances = np.stack([source.random((frames, SLOTS), dtype=np.float32) for source in draws])
    cache = StaticCache(model.config, length) if static else DynamicCache(config=model.config)
    parts = (tokens, mask, positions, torch.from_numpy(chances))
    return *(part.to(model.device) for part in parts), cache


def speak_frames(model, rows: list[Utterance], ids: SpeechIds, settings: Settings, static=None):
    """Speaks `rows` as one batch; yields after every frame, when all that still speak have it.

    A row whose `end` is set leaves the batch; with a static cache (where there is a GPU) it is
    only looked past, since nothing there changes its shape.
    """
    import torch

    static = torch.cuda.is_available() if static is None else static
    decoder, score, size = model.get_decoder(), slot_scores(model, ids), ids.codebook_size
    tokens, mask, positions, chances, cache = start_batch(model, rows, settings.seed, static)
    used = torch.zeros(len(rows), SLOTS, size + 1, dtype=torch.bool, device=model.device)

    def ending(row, code):
        return BY_ITSELF if code == size else CUT_OFF if frame == row.most else ""

    def next_frame(tokens, positions, chances):
        """(rows, n) tokens and their places, (rows, 7) → (rows, 7) codes, next tokens, places."""
        drawn = []
        for slot in range(SLOTS):
            inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
            hidden = decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            scores = score(hidden[:, -1], slot)
            if not slot and not frame and not torch.isfinite(scores).all():
                raise Mistake("the model computes NaN: its weights are damaged, or it diverged")
            if slot or not frame:
                scores[:, size] = float("-inf")  # an end is no part of a frame, and not the first
            drawn.append(codes := draw(scores, used[:, slot], settings, chances[:, slot]))
            if not static and slot == 0 and all(map(ending, rows, codes.tolist())):
                break
            used[:, slot].scatter_(1, codes[:, None], True)
            tokens, positions = codes[:, None] + ids.audio + slot * size, positions[:, -1:] + 1
        return torch.stack(drawn, 1), tokens, positions

    for frame in range(chances.shape[1]):
        keep = [n for n, row in enumerate(rows) if not row.end]
        if not keep:
            return
        if len(keep) < len(rows) and not static:
            rows = [rows[n] for n in keep]
            parts = (tokens, mask, positions, chances, used)
            tokens, mask, positions, chances, used = (part[keep] for part in parts)
            cache.batch_select_indices(keep)
        inputs = tokens, positions, chances[:, frame]
        with torch.no_grad():
            if frame == 2 and static and settings.cuda_graph:
                next_frame = captured(next_frame, inputs)
            codes, tokens, positions = next_frame(*inputs)
        for row, spoken in zip(rows, codes.cpu().numpy(), strict=True):
            row.end = row.end or ending(row, spoken[0])
            row.frames += [] if row.end else [spoken]
        if not all(row.end for row in rows):
            yield


def captured(work, inputs):
    """`work` as a CUDA graph, one launch instead of thousands: work(*inputs), at this one shape.

    What it returns is overwritten by the next call.
    """
    import torch

    places, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work(*places)

    def replay(*inputs):
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return results

    return replay


class SlotProcessor:
    """A transformers logits processor: only ids that a frame allows next can be sampled.

    Slot s takes the codes of codebook s; the end comes at a frame's edge, never before frame one.
    """

    def __init__(self, ids: SpeechIds, prompt_length: int):
        self.ids = ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        """(batch, length), (batch, vocabulary) → scores, −inf where not allowed."""
        frame, slot = divmod(input_ids.shape[1] - self.prompt_length, SLOTS)
        start = self.ids.audio + slot * self.ids.codebook_size
        allowed = scores.new_full(scores.shape, float("-inf"))
        codes = slice(start, start + self.ids.codebook_size)
        allowed[:, codes] = scores[:, codes]
        if slot == 0 and frame > 0:
            allowed[:, self.ids.eos] = scores[:, self.ids.eos]
        return allowed


def generate_plainly(model, rows: list[Utterance], ids: SpeechIds, settings: Settings) -> None:
    """The same by `model.generate`: what Unsloth's patched models can do, and the tests' reference.

    Seeds are torch's here, so that what is sampled is repeatable, but not what speak_frames draws.
    """
    import torch

    tokens, mask, *_ = start_batch(model, rows, settings.seed, static=False)
    sampling = {"do_sample": settings.temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    torch.manual_seed(settings.seed)
    speech = model.generate(
        input_ids=tokens,
        attention_mask=mask[:, : tokens.shape[1]].long(),
        max_new_tokens=max(row.most for row in rows) * SLOTS + 1,  # the end token, too
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=ids.eos,
        pad_token_id=ids.eos,
        use_cache=True,
        logits_processor=[SlotProcessor(ids, tokens.shape[1])],
        **sampling,
    )[:, tokens.shape[1] :]
    for row, spoken in zip(rows, speech.cpu().numpy(), strict=True):
        ends = np.append(np.flatnonzero(spoken == ids.eos), len(spoken))[0]
        row.end = BY_ITSELF if ends < len(spoken) and ends <= row.most * SLOTS else CUT_OFF
        whole = min(ends // SLOTS, row.most) * SLOTS
        row.frames = list(ids_to_codes(spoken[:whole], ids))


def speak_rows(model, rows, ids: SpeechIds, settings: Settings, pace: float | None = None) -> None:
    """Speaks `rows` to their ends in one batch; of several candidates those at fault end early."""
    if type(model.get_decoder()).forward.__module__.startswith("unsloth"):
        generate_plainly(model, rows, ids, settings)  # its forward knows none of these caches
        return
    for frame, _ in enumerate(speak_frames(model, rows, ids, settings)):
        for row in rows if settings.best_of > 1 and frame % 6 == 5 else []:  # twice a second
            row.end = row.end or fault(row, pace)


def generate(model, tokenizer, ids: SpeechIds, text: str, settings: Settings, voice=None):
    """Speaks `text`: (frames, 7) codes, and whether the model ended by itself.

    Where it did not, `settings.max_seconds` or the model's context was reached first.
    """
    row = begin(model, tokenizer, ids, text, settings, voice)
    speak_rows(model, [row], ids, settings)
    return row.codes, row.end == BY_ITSELF


# ---------------------------------------------------------------- models

TOKENIZER_FILES = ["*.json", "tokenizer*", "*.jinja"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def is_model(folder: Path) -> bool:
    return is_adapter(folder) or (folder / "config.json").is_file()


def first_reason(error: Exception) -> str:
    """The first line of an exception's message, and the second where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    if not lines or not isinstance(error, OSError | RuntimeError | ValueError):
        lines = [f"{type(error).__name__} {' '.join(lines)}".strip()]  # KeyError: 'weight_map'
    return textwrap.shorten(lines[0], 200, placeholder=" …")


@contextlib.contextmanager
def loads(path: Path):
    """What libraries raise for a damaged file at `path` becomes a `Mistake` that names it."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damaged = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    damaged += (NameError, OSError, RuntimeError, TypeError, re.error)
    try:
        yield
    except (Mistake, *out_of_memory()):
        raise
    except (*damaged, ValueError, StrictDataclassError, SafetensorError) as error:
        raise Mistake(f"{path}: does not load: {first_reason(error)}") from None
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own
            raise
        raise Mistake(f"{path}: does not load: {first_reason(error)}") from None


def read_model_config(folder: Path):
    """The config of a Llama, by transformers; `Mistake` for a damaged one and for other models."""
    from transformers import AutoConfig

    kind = read_json(folder / "config.json").get("model_type")
    if kind != "llama":
        raise Mistake(f"{folder / 'config.json'}: model_type is {kind!r}; Orpheus is a llama")
    with loads(folder / "config.json"):
        return AutoConfig.from_pretrained(str(folder))


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder; `Mistake` where there is none."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise Mistake(f"{folder}: no tokenizer.json: the tokenizer is missing")
    with loads(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer("anna: hello")  # some damage shows up only in use
    return tokenizer


def nf4(dtype):
    """QLoRA's 4-bit weights (arXiv 2305.14314), computed with in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def find_base(adapter: Path) -> Path:
    """The folder of the base that an adapter names; `Mistake` for an adapter that is damaged."""
    config = adapter / "adapter_config.json"
    values = read_json(config)
    base, kind = values.get("base_model_name_or_path"), values.get("peft_type")
    if not isinstance(base, str) or not base:
        raise Mistake(f"{config}: base_model_name_or_path must name the base; set it")
    if kind != "LORA":
        raise Mistake(f"{config}: peft_type is {kind!r}; only LORA adapters are supported")
    if not os.path.isdir(base) and not on_hub(base):
        raise Mistake(f"{config}: no folder {base}; correct base_model_name_or_path")
    return fetch(base, MODEL_FILES)


def check_weights(folder: Path) -> None:
    """`Mistake` where weights are missing or damaged."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        name = "adapter_model.safetensors" if is_adapter(folder) else "model.safetensors"
        raise Mistake(f"{folder}: no {name}: the weights are missing")
    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise Mistake(f"{file}: damaged or cut short: {first_reason(error)}") from None


def check_fit(folder: Path, missing: set, unexpected: set) -> None:
    """`Mistake` where weights are not those of the config: transformers makes up missing ones."""
    for names, fault in (missing, "are missing"), (unexpected, "have no place in its config"):
        if names:
            raise Mistake(f"{folder}: {len(names)} weights {fault}, the first {min(names)}")


def check_adapter(model, folder: Path) -> None:
    """`Mistake` where a PEFT model's adapter and the file that it was loaded from differ."""
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


def load_base(folder: Path, **keys):
    """transformers' model of a folder; `Mistake` where that is damaged or lacks weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    keys["output_loading_info"] = True
    with loads(folder / "config.json"):
        model, info = AutoModelForCausalLM.from_pretrained(str(folder), **keys)
    layers = {name for name in info["unexpected_keys"] if name.startswith("model.layers.")}
    check_fit(folder, set(info["missing_keys"]), layers)
    return model


def load_model(path: str, in_4bit: bool = False, merged: bool = False, fp32: bool = True):
    """(model, tokenizer) of an adapter or checkpoint of finetune.py, a merged folder or a hub id.

    Args:
        in_4bit: quantise the base to NF4, on a GPU.
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
    keys = {"dtype": torch.float16 if merged else choose_dtype(whole, fp32)}
    if torch.cuda.is_available() or merged:
        keys["device_map"] = device()
    if torch.cuda.is_available() and in_4bit and not merged:
        keys["quantization_config"] = nf4(keys["dtype"])
    model = load_base(whole, **keys)
    if whole != folder:
        from peft import PeftModel

        with loads(folder / "adapter_config.json"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # check_adapter's
            model = PeftModel.from_pretrained(model, str(folder))
            check_adapter(model, folder)
            model = model.merge_and_unload() if merged else model
    return model.eval(), tokenizer


@dataclass
class Run:
    """What speaks: a model's folder, and what finetune.py left beside it."""

    settings: Settings
    folder: Path | None = None  # --wav and --tokens need none
    voices: list[str] = dataclasses.field(default_factory=list)  # that it was trained on
    pace: float | None = None  # seconds a character of theirs
    home: Path | None = None  # where the run's settings and report are


def read_run(
    model: str | None, overrides: dict, patterns: list[str] = MODEL_FILES, config=None
) -> Run:
    """The Run of --model; without it config.json's run, or its base.

    With no more than the tokenizer asked for (--wav, --tokens) there need be no folder.
    """
    plain = read_settings(config, overrides)
    chosen = read_json(Path(config)) if config else {}  # of these, the run keeps what made it
    if model is None:
        out = Path(plain.output_dir)
        made = is_model(out) or (out / PREVIOUS).is_dir()
        if not made and patterns is TOKENIZER_FILES:
            return Run(plain)
        model = plain.output_dir if made else plain.model
        print(f"model    {model}" + ("" if made else ", the base: no run in output_dir yet"))
    if patterns is MODEL_FILES:
        check_machine(model)
    folder = fetch(model, patterns)
    for home in (folder, folder.resolve().parent):  # a checkpoint's run is its parent
        if (home / SAVED_CONFIG).is_file():
            voices, pace = read_report(home / SAVED_REPORT)
            settings = read_settings(home / SAVED_CONFIG, overrides)
            named = "codec" not in overrides and "codec" not in chosen
            if named and not os.path.isdir(settings.codec) and not on_hub(settings.codec):
                place = f"{home / SAVED_CONFIG}: no folder {settings.codec}"
                raise Mistake(f"{place}; correct codec there, or give --codec")
            spoken_with = {name: getattr(plain, name) for name in RUN_KEYS if name in chosen}
            settings = dataclasses.replace(settings, **spoken_with)
            return Run(settings, folder, voices, pace, home)
    if (folder / PREVIOUS).is_dir():
        told = "the run that was to replace the one in it was killed"
        raise Mistake(f"{folder}: {told}; finetune.py --resume puts the earlier one back")
    return Run(plain, folder)


def read_report(path: Path) -> tuple[list[str], float | None]:
    """The voices of a run's data, and their seconds a character."""
    report = read_json(path)
    voices, sizes = report.get("voices"), [report.get(n, 0) for n in ("seconds", "characters")]
    if not isinstance(voices, dict) or not all(isinstance(size, int | float) for size in sizes):
        raise Mistake(f"{path}: damaged: voices, seconds or characters")
    return list(voices), sizes[0] / sizes[1] if all(0 < size < math.inf for size in sizes) else None


def load_run(run: Run):
    """(model, tokenizer) of a run, in the precision that it was trained in; prints which."""
    fp32 = run.settings.trainer.get("bf16", (None,))[0] is False
    model, tokenizer = load_model(str(run.folder), run.settings.weights == "4bit", fp32=fp32)
    print(f"model    {run.folder}: {str(model.dtype).removeprefix('torch.')}")
    return model, tokenizer


def choose_voice(asked: str | None, run: Run) -> str | None:
    """The voice asked for, or the run's first; `Mistake` for one that it was not trained on."""
    if asked and run.voices and asked not in run.voices:
        raise Mistake(f"--voice {asked}: {run.folder} was trained on {', '.join(run.voices)}")
    return asked or (run.voices[0] if run.voices else run.settings.voice)


# ---------------------------------------------------------------- ids from elsewhere


def read_tokens(path: Path, tokenizer=None, codebook_size: int = 4096) -> np.ndarray:
    """(frames, 7) codes from a JSON list, ids between white space, or `<custom_token_N>` text.

    Plain ids need the tokenizer that made them; without one they are Orpheus's own. Every whole
    frame counts, after an end token, too. Other ids are reported, but for prompt and control ids.
    """
    text = read_text(path)
    named = re.findall(r"<custom_token_(\d+)>", text)
    first = 128_256  # <custom_token_0> of Orpheus
    ids = SpeechIds(128_000, 128_009, *range(first + 1, first + 8), first + 10, codebook_size)
    if tokenizer is not None and not named:
        ids = read_speech_ids(tokenizer, codebook_size)
    words = named or re.sub(r"[\[\],]", " ", text).split()
    if not all(re.fullmatch(r"-?\d+", word) for word in words):
        raise Mistake(f"{path}: neither a list of ids nor <custom_token_N> text")
    numbers = [int(word) if len(word) < 10 else -1 for word in words]  # no id is that large
    numbers = np.array(numbers, dtype=np.int64) + (first if named else 0)
    codes, left_out = whole_frames(numbers, ids)
    if not len(codes):
        raise Mistake(f"{path}: no whole frame of {SLOTS} audio ids in it")
    prompt = np.argmax(numbers == ids.sos)  # the length of what stands before SOS; 0 without one
    control = np.isin(numbers[left_out], ids[:-2])
    left_out = left_out[(left_out >= prompt) & ~control]
    if left_out.size:
        places = ", ".join(map(str, left_out[:10])) + (", …" if left_out.size > 10 else "")
        print(f"{path}: left out {left_out.size} ids that belong to no whole frame, at {places}")
    return codes


def whole_frames(speech: np.ndarray, ids: SpeechIds) -> tuple[np.ndarray, np.ndarray]:
    """The whole frames among ids that a model wrote without constraint.

    Args:
        speech: (n,) ids.

    Returns:
        (frames, 7) codes of every run of seven ids of slots 0 to 6, and the positions in `speech`
        of all other ids.
    """
    slots = (speech - ids.audio) // ids.codebook_size  # no id but those of audio is in 0 to 6
    if len(slots) < SLOTS:
        return np.empty((0, SLOTS), dtype=np.int64), np.arange(len(slots))
    windows = np.lib.stride_tricks.sliding_window_view(slots, SLOTS)
    starts = np.flatnonzero((windows == np.arange(SLOTS)).all(axis=1))  # these cannot overlap
    inside = starts[:, None] + np.arange(SLOTS)
    return ids_to_codes(speech[inside].ravel(), ids), np.setdiff1d(np.arange(len(slots)), inside)


# ---------------------------------------------------------------- judging without ears

SLOW, FAST, SILENCE = 2.5, 0.4, 1.5  # × the voice's own length, twice; seconds


def fault(row: Utterance, pace: float | None) -> str:
    """What has gone wrong with it so far, by its frames alone; empty where nothing has.

    `pace` is the voice's, in seconds a character. A loop: slot 0, the coarsest, has repeated
    its last codes (up to two seconds of them) three times, or more until they are two seconds.
    """
    seconds, usual = len(row.frames) * FRAME_SAMPLES / SAMPLE_RATE, len(row.text) * (pace or 0)
    if pace and seconds > SLOW * usual + 1:
        return f"runaway: {seconds:.1f} s where the voice takes {usual:.1f}"
    coarse = [int(frame[0]) for frame in row.frames[-72:]]
    for period in range(1, 25):
        span = period * max(3, -(-24 // period))
        last = coarse[-span:]
        if len(last) == span and last[period:] == last[:-period]:
            return f"loop: {period} frames over and over for {span}"
    return ""


def longest_silence(audio: np.ndarray) -> float:
    """Seconds in one go at 40 dB or more under the loudest 20 ms, the sound's ends included."""
    blocks = audio[: len(audio) // 480 * 480].reshape(-1, 480)
    loud = np.sqrt((blocks**2).mean(axis=1))
    edges = np.flatnonzero(np.concatenate([[True], loud > loud.max() / 100, [True]]))
    return float((np.diff(edges) - 1).max()) * 480 / SAMPLE_RATE


def judge_words(whisper: str, _):
    """Word and character error rates of what faster-whisper hears; tags as <laugh> are no words."""
    import jiwer
    from faster_whisper import WhisperModel
    from transformers.models.whisper import english_normalizer

    plain = english_normalizer.BasicTextNormalizer()
    english = english_normalizer.EnglishTextNormalizer({})
    try:
        model = WhisperModel(whisper, compute_type="int8")
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().splitlines()[0]
        raise Mistake(f"--whisper {whisper}: neither a folder nor to be had: {told}") from None

    def judge(audio, text):
        import soxr

        sound = np.pad(soxr.resample(audio, SAMPLE_RATE, 16_000), 8_000)  # silence at the ends
        told, info = model.transcribe(sound, temperature=0, condition_on_previous_text=False)
        normal = english if info.language == "en" else plain
        pair = (re.sub(r"<\w+>", " ", text), " ".join(part.text for part in told))
        # every digit a word, else "5631" and "5, 6, 3, 1" have nothing in common
        said, heard = (re.sub(r"(?<=\d)(?=\d)", " ", normal(t)).strip() for t in pair)
        return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)} if said else {}

    return judge


def judge_voice(_, clips: list[Path]):
    """Resemblyzer's likeness to the mean of the recordings, −1 to 1."""
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder(device(), verbose=False)

    def embed(audio):
        return encoder.embed_utterance(preprocess_wav(audio, source_sr=SAMPLE_RATE))

    voice = np.mean([embed(read_audio(clip)[0]) for clip in clips], axis=0)
    return lambda audio, text: {"likeness": float(embed(audio) @ voice / np.linalg.norm(voice))}


def judge_sound(*_):
    """DNSMOS's overall mean opinion score, 1 to 5, of how clean it sounds."""
    import soxr
    from speechmos import dnsmos

    def judge(audio, text):
        sound = np.clip(soxr.resample(audio, SAMPLE_RATE, 16_000), -1, 1)
        return {"mos": float(dnsmos.run(sound, sr=16_000)["ovrl_mos"])}

    return judge


JUDGES = {
    "wer, cer": (judge_words, {"faster_whisper": "faster-whisper", "jiwer": "jiwer"}),
    "likeness": (judge_voice, {"resemblyzer": "resemblyzer"}),
    "mos": (judge_sound, {"speechmos": "speechmos onnxruntime"}),
}


def load_judges(whisper: str, recordings: list[Path]) -> list:
    """judge(audio, text) → scores, of each package that is there; tells which are and are not."""
    judges, able, unable = [], ["silence, pace"], []
    for name, (make, packages) in JUDGES.items():
        missing = [pip for module, pip in packages.items() if not find_spec(module)]
        if missing:
            unable.append(f"{name} (pip install {' '.join(missing)})")
        elif make is judge_voice and not recordings:
            unable.append(f"{name} (give recordings: --file metadata.csv)")
        else:
            judges.append(make(whisper, recordings))
            able.append(name)
    print(f"scores   {', '.join(able)}" + (f"; not: {', '.join(unable)}" if unable else ""))
    return judges


def measure(audio: np.ndarray, text: str, pace: float | None, judges) -> dict[str, float]:
    """Scores of one sound: its pace against the voice's, its silence, and what the judges say."""
    scores = {"silence": longest_silence(audio)}
    if pace:
        scores["pace"] = len(audio) / SAMPLE_RATE / len(text) / pace
    for judge in judges or ():
        scores |= judge(audio, text)
    return scores


def tell_scores(scores: dict) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def verdict(row: Utterance, scores: dict) -> str:
    """Why a spoken candidate should not be kept; empty where it may be."""
    if row.end != BY_ITSELF:
        return row.end
    if scores["silence"] > SILENCE:
        return f"silence of {scores['silence']:.1f} s"
    return f"too fast: {scores['pace']:.2f} × the voice" if scores.get("pace", 1) < FAST else ""


def rank(row: Utterance, scores: dict) -> tuple:
    """Least is best: no fault, few wrong words, a like voice, a clean sound, the voice's pace."""
    pace = abs(math.log(scores.get("pace", 1)))
    likeness, mos = scores.get("likeness", 0), scores.get("mos", 0)
    return bool(verdict(row, scores)), scores.get("wer", 0), -likeness, -mos, pace


def decode_row(codec, row: Utterance, seed: int, frames=None) -> Iterator[np.ndarray]:
    """Pieces of an utterance's samples; the same, bit for bit, for `frames` of a stream.

    The decoder's noise is seeded, so that an utterance sounds alike wherever it is decoded.
    """
    import torch

    torch.manual_seed(seed)
    codes = row.frames if frames is None else (row.frames[-1] for _ in frames)
    yield from decode_stream(codec, codes)


def speak_best(groups: list, model, codec, ids, settings: Settings, pace, judges) -> list:
    """Speaks every group of candidates, all in one batch, and keeps the best Utterance of each.

    Those that run away or loop leave the batch at once; what is wrong with any is printed.
    """
    rows = [row for group in groups for row in group]
    speak_rows(model, rows, ids, settings, pace)
    if settings.best_of == 1:
        return rows
    best = []
    for group in groups:
        for row in group:
            row.audio = np.concatenate(list(decode_row(codec, row, settings.seed)))
        scores = [measure(row.audio, row.text, pace, judges) for row in group]
        pairs = sorted(zip(group, scores, strict=True), key=lambda pair: rank(*pair))
        faults = [f"{row.candidate + 1} {verdict(row, told)}" for row, told in pairs]
        faults = [line for line in faults if line.split(" ", 1)[1]]
        told = f": {'; '.join(sorted(faults))}" if faults else ""
        kept = f"candidate {pairs[0][0].candidate + 1} of {len(group)}"
        print(f"{group[0].text[:40]!r}: kept {kept}, {len(faults)} at fault{told}")
        best.append(pairs[0][0])
    return best


# ---------------------------------------------------------------- speaking

HEARD = ("-", "pcm", "speakers")  # names of --out that are heard at once
PAUSE = 0.25  # seconds between the parts of a long text, on top of the silence at clips' ends
FADE = 240  # samples, 10 ms: a part goes into the pause, and comes out of it, without a click
CHARACTERS = 10  # a second, of a slow voice: so a part has room in max_seconds


def split_text(text: str, most: int, language: str = "en") -> list[str]:
    """Parts of at most `most` characters: whole sentences, where one is longer whole words.

    sentencex finds the sentences by the rules of `language`. A long sentence without spaces
    stays whole.
    """
    text, parts = " ".join(text.split()), [""]
    if len(text) <= most:
        return [text]
    from sentencex import segment

    for sentence in segment(language, text):
        for line in textwrap.wrap(sentence, most, break_long_words=False, break_on_hyphens=False):
            if parts[-1] and len(parts[-1]) + 1 + len(line) > most:
                parts.append("")
            parts[-1] = f"{parts[-1]} {line}".strip()
    return parts


def parts_of(text: str, settings: Settings) -> list[str]:
    """The parts in which `text` is spoken, each of which max_seconds has room for."""
    most = max(20, int(settings.max_seconds * CHARACTERS))
    return split_text(text, most, settings.language)


def joined(parts: list):
    """Pieces of samples of each part → of all, with pauses that the parts fade into and out of."""
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    for n, pieces in enumerate(parts):
        held = None  # the last 10 ms, until it is known whether a pause comes
        for piece in pieces:
            if n and held is None:
                piece = np.concatenate([piece[:FADE] * ramp, piece[FADE:]])
            held = piece if held is None else np.concatenate([held, piece])
            yield held[:-FADE]
            held = held[-FADE:]
        assert held is not None, "a part without a frame"
        if n < len(parts) - 1:
            held = np.concatenate([held * ramp[::-1], np.zeros(int(PAUSE * SAMPLE_RATE), "f4")])
        yield held


def save_speech(lines, path: Path, stream: bool = False, keep: bool = True, quiet: bool = False):
    """The next of `lines` to `path`, and a line on what came of it: (samples where kept, rows).

    The file is opened first: one that cannot be written is told before anything is spoken.
    """
    started, length, first, kept = time.perf_counter(), 0, 0, [np.zeros(0, "f4")]
    with (growing_audio if stream else audio_file)(path) as write:
        rows, pieces = next(lines)
        for piece in pieces:
            write(piece)
            first = first or time.perf_counter() - started
            length += len(piece)
            kept += [piece] if keep else []
    seconds, spent = length / SAMPLE_RATE, time.perf_counter() - started
    told = f"{path}  {seconds:.2f} s of audio in {spent:.2f} s, {how_ended(rows)}"
    if stream:
        told += f"; first audio after {first:.2f} s, real-time factor {spent / seconds:.2f}"
    if not quiet:
        print(told, flush=True)
    return np.concatenate(kept), rows


def how_ended(rows: list[Utterance]) -> str:
    frames, cut = sum(len(row.frames) for row in rows), [r for r in rows if r.end != BY_ITSELF]
    where = f" in {len(cut)} of {len(rows)} parts" if cut and len(rows) > 1 else ""
    return f"{frames} frames, {cut[0].end if cut else BY_ITSELF}{where}"


def spoken(
    texts, model, tokenizer, codec, settings: Settings, voice, pace=None, judges=None, stream=False
):
    """Each text in turn: its parts as Utterances, and the pieces of samples that they make.

    In a stream one part is spoken at a time, while its pieces are taken.
    """
    ids, best_of = read_speech_ids(tokenizer, codec.codebook_size), range(settings.best_of)

    def candidates(part):
        return [begin(model, tokenizer, ids, part, settings, voice, n) for n in best_of]

    def sound(row):
        if row.audio is not None:  # one of several candidates, decoded to be scored
            return [row.audio]
        frames = speak_frames(model, [row], ids, settings) if stream else None
        return decode_row(codec, row, settings.seed, frames)

    lines = [[candidates(part) for part in parts_of(text, settings)] for text in texts]
    groups, done = [group for line in lines for group in line], []
    at_once = max(1, settings.speak_batch_size // settings.best_of)
    for line in lines:
        rows = [group[0] for group in line]
        if not stream:
            while len(done) < len(line):
                batch, groups = groups[:at_once], groups[at_once:]
                done += speak_best(batch, model, codec, ids, settings, pace, judges)
            rows, done = done[: len(line)], done[len(line) :]
        yield rows, joined([sound(row) for row in rows])


def speak(texts, paths, model, tokenizer, codec, settings: Settings, voice: str | None, **more):
    """Each text to its path, told one by one: [(samples, whether it ended by itself)].

    `more`: as `spoken` takes it, and `keep`: False where the samples are not wanted again.
    """
    keep, quiet, results = more.pop("keep", True), more.pop("quiet", False), []
    stream, pace, judges = (more.get(name) for name in ("stream", "pace", "judges"))
    lines = spoken(texts, model, tokenizer, codec, settings, voice, **more)
    for text, path in zip(texts, paths, strict=True):
        audio, rows = save_speech(lines, path, stream, keep, quiet)
        if judges is not None:
            print(f"        {tell_scores(measure(audio, text, pace, judges))}")
        results.append((audio, all(row.end == BY_ITSELF for row in rows)))
    return results


# ---------------------------------------------------------------- merging


def read_greedily(model, tokenizer, ids: SpeechIds, settings: Settings, voice) -> list[Utterance]:
    """The sample texts, five seconds of each at most, spoken without chance."""
    greedy = dataclasses.replace(
        settings, temperature=0.0, max_seconds=min(5.0, settings.max_seconds)
    )
    texts = settings.sample_texts or read_settings().sample_texts
    rows = [begin(model, tokenizer, ids, text, greedy, voice) for text in texts]
    speak_rows(model, rows, ids, greedy)
    return rows


def logits_over(model, ids: SpeechIds, rows: list[Utterance]) -> list:
    """(tokens, vocabulary) logits of each row's speech, as it was spoken."""
    import torch

    logits = []
    for row in rows:
        tokens = [*row.prompt, *codes_to_ids(row.codes, ids).tolist()]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokens], device=model.device)).logits
        logits.append(out[0, len(row.prompt) - 1 :].float().cpu())
    return logits


def check_merged(run: Run, voice, out: Path, ids: SpeechIds, rows, logits) -> tuple[bool, str]:
    """Whether the folder `out` speaks the greedy tokens of the adapter, and a line that says so."""
    model, tokenizer = load_model(str(out))
    merged = read_greedily(model, tokenizer, ids, run.settings, voice)
    again = logits_over(model, ids, rows)
    far = max(float((a - b).abs().max()) for a, b in zip(logits, again, strict=True))
    same, total = 0, sum(row.codes.size for row in rows)
    for row, other in zip(rows, merged, strict=True):
        common = min(len(row.frames), len(other.frames))
        same += int((row.codes[:common] == other.codes[:common]).sum())
    passed = all(
        row.end == other.end and np.array_equal(row.codes, other.codes)
        for row, other in zip(rows, merged, strict=True)
    )
    told = f"{same} of {total} greedy tokens on {len(rows)} texts are the adapter's"
    return passed, f"{told}, logits differ by {far:.4f} at most"


def model_card(run: Run) -> str:
    """README.md of a merged folder: where it comes from, data, settings, scores, {parity}."""
    settings, home = run.settings, run.home
    report = read_json(home / SAVED_REPORT)
    base = settings.model if on_hub(settings.model) else Path(settings.model).name
    lines = ["---", "library_name: transformers", "pipeline_tag: text-to-speech"]
    lines += [f"base_model: {base}"] if on_hub(settings.model) else []
    lines += ["---", "", f"# {Path(settings.output_dir).name}", ""]
    lines += [f"{base}, fine-tuned with orpheus-finetune: LoRA merged into fp16 weights.", ""]
    lines += ["Its prompt is SOH BOS `voice: text` EOT EOH SOA SOS; it writes SNAC 24 kHz tokens."]
    with loads(home / SAVED_REPORT):
        size = f"{report['rows']} clips, {report['hours']:.3f} hours"
        data = f"{size} of {Path(report['dataset']).name}"
    lines += ["", "## Data", "", f"{data}; voices: {', '.join(run.voices) or 'none named'}.", ""]
    if (home / "checks.csv").is_file():
        checks = list(csv.DictReader(read_text(home / "checks.csv").splitlines()))
        with loads(home / "checks.csv"):
            best = max(checks, key=lambda check: float(check["eval_score"]))
        lines += ["## Scores", "", "| measure, at the best check | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in best.items()] + [""]
    lines += ["## Parity", "", "{parity}.", "", "## Settings", "", "```json"]
    return "\n".join([*lines, json.dumps(settings.flat(), indent=2, ensure_ascii=False), "```", ""])


def merge(run: Run, voice: str | None, out: Path) -> bool:
    """The adapter merged into its base, to the folder `out`; whether it still speaks the same."""
    from safetensors import SafetensorError

    if not is_adapter(run.folder):
        raise Mistake(f"{run.folder}: no adapter: there is nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Mistake(f"{out} is there already; give --merge a new folder")
    card = model_card(run) if run.home else ""  # a Mistake in what it is made from comes first
    model, tokenizer = load_model(str(run.folder), run.settings.weights == "4bit")
    ids = read_speech_ids(tokenizer, load_codec(run.settings.codec).codebook_size)
    rows = read_greedily(model, tokenizer, ids, run.settings, voice)
    logits = logits_over(model, ids, rows)
    del model
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for saved in load_model(str(run.folder), merged=True):
            saved.save_pretrained(str(part))
        if run.home:
            settings = run.settings.flat() | {"weights": "16bit"}
            write_text(part / SAVED_CONFIG, json.dumps(settings, indent=2) + "\n")
            shutil.copy(run.home / SAVED_REPORT, part)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or error
        raise Mistake(f"{out}: cannot be written: {told}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    passed, told = check_merged(run, voice, out, ids, rows, logits)
    if run.home:
        write_text(out / "README.md", card.replace("{parity}", told, 1))
    print(f"merged   {out}: {told}")
    if not passed:
        why = (
            "; trained over 4-bit weights, which these are not"
            if run.settings.weights == "4bit"
            else ""
        )
        print(
            f"parity   FAILED: it does not speak as the adapter does{why}. Listen before you use it"
        )
    return passed


# ---------------------------------------------------------------- a page to listen to


def draw_mel(audio: np.ndarray) -> bytes:
    """A PNG of the sound: 80 mel bands, 80 dB under the loudest, 94 columns a second."""
    from matplotlib.image import imsave
    from transformers import audio_utils

    bands = audio_utils.mel_filter_bank(513, 80, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE)
    window = audio_utils.window_function(1024, "hann")
    shape = {"frame_length": 1024, "hop_length": 256, "power": 2.0, "log_mel": "dB"}
    mel = audio_utils.spectrogram(audio, window, mel_filters=bands, **shape)
    png = io.BytesIO()
    imsave(
        png, mel, vmin=mel.max() - 80, vmax=mel.max(), cmap="magma", origin="lower", format="png"
    )
    return png.getvalue()


def data_uri(kind: str, raw: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def page_cell(audio: np.ndarray, text: str, pace: float | None, judges) -> dict[str, str]:
    """What page.html shows of one sound."""
    samples = sixteen_bit(audio).tobytes()
    return {
        "audio": data_uri("audio/wav", wav_header(len(samples)) + samples),
        "mel": data_uri("image/png", draw_mel(audio)),
        "scores": tell_scores(measure(audio, text, pace, judges)),
    }


def make_page(folder: Path, texts: list[str], recordings: list[Path], arguments, judges) -> None:
    """folder/index.html: each text as recorded and as each --model speaks it, all in one file."""
    with whole_file(folder / "index.html") as part:  # opened first: it may not be writable
        page = page_html(texts, recordings, arguments, judges)
        part.write_text(page, encoding="utf-8")
    print(f"{folder / 'index.html'}  {len(texts)} texts")


def page_html(texts: list[str], recordings: list[Path], arguments, judges) -> str:
    """The page's text: a column for the recordings, and for each --model."""
    columns = {"recording": [read_audio(clip)[0] for clip in recordings]} if recordings else {}
    pace = None
    for model in arguments.model or [None]:
        run = read_run(model, overrides(arguments), config=arguments.config)
        voice, pace = choose_voice(arguments.voice, run), run.pace or pace
        codec = load_codec(run.settings.codec, device())
        loaded = load_run(run)
        lines = spoken(texts, *loaded, codec, run.settings, voice, run.pace, judges)
        columns[model or str(run.folder)] = [np.concatenate(list(pieces)) for _, pieces in lines]
    lines = [
        {
            "text": text,
            "cells": [page_cell(sounds[n], text, pace, judges) for sounds in columns.values()],
        }
        for n, text in enumerate(texts)
    ]
    page = {"blind": arguments.blind, "columns": list(columns), "lines": lines}
    told = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    return read_text(ROOT / "page.html").replace("PAGE", told, 1)


# ---------------------------------------------------------------- command line

SPEAKING = ("temperature", "top_p", "repetition_penalty", "max_seconds", "speak_batch_size")
SPEAKING += ("best_of", "cuda_graph", "language")
RUN_KEYS = ("codec", "seed", *SPEAKING)
# What each way of calling infer.py takes, besides --model and --config.
SAYING = {"voice", "out", "stream", "score", "whisper", *RUN_KEYS}
TAKES = {
    "texts": SAYING,
    "file": SAYING,
    "page": {"voice", "score", "whisper", "blind", *RUN_KEYS},
    "wav": {"out", "codec", "seed"},
    "tokens": {"out", "codec", "seed"},
    "merge": {"voice", "codec"},
}
NEEDS = {"whisper": "score", "blind": "page"}
SWITCHES = {
    "stream": "let it be heard while it is made",
    "score": "tell how well it came out, by every judge that is installed",
    "blind": "of a --page: hide which sound is whose",
}


def read_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings that go over config.json's")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to say, a wav each")
    for name, words in {
        "file": "texts, one a line; or a metadata.csv, whose recordings are then compared with",
        "tokens": "a file of ids to decode instead",
        "wav": "a recording to encode and decode instead",
        "whisper": "faster-whisper's model for --score: its size or folder (base)",
        "page": "folder for an index.html to listen to, instead of wavs",
        "voice": "voice name (the adapter's first)",
        "merge": "new folder for the adapter merged into its base, in 16 bits",
        "out": "wav, or folder for several (out.wav, out/); streams: also -, pcm, speakers",
    }.items():
        parser.add_argument(f"--{name}", metavar="…", help=words)
    for name in RUN_KEYS:
        kind = {"action": "store_const", "const": "true"} if OWN_KEYS[name].type is bool else {}
        words = f"{OWN_KEYS[name].metadata['description']} (the run's)"
        parser.add_argument(f"--{name}", help=words, **kind or {"metavar": "…"})
    words = "adapter, checkpoint, merged folder or hub id (config.json's run); of a --page several"
    parser.add_argument("--model", metavar="…", action="append", help=words)
    for name, words in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=words)
    arguments = parser.parse_args()
    check_options({name: value for name, value in vars(arguments).items() if value or value == ""})
    return arguments


def check_options(given: dict[str, Any]) -> None:
    """`Mistake` for options that do not go together: nothing that is asked for is ignored."""
    for name, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name != "texts" and not text.strip():
                raise Mistake(f"command line: --{name} is empty; give a value, or leave it out")
        check_strings(name if name == "texts" else f"--{name}", value, "command line")
    asked = [name for name in ("texts", "file", "tokens", "wav", "merge") if name in given]
    if len(asked) != 1:
        raise Mistake("command line: give one of: texts, --file, --tokens, --wav, --merge")
    for name, other in NEEDS.items():
        if name in given and other not in given:
            raise Mistake(f"command line: --{name} needs --{other}")
    way = "page" if "page" in given and asked[0] in ("texts", "file") else asked[0]
    for name in given:
        if name not in {asked[0], way, "model", "config", *TAKES[way]}:
            label = "texts" if way == "texts" else f"--{way}"
            raise Mistake(f"command line: --{name} does nothing with {label}; leave it out")
    if len(given.get("model", [])) > 1 and way != "page":
        raise Mistake("command line: only a --page takes several --model")


def overrides(arguments: argparse.Namespace) -> dict[str, str]:
    given = {n: getattr(arguments, n) for n in RUN_KEYS if getattr(arguments, n) is not None}
    return given | ({"codec": local(given["codec"])} if "codec" in given else {})


def read_table(path: str) -> list[dict[str, str]]:
    """Rows with a file_name and a text, separated by whatever the header is separated by."""
    text = read_text(path)
    separator = max(",;\t|", key=text.split("\n", 1)[0].count)
    table = csv.DictReader(io.StringIO(text), delimiter=separator)
    try:
        table.fieldnames = [
            name.strip().lower().replace(" ", "_") for name in table.fieldnames or ()
        ]
        rows = list(table)
    except csv.Error as error:
        raise Mistake(f"{path}: not a table that can be read: {error}") from None
    if not all(row.get("file_name") and row.get("text") for row in rows):
        raise Mistake(f"{path}: every row needs a text and a file_name, columns of the first line")
    return rows


def read_texts(arguments: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """(the texts to say, none of them empty; the recordings of each, where --file is a table)."""
    texts, clips, source = arguments.texts, [], arguments.file or "command line"
    kind = Path(source).suffix.lower() if arguments.file else ""
    if kind in (".json", ".jsonl", ".parquet"):
        raise Mistake(f"{source}: --file takes a metadata.csv, or a .txt of one text a line")
    if kind in (".csv", ".tsv"):
        rows = read_table(source)
        texts = [row["text"] for row in rows]
        clips = [Path(source).parent / row["file_name"] for row in rows]
    elif arguments.file:
        texts = [line for line in read_text(source).splitlines() if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise Mistake(f"{source}: the text is empty; give some to say")
    return texts, clips


def decode_given(arguments: argparse.Namespace, run: Run, codec, out: Path) -> None:
    """What the codec makes of a recording or of ids from elsewhere, to `out`."""
    import torch

    if arguments.wav:
        codes, how = encode(codec, [read_audio(Path(arguments.wav))[0]])[0], "encoded and decoded"
    else:
        tokenizer = load_tokenizer(run.folder) if run.folder else None
        codes, how = read_tokens(Path(arguments.tokens), tokenizer, codec.codebook_size), "decoded"
    torch.manual_seed(run.settings.seed)
    row = Utterance("", [], 0, frames=list(codes), end=how)
    save_speech(iter([([row], [decode(codec, codes)])]), out, arguments.stream)


def out_paths(arguments: argparse.Namespace, count: int) -> list[Path]:
    """Where each text goes: --out, or numbered wavs in it."""
    several = bool(arguments.file) or count > 1
    out = Path(arguments.out or ("out" if several else "out.wav"))
    if str(out) not in HEARD:
        return [out / f"{n:03}.wav" for n in range(1, count + 1)] if several else [out]
    if several and str(out) == "-":
        raise Mistake("--out -: a wav holds one text; pcm takes several, and so does a folder")
    arguments.stream = True
    return [out] * count


def say(arguments: argparse.Namespace) -> None:
    """The texts, or what was given in their place, to --out, or all to a --page."""
    given = arguments.tokens or arguments.wav
    texts, recordings = ([], []) if given else read_texts(arguments)
    paths = out_paths(arguments, 1 if given else len(texts))
    judges = load_judges(arguments.whisper or "base", recordings) if arguments.score else None
    if arguments.page:
        make_page(Path(arguments.page), texts, recordings, arguments, judges)
        return
    model = arguments.model[0] if arguments.model else None
    patterns = TOKENIZER_FILES if given else MODEL_FILES
    run = read_run(model, overrides(arguments), patterns, arguments.config)
    if arguments.stream and run.settings.best_of > 1:
        raise Mistake("--stream plays what comes first: leave out --best_of, or set it to 1")
    voice = choose_voice(arguments.voice, run)
    codec = load_codec(run.settings.codec, device())
    if given:
        decode_given(arguments, run, codec, paths[0])
        return
    loaded = load_run(run)
    keep = arguments.score
    more = {"pace": run.pace, "stream": arguments.stream, "judges": judges, "keep": keep}
    speak(texts, paths, *loaded, codec, run.settings, voice, **more)


def main() -> None:
    arguments = read_arguments()
    if arguments.config:
        check_names(read_settings(arguments.config))
    piped = arguments.out in ("-", "pcm")
    with contextlib.redirect_stdout(sys.stderr if piped else sys.stdout):
        if not arguments.merge:
            say(arguments)
            return
        model = arguments.model[0] if arguments.model else None
        adapter = read_run(model, overrides(arguments), config=arguments.config)
        if not merge(adapter, choose_voice(arguments.voice, adapter), Path(arguments.merge)):
            sys.exit(1)


if __name__ == "__main__":
    run(main)
