"""Every setting, where its value comes from, and how a script ends after a mistake or a crash."""

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config.json"
# On import, bitsandbytes warns of an optional package, which would make 4-bit a bit faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class UserError(ValueError):
    """A mistake that the user can correct: what, where and the remedy, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(filter(None, message.splitlines())))


# ---------------------------------------------------------------- the settings

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]  # of steps, under 1: a share of all
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
SAMPLE_TEXTS = ["Hello, this is my new voice.", "The quick brown fox jumps over the lazy dog."]
SAMPLE_TEXTS += ["seven two nine", "Yes."]


def key(default: Any, meaning: str, path: bool = False, **bounds):
    """A setting. `path`: it names something that is read, in a folder or on the hub."""
    return Field(default, description=meaning, json_schema_extra={"path": path}, **bounds)


class Part(BaseModel):
    """Some of the settings, as attributes. A function does not change those it is given."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, str_min_length=1)

    def replace(self, **changes) -> Self:
        """Return a copy with some keys changed, which are not checked."""
        return self.model_copy(update=changes)


class DataSettings(Part):
    dataset: str = key("data/numbers", "Folder of clips, or hub id of a dataset", path=True)
    dataset_config: str | None = key(None, "Configuration of a hub dataset")
    dataset_split: str = key("train", "Split of a hub dataset")
    dataset_revision: str | None = key(None, "Branch, tag or commit of a hub dataset")
    text_column: str | None = key(None, "Column of the texts; null: as data/README.md says")
    audio_column: str | None = key(None, "Column of the recordings; null: as data/README.md says")
    voice_column: str | None = key(None, "Column of the voices; null: as data/README.md says")
    absolute_paths: bool = key(False, "Let rows name recordings outside the dataset's folder")
    voice: str | None = key(None, "Voice name for clips that name no speaker")
    limit: Count | None = key(None, "Use the first N clips only, for a quick trial")
    keep_silence: NonNegative | None = key(0.1, "Seconds of silence kept at both ends; null: all")
    silence_db: Positive = key(40.0, "Silence is this many dB below a clip's loudest moment")
    leave_out: list[str] = key(["same_sound"], "Findings whose clips are not trained on")
    cache_dir: str | None = key("outputs/cache", "Keeps encoded clips for later runs; null: none")


class RowSettings(Part):
    train_on: Literal["audio", "all"] = key("audio", "all: there is loss on the prompt, too")
    max_length: Count = key(2048, "Longest row, and a packed row's length; a second is 82 tokens")
    too_long: Literal["drop", "truncate"] = key("drop", "What becomes of rows over max_length")
    batching: Literal["pack", "pad", "pad_to_max"] = key(
        "pack", "Clips fill rows; or each is padded to the longest of its batch; or to max_length"
    )
    held_out: Share = key(0.05, "Share of the texts that is not trained on but evaluated")


class ModelSettings(Part):
    model: str = key("unsloth/orpheus-3b-0.1-ft-unsloth-bnb-4bit", "Base model", path=True)
    codec: str = key("hubertsiuzdak/snac_24khz", "SNAC at 24 kHz: hub id or folder", path=True)
    backend: Literal["unsloth", "transformers"] = key("unsloth", "transformers: TRL and PEFT alone")
    full_finetuning: bool = key(False, "Train all weights, which have to be 16bit, and no LoRA")
    lora_r: Count = key(64, "Rank of the LoRA, which is on every linear layer")
    lora_alpha: Count = key(64, "The LoRA is scaled by lora_alpha / lora_r")
    lora_dropout: Share = key(0.0, "Dropout in the LoRA")


class MemorySettings(Part):
    weights: Literal["4bit", "8bit", "fp8", "16bit"] = key("4bit", "Precision of the base model")
    gradient_checkpointing: bool | Literal["unsloth"] = key("unsloth", "Recompute activations")
    per_device_train_batch_size: Count = key(1, "Rows per batch on each GPU")
    gradient_accumulation_steps: Count = key(1, "Batches per optimiser step")
    device_map: Literal["auto", "balanced", "sequential"] | None = key(None, "Split over GPUs")
    plan: bool = key(False, "Print where the memory would go, and stop")


class TrainingSettings(Part):
    num_train_epochs: Positive = key(3, "Passes over the data")
    max_steps: int = key(-1, "Optimiser steps; -1: as many as num_train_epochs takes", ge=-1)
    learning_rate: float = key(2e-4, "Peak learning rate", gt=0, le=1)
    lr_scheduler_type: str = key("cosine", "Learning rate schedule, any of transformers'")
    warmup_steps: NonNegative = key(0.05, "Steps of warmup; under 1: a share of all steps")
    optim: str = key("adamw_8bit", "adafactor, paged_adamw_8bit or any other of transformers'")
    weight_decay: NonNegative = key(0.01, "Weight decay")
    max_grad_norm: NonNegative = key(1.0, "Gradients are clipped to this norm; 0: not at all")
    bf16: bool | None = key(None, "Mixed precision in bfloat16; null: where the GPU has it")
    fp16: bool = key(False, "Mixed precision in float16; without either it is float32")


class OutputSettings(Part):
    output_dir: str = key("outputs/numbers", "Folder for the adapter, checkpoints and samples")
    overwrite: bool = key(False, "Start anew; a run in output_dir is kept as output_dir.old1, …")
    resume: bool | Literal["weights"] = key(False, "Continue the run; weights: without optimiser")
    save_steps: Positive = key(100, "Steps between checkpoints")
    save_total_limit: Count | None = key(2, "How many checkpoints to keep; null: all")
    sample_steps: Count = key(100, "Steps between checks: held-out loss, and spoken sample_texts")
    sample_texts: list[str] = key(SAMPLE_TEXTS, "Texts that are spoken at checks and at the end")
    logging_steps: Positive = key(1, "Steps between lines of the log")
    logging_nan_inf_filter: bool = key(False, "Hide losses that are not finite from the log")
    include_num_input_tokens_seen: bool | str = key("non_padding", "Tokens counted; or all, or no")
    report_to: str | list[str] | None = key("tensorboard", "tensorboard, wandb, trackio, … or none")


class SpeakingSettings(Part):
    seed: int = key(3407, "Seed of training and of speaking", ge=0, lt=2**32)
    temperature: NonNegative = key(0.6, "Sampling temperature; 0: greedy")
    top_p: float = key(0.95, "Nucleus sampling", gt=0, le=1)
    repetition_penalty: Positive = key(1.1, "Penalty on tokens of prompt and audio; 1: off")
    max_seconds: Positive = key(20.0, "Longer speech is cut off, and reported")
    speak_batch_size: Count = key(8, "Texts, or candidates of one, generated in one batch")
    best_of: Count = key(1, "Candidates generated for a text, of which the best is kept")
    language: str = key("en", "ISO code of the language, for sentences", pattern="^[a-z]{2,3}$")
    cache_implementation: str | None = key(None, "generate's cache; static: compiled, on a GPU")


class Settings(  # pydantic takes the fields of the last base first
    SpeakingSettings, OutputSettings, TrainingSettings, MemorySettings, ModelSettings, RowSettings,
    DataSettings,
):  # fmt: skip
    """All settings of a run, and any of TRL's SFTConfig. dict(settings) has them in one dict."""

    @property
    def trainer(self) -> dict[str, Any]:
        """The settings that SFTConfig has, too."""
        return {name: value for name, value in self if name in trainer_keys()}


PARTS = Settings.__bases__[::-1]
PATHS = [name for name, f in Settings.model_fields.items() if f.json_schema_extra["path"]]


@cache
def trainer_keys() -> set[str]:
    """Return the names of SFTConfig's keys, from its source, as its import takes seconds."""
    trl, transformers = (Path(find_spec(name).origin).parent for name in ("trl", "transformers"))
    files = [trl / "trainer/sft_config.py", trl / "trainer/base_config.py"]
    files += [transformers / "training_args.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r"^    (\w+): .*(?: = |$)", source, re.M))


# Names that other tools have for keys.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "load_in_4bit": 'weights "4bit"',
}
# SFTConfig's keys that a run sets itself, or that would do nothing.
REFUSED = {
    "packing padding_free pad_to_multiple_of *_sampling_*": "it follows from batching",
    "resume_from_checkpoint ignore_data_skip": "--resume continues from the last checkpoint",
    "push_to_hub hub_*": "`hf upload you/anna outputs/anna` publishes a finished run",
    "*eval* do_*": "sample_steps sets when a run is evaluated, held_out on what",
    "dataset_* *_dataset *_only_loss truncation_mode chat_* *_token": "the rows come ready made",
}


def nearest(name: str, known: list[str]) -> str:
    """Return a hint at the one of the `known` names that is most like `name`."""
    near = [ALIASES[name]] if name in ALIASES else difflib.get_close_matches(name, known, n=1)
    return f"the nearest is {near[0]!r}" if near else "--help lists them"


def check_name(name: str, source: str) -> None:
    """Raise a UserError for a key that nothing has, or that cannot be set."""
    known = [*Settings.model_fields, *sorted(trainer_keys())]
    if name not in known:
        raise UserError(f"{source}: no key is named {name!r}; {nearest(name, known)}")
    for patterns, reason in REFUSED.items():
        if any(fnmatch(name, p) for p in patterns.split()) and name not in Settings.model_fields:
            raise UserError(f"{source}: {name} cannot be set, leave it out: {reason}")


def read_settings(
    config: str | Path | None = None, words: dict | None = None, saved: bool = False
) -> Settings:
    """Return the defaults, a config file over them, and the command line's `words` over both.

    `config` stands in for the project's own config.json, which may be missing. One that was `saved`
    by a run may have keys of another version of TRL. Raises a UserError for what is wrong in them.
    """
    file = Path(config or CONFIG)
    given = read_json(file) if config or file.exists() else {}
    words = {name: parse_word(name, word) for name, word in (words or {}).items()}
    sources = ({} if saved else dict.fromkeys(given, file)) | dict.fromkeys(words, "command line")
    for name, source in sources.items():
        check_name(name, source)
    given.setdefault("dataset", Settings.model_fields["dataset"].default)  # this one is a path
    given |= {name: find_path(given[name], file) for name in PATHS if name in given}
    try:
        return Settings.model_validate(given | words)
    except ValidationError as error:
        errors, values = error.errors(), given | words
        name = errors[0]["loc"][0]
        reasons = " or ".join(dict.fromkeys(e["msg"] for e in errors if e["loc"][0] == name))
        default = json.dumps(Settings.model_fields[name].default)
        usual = f"; the default is {default}" if len(default) < 60 else ""
        wrong = f"{name} is {json.dumps(values[name], ensure_ascii=False, default=str)[:80]}"
        raise UserError(f"{sources.get(name, file)}: {wrong}: {reasons}{usual}") from error


def parse_word(name: str, word: Any) -> Any:
    """Return a word of the command line as JSON. Of our keys, pydantic tells what is a number."""
    try:
        value = json.loads({"True": "true", "False": "false"}.get(word, word))
    except (TypeError, ValueError):
        return word
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return word if is_plain and name in Settings.model_fields else value


def find_path(path: Any, config: Path) -> Any:
    """Return a config's path from the current folder, else from the config's, else from ROOT."""
    folders = ("", config.parent, ROOT) if isinstance(path, str) else ()
    return next((p for f in folders if os.path.exists(p := os.path.join(f, path))), path)


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, or raise a UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf_16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "it is UTF-16" if is_utf_16 else f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: cannot be read as UTF-8: {kind}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise a UserError."""
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be one JSON object of keys and values")
    return values


# ---------------------------------------------------------------- the command line

HIDDEN = argparse.SUPPRESS
SWITCH = {"nargs": "?", "const": "true"}  # so that --plan is --plan true


class Parser(argparse.ArgumentParser):
    """A script's own options, and settings as `--key value`; none may be abbreviated."""

    def __init__(self, description: str, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)

    def error(self, message: str):
        raise UserError(f"command line: {message}")

    def add_settings(self, names: tuple[str, ...]) -> None:
        self.add_argument("--config", metavar="FILE", help="settings, in place of config.json's")
        for part in PARTS:
            group = self.add_argument_group(part.__name__.removesuffix("Settings").lower())
            for name in [name for name in part.model_fields if name in names]:
                field = part.model_fields[name]
                words = {"help": f"{field.description} (default: {json.dumps(field.default)})"}
                types = (field.annotation, *get_args(field.annotation))
                choices = [c for t in types if get_origin(t) is Literal for c in get_args(t)]
                words |= {"metavar": "|".join(choices) or "…"} | (SWITCH if bool in types else {})
                group.add_argument(f"--{name}", default=HIDDEN, **words)

    def parse(self, *names: str) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Return the script's options, with all `settings`, and those of `names` that are given."""
        self.add_settings(names)
        options, unknown = self.parse_known_args()
        if unknown:
            hint = nearest(unknown[0].lstrip("-"), [*vars(options), *names])
            hint = hint if unknown[0][0] == "-" else "write --key value, as in --dataset my_voice"
            raise UserError(f"command line: no option is named {unknown[0]!r}; {hint}")
        words = {name: vars(options).pop(name) for name in set(names) & vars(options).keys()}
        options.settings = read_settings(options.config, words)
        given = options.settings.model_fields_set if options.config else words
        return options, {name: getattr(options.settings, name) for name in names if name in given}


def read_command_line(description: str) -> Settings:
    """Return the settings of a script that takes all of them, and SFTConfig's."""
    parser = Parser(description, usage="%(prog)s [--config FILE] [--key value …]")
    for name in trainer_keys() - Settings.model_fields.keys():
        parser.add_argument(f"--{name}", help=HIDDEN, default=HIDDEN, **SWITCH)
    settings = parser.parse(*Settings.model_fields, *trainer_keys())[0].settings
    log_folders[:] = [Path(settings.output_dir), Path()]
    return settings


# ---------------------------------------------------------------- how a script ends

# In the messages of the RuntimeErrors of torch, of cuBLAS and cuDNN, and of Unsloth's loss.
OUT_OF_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED", "negligible GPU memory")
log_folders = [Path()]  # where error.log may be written: output_dir first, once it is known


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory is full."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def write_error_log() -> str:
    """Write the traceback of the exception in hand to error.log, and return where it is."""
    rank = os.environ.get("RANK", "0")  # set by torchrun, and by accelerate
    name = "error.log" if rank == "0" else f"error.rank{rank}.log"
    lines = f"{' '.join(sys.argv)}\n{traceback.format_exc()}"
    for path in [folder / name for folder in log_folders]:
        with contextlib.suppress(OSError):
            path.write_text(lines, encoding="utf-8", errors="backslashreplace")
            return f"the traceback is in {path}"
    print(lines, file=sys.stderr)
    return "the traceback is above, since error.log cannot be written"


def run(main: Callable[[], None]) -> None:
    """Call `main`, and end with one line: code 2 after a mistake, 130 after Ctrl-C.

    After any other exception the code is 1, and the traceback is in error.log.
    """
    sys.stdout.reconfigure(line_buffering=True)  # so that a log or a pipe shows each line at once
    code = 2
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # the reader is gone, as in `… | head -1`: end as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"{error}; `make` installs what is needed"
    except Exception as error:  # noqa: BLE001  the net
        if is_out_of_memory(error):
            message = "the GPU's memory is full: README, Out of memory, says what to change first"
        else:
            what = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
            code, message = 1, f"{what}; {write_error_log()}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
