"""Settings, from config.json, --config and the command line, and the error of user mistakes."""

import argparse
import dataclasses
import difflib
import json
import logging
import os
import signal
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt

# bitsandbytes warns that an optional package is missing, which would make 4-bit a bit faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parent.parent
SAVED_CONFIG = "finetune_config.json"  # the resolved settings of a run, beside its adapter
SAVED_REPORT = "data_report.json"  # what the run was trained on: its voices, among others


class UserError(ValueError):
    """A mistake that the user can correct: what, where and the remedy, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a file's name may hold anything


def out_of_memory() -> tuple:
    """What a full GPU raises; nothing, as long as torch is not imported."""
    torch = sys.modules.get("torch")
    return (torch.cuda.OutOfMemoryError,) if torch else ()


def run(main):
    """Calls `main`; a UserError becomes one line and exit code 2, Ctrl-C one line and 130."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone, as in `… | head -1`: end as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except UserError as mistake:
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


def setting(description: str, **bounds):
    """A settings field: its words for --help, and pydantic's bounds (gt, ge, le, …)."""
    return dataclasses.field(metadata={"description": description, **bounds})


@dataclass
class Settings:
    """Our own keys. They have no defaults here: config.json is the only home of defaults.

    Every other key of a config goes to TRL's SFTConfig, by way of `trainer`.
    """

    model: str = setting("base model: hub id or folder")
    codec: str = setting("SNAC 24 kHz codec: hub id or folder")
    dataset: str = setting("folder of clips (data/README.md), or the hub id of a dataset")
    dataset_config: str | None = setting("configuration of a hub dataset")
    dataset_split: str = setting("split of a hub dataset")
    dataset_revision: str | None = setting("branch, tag or commit of a hub dataset")
    text_column: str | None = setting("column of the texts; null: by convention")
    audio_column: str | None = setting("column of the sounds; null: by convention")
    voice_column: str | None = setting("column of the voices; null: by convention")
    absolute_paths: bool = setting("let rows name sounds outside the dataset's folder")
    voice: str | None = setting("voice name for clips that name no speaker")
    limit: int | None = setting("take the first N clips only", gt=0, le=10**9)
    keep_silence: float | None = setting(
        "seconds of silence kept at a clip's ends; null: all", ge=0, le=600
    )
    silence_db: float = setting(
        "softer than the loudest moment by this much is silence", gt=0, le=200
    )
    leave_out: list[str] = setting("the doctor's findings whose clips are not trained on")
    cache_dir: str | None = setting("where encoded clips are kept; null: nowhere")
    train_on: Literal["audio", "all"] = setting("loss on the audio alone, or on the prompt too")
    max_length: int = setting("longest row, and length of a packed row, in tokens", gt=0, le=10**6)
    too_long: Literal["drop", "truncate"] = setting("what becomes of a row over max_length")
    batching: Literal["pack", "pad", "pad_to_max"] = setting(
        "how rows of unequal length share a batch"
    )
    backend: Literal["unsloth", "transformers"] = setting("Unsloth, or plain TRL and PEFT")
    weights: Literal["4bit", "8bit", "fp8", "16bit"] = setting("how the base's weights are held")
    full_finetuning: bool = setting("train every weight, instead of a LoRA")
    lora_r: int = setting("LoRA rank", gt=0, le=4096)
    lora_alpha: int = setting("LoRA scale is lora_alpha / lora_r", gt=0, le=10**5)
    lora_dropout: float = setting("LoRA dropout", ge=0, lt=1)
    gradient_checkpointing: bool | Literal["unsloth"] = setting(
        "off, on, or Unsloth's, which offloads"
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = setting(
        "auto: one model over several GPUs, a part on each"
    )
    plan: bool = setting("tell where the memory would go, and stop")
    fit: bool | Annotated[float, Gt(0), Le(10_000)] = setting(
        "let rows at once and checkpointing follow the free memory, or GiB"
    )
    output_dir: str = setting("folder for the adapter, checkpoints and samples")
    overwrite: bool = setting("replace the run that output_dir holds")
    resume: bool = setting("go on from the last checkpoint in output_dir")
    seed: int = setting("seed of training and of speaking", ge=0, lt=2**32)
    held_out: float = setting("share of the texts kept from training, to be judged on", ge=0, lt=1)
    sample_steps: int = setting(
        "steps between checks: held-out loss, sample_texts spoken", gt=0, le=10**9
    )
    sample_texts: list[str] = setting("texts spoken at every check, and when training is done")
    temperature: Annotated[float, Ge(0), Le(0)] | Annotated[float, Ge(0.01), Le(100)] = setting(
        "sampling temperature; 0 is greedy"
    )
    top_p: float = setting("nucleus sampling", ge=0.01, le=1)
    repetition_penalty: float = setting("over prompt and audio alike; 1 is off", ge=0.1, le=10)
    max_seconds: float = setting("speech longer than this is cut off", gt=0, le=3600)
    speak_batch_size: int = setting("texts, or candidates of one, spoken at once", gt=0, le=1024)
    best_of: int = setting(
        "candidates spoken of every text, the best of which is kept", gt=0, le=256
    )
    # sentencex takes any code; without rules for a language it uses those that most share
    language: str = setting("ISO code, by whose rules sentences are split", pattern="^[a-z]{2,3}$")
    cuda_graph: bool = setting("speak by one CUDA graph a frame, where there is a GPU")
    trainer: dict[str, tuple[Any, str]] = setting("every other key, with the file it came from")

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


def parse_word(word: str) -> Any:
    """A word of the command line as JSON, or as it is where it is none."""
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        return word
    return word if isinstance(value, str) else value


def validate(name: str, value: Any, hint: Any, source: str, bounds: dict | None = None) -> Any:
    """`value` as the type `hint` says; a str from the command line may be JSON or a bare word."""
    from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

    finite = ConfigDict(allow_inf_nan=False)
    adapter = TypeAdapter(Annotated[hint, Field(**(bounds or {}))], config=finite)
    word = source == "command line" and isinstance(value, str)
    given = parse_word(value) if word else value
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
    raise UserError(f"{source}: {name} is {json.dumps(value)[:80]}: {message}")


def check_strings(name: str, value: Any, source: str) -> None:
    """`UserError` for a string that no file or text can have, and for an empty one of our keys."""
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if "\0" in text:
            raise UserError(f"{source}: {name} holds a NUL byte; remove it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{source}: {name} is {text[:80]!r}: not valid UTF-8") from None
        if name in OWN_KEYS and not text.strip():
            what = f"{name}: the text" if isinstance(value, list) else name
            raise UserError(f"{source}: {what} is empty; give one, or leave it out")


def unknown_key(name: str, known, source: str) -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return UserError(f"{source}: no key is named {name[:80]!r}; the nearest is {near[0]!r}")


def check_names(settings: Settings) -> None:
    """`UserError` for a key that neither this project nor SFTConfig has.

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
    """`UserError` for a folder, pipe or device: reading one could wait or go on forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be read: not a regular file")


def read_json(path: Path) -> dict[str, Any]:
    """A flat JSON object from a file; `UserError` with the place where it is not one."""

    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the key {twice[:80]!r} is there twice; remove one")
        return values

    check_regular(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: not JSON of keys and values: nested too deep") from None
    except ValueError as error:  # bad syntax, bad UTF-8, a number of thousands of digits
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be one JSON object of keys and values")
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
                value = validate(name, value, field.type, source, dict(field.metadata))
                in_config = name in PATHS and source != "command line"
                own[name] = beside(value, source) if in_config else value
            elif name in TRAINER_TYPES:
                trainer[name] = validate(name, value, TRAINER_TYPES[name], source), source
            else:
                trainer[name] = (value, source)
    missing = [name for name in OWN_KEYS if name not in own]
    if missing:
        raise UserError(
            f"{ROOT / 'config.json'}: lacks {', '.join(missing)}; every key stands there"
        )
    return Settings(**own, trainer=trainer)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, without the usage."""

    def error(self, message: str):
        raise UserError(f"command line: {message}")


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
            raise UserError(f"command line: {name}: write keys as --key value")
        overrides[name[2:]] = "true" if bare else words.pop(0)
    return read_settings(known.config, overrides)


def read_text(path: str | Path) -> str:
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16" if utf_16 else f"another encoding ({error})"
        raise UserError(
            f"{path}: cannot be read as UTF-8: it is {kind}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def first_reason(error: Exception) -> str:
    """The first line of an exception's message, and the second where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    if not lines or not isinstance(error, OSError | RuntimeError | ValueError):
        lines = [f"{type(error).__name__} {' '.join(lines)}".strip()]  # KeyError: 'weight_map'
    return textwrap.shorten(lines[0], 200, placeholder=" …")


SPEAKING = ("temperature", "top_p", "repetition_penalty", "max_seconds", "speak_batch_size")
SPEAKING += ("best_of", "cuda_graph", "language")
RUN_KEYS = ("codec", "seed", *SPEAKING)
