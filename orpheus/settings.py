"""Every setting, where its value comes from, and how a script ends after a mistake or a crash."""

import contextlib
import difflib
import io
import json
import logging
import os
import re
import signal
import sys
import textwrap
from collections import Counter
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

# bitsandbytes warns that an optional package is missing, which would make 4-bit a bit faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Unsloth's banner at the start of training says once more what our lines say.
BANNER = "Unsloth - 2x faster free finetuning"
logging.getLogger("transformers.trainer").addFilter(lambda r: BANNER not in r.getMessage())

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = "command line"


class UserError(ValueError):
    """A mistake that the user can correct: what, where and the remedy, in one line."""

    def __init__(self, message: str):
        lines = map(str.strip, message.splitlines())  # a file's name or an error may have several
        super().__init__(" ".join(line for line in lines if line))


# ---------------------------------------------------------------- the settings

Count = Annotated[int, Field(ge=1, le=10**6)]
Steps = Annotated[float, Field(gt=0, le=10**9)]  # under 1: a share of all steps


def setting(default: Any, description: str, path: bool = False, **bounds):
    """A setting. `path`: it names something that is read, in a folder or on the hub."""
    return Field(default, description=description, json_schema_extra={"path": path}, **bounds)


class Part(BaseModel):
    """Some of the settings, as attributes. A function does not change those it is given."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, str_min_length=1)

    def replace(self, **changes) -> Self:
        """Return a copy with some keys changed, which are not checked."""
        return self.model_copy(update=changes)


class DataSettings(Part):
    """Data"""

    dataset: str = setting(
        "data/numbers", "Folder of clips (data/README.md), or the hub id of a dataset", path=True
    )
    dataset_config: str | None = setting(None, "Configuration of a hub dataset")
    dataset_split: str = setting("train", "Split of a hub dataset")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of a hub dataset")
    text_column: str | None = setting(
        None, "Column of the texts; null: by convention (data/README.md)"
    )
    audio_column: str | None = setting(None, "Column of the recordings; null: by convention")
    voice_column: str | None = setting(None, "Column of the voices; null: by convention")
    absolute_paths: bool = setting(False, "Let rows name recordings outside the dataset's folder")
    voice: str | None = setting(None, "Voice name for clips that name no speaker")
    limit: Count | None = setting(None, "Use the first N clips only, for a quick trial")
    keep_silence: float | None = setting(
        0.1, "Seconds of silence kept at both ends of a clip; null: all of it", ge=0, le=600
    )
    silence_db: float = setting(
        40.0, "Silence is this many dB below the loudest moment of a clip", gt=0, le=200
    )
    leave_out: list[str] = setting(
        ["same_sound"], "Findings of data/prepare.py whose clips are not trained on"
    )
    cache_dir: str | None = setting(
        "outputs/cache", "Folder that keeps encoded clips for later runs; null: none"
    )


class RowSettings(Part):
    """Rows"""

    train_on: Literal["audio", "all"] = setting(
        "audio",
        "audio: loss on the audio tokens; all: on the prompt too, as in Orpheus's own trainer",
    )
    max_length: Count = setting(
        2048, "Longest row, and the length of a packed row, in tokens (82 a second)"
    )
    too_long: Literal["drop", "truncate"] = setting(
        "drop",
        "drop: rows over max_length are left out; truncate: they are cut after a whole frame, "
        "without an end token",
    )
    batching: Literal["pack", "pad", "pad_to_max"] = setting(
        "pack",
        "pack: whole clips fill rows of max_length; pad: each batch is padded to its longest row, "
        "with rows of similar length together; pad_to_max: every row is padded to max_length",
    )
    held_out: float = setting(
        0.05, "Share of the texts that is not trained on but evaluated", ge=0, lt=1
    )


class ModelSettings(Part):
    """Model"""

    model: str = setting("unsloth/orpheus-3b-0.1-ft", "Base model: hub id or folder", path=True)
    codec: str = setting(
        "hubertsiuzdak/snac_24khz", "SNAC 24 kHz codec: hub id or folder", path=True
    )
    backend: Literal["unsloth", "transformers"] = setting(
        "unsloth",
        "unsloth; or transformers: plain TRL and PEFT, the only backend that packs on a CPU",
    )
    full_finetuning: bool = setting(
        False, 'Train all weights (needs weights "16bit") instead of a LoRA'
    )
    lora_r: int = setting(64, "Rank of the LoRA, which is on every linear layer", gt=0, le=4096)
    lora_alpha: int = setting(64, "The LoRA is scaled by lora_alpha / lora_r", gt=0, le=10**5)
    lora_dropout: float = setting(0.0, "Dropout in the LoRA", ge=0, lt=1)


class MemorySettings(Part):
    """Memory"""

    weights: Literal["4bit", "8bit", "fp8", "16bit"] = setting(
        "4bit",
        "Precision of the base's weights: 4bit (QLoRA), 8bit, fp8 (Unsloth, on Hopper) or 16bit",
    )
    gradient_checkpointing: bool | Literal["unsloth"] = setting(
        "unsloth",
        "true: recompute activations to save memory; unsloth: also offload them to RAM; false: off",
    )
    per_device_train_batch_size: Count = setting(1, "Rows per batch on each GPU")
    gradient_accumulation_steps: Count = setting(1, "Batches per optimiser step")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = setting(
        None, "auto or balanced: split one model over several GPUs; null: no"
    )
    plan: bool = setting(False, "Print where the memory would go, and stop")
    fit: bool | Annotated[float, Field(gt=0, le=10_000)] = setting(
        False,
        "true: choose rows per batch and checkpointing by the GPU's free memory; a number: GiB to "
        "stay within",
    )


class TrainingSettings(Part):
    """Training"""

    num_train_epochs: float = setting(3, "Passes over the data", gt=0, le=10**6)
    max_steps: int = setting(
        -1,
        "Optimiser steps, in place of num_train_epochs; -1: as many as those take",
        ge=-1,
        le=10**9,
    )
    learning_rate: float = setting(2e-4, "Peak learning rate", gt=0, le=1)
    lr_scheduler_type: str = setting("cosine", "Learning rate schedule, any of transformers'")
    warmup_steps: float = setting(
        0.05, "Steps of warmup; under 1: a share of all steps", ge=0, le=10**9
    )
    optim: str = setting(
        "adamw_8bit", "Optimiser: adafactor, paged_adamw_8bit or any other of transformers'"
    )
    weight_decay: float = setting(0.01, "Weight decay", ge=0, le=100)
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm; 0: not at all", ge=0, le=10**6
    )
    bf16: bool | None = setting(None, "Mixed precision in bfloat16; null: unless fp16 is on")
    fp16: bool = setting(
        False, "Mixed precision in float16, for GPUs before Ampere; without either it is float32"
    )


class OutputSettings(Part):
    """Output"""

    output_dir: str = setting("outputs/numbers", "Folder for the adapter, checkpoints and samples")
    overwrite: bool = setting(
        False, "Replace the run in output_dir, once this one has saved a checkpoint or adapter"
    )
    resume: bool = setting(False, "Continue from the last complete checkpoint in output_dir")
    save_steps: Steps = setting(100, "Steps between checkpoints")
    save_total_limit: Count | None = setting(2, "How many checkpoints to keep; null: all")
    sample_steps: Count = setting(
        100, "Steps between checks, which compute held-out loss and speak sample_texts"
    )
    sample_texts: list[str] = setting(
        [
            "Hello, this is my new voice.",
            "The quick brown fox jumps over the lazy dog.",
            "seven two nine",
            "Yes.",
        ],
        "Texts that are spoken to output_dir/samples at every check and at the end",
    )
    judge_samples: bool | str = setting(
        False,
        "true: score the samples of each check by the judges that are installed, and choose the "
        "best checkpoint by them; a size or folder: the same with this model of faster-whisper",
    )
    logging_steps: Steps = setting(1, "Steps between lines of the log")
    include_num_input_tokens_seen: bool | Literal["all", "non_padding", "no"] = setting(
        "non_padding", "Tokens counted for tokens/s and hours of audio: non_padding, all or no"
    )
    logging_nan_inf_filter: bool = setting(
        False, "Hide losses that are not finite from the log; they stop the run either way"
    )
    report_to: str | list[str] | None = setting(
        "tensorboard",
        "Trackers: tensorboard (in output_dir/runs, with the samples), wandb, trackio, … or none",
    )


class SpeakingSettings(Part):
    """Speaking"""

    seed: int = setting(3407, "Seed of training and of speaking", ge=0, lt=2**32)
    temperature: float = setting(0.6, "Sampling temperature; 0: greedy", ge=0, le=100)
    top_p: float = setting(0.95, "Nucleus sampling", ge=0.01, le=1)
    repetition_penalty: float = setting(
        1.1, "Penalty on tokens of the prompt and the audio so far; 1: off", ge=0.1, le=10
    )
    max_seconds: float = setting(20.0, "Longer speech is cut off, and reported", gt=0, le=3600)
    speak_batch_size: int = setting(
        8, "Texts, or candidates of one text, generated in one batch", gt=0, le=1024
    )
    best_of: int = setting(
        1, "Candidates generated for every text, of which the best is kept", gt=0, le=256
    )
    # sentencex takes any code; for a language it does not know it uses rules that many share
    language: str = setting(
        "en",
        "ISO code of the language whose rules split a text into sentences",
        pattern="^[a-z]{2,3}$",
    )
    cuda_graph: bool = setting(False, "Run each frame as one CUDA graph when speaking on a GPU")


# pydantic takes the fields of the last base first.
class Settings(
    SpeakingSettings,
    OutputSettings,
    TrainingSettings,
    MemorySettings,
    ModelSettings,
    RowSettings,
    DataSettings,
):
    """All settings of a run. Keys that are not declared above are TRL's SFTConfig's."""

    def flat(self) -> dict[str, Any]:
        """Return all keys and values in one dict."""
        return dict(self)

    @property
    def trainer(self) -> dict[str, Any]:
        """The settings that SFTConfig has, too."""
        return {name: value for name, value in self if name in trainer_keys()}


PARTS = Settings.__bases__[::-1]
SPEAKING = list(SpeakingSettings.model_fields)
RUN_KEYS = ["codec", *SPEAKING]  # that infer.py takes
PATHS = [name for name, f in Settings.model_fields.items() if f.json_schema_extra["path"]]


@cache
def trainer_keys() -> set[str]:
    """Return the names of SFTConfig's keys.

    They are read from its source and that of its bases: to import it takes seconds, and has to
    come after unsloth's import.
    """
    files = {
        "trl": ["trainer/sft_config.py", "trainer/base_config.py"],
        "transformers": ["training_args.py"],
    }
    paths = [Path(find_spec(name).origin).parent / f for name in files for f in files[name]]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    return {name for text in sources for name in re.findall(r"^    (\w+): .*(?: = |$)", text, re.M)}


# ---------------------------------------------------------------- names

# Names that other tools have for keys.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "load_in_4bit": 'weights "4bit"',
}
# SFTConfig's keys that a run sets itself, or that would do nothing.
REFUSED = {
    "packing padding_free pad_to_multiple_of": "it follows from batching",
    "use_cpu": "a GPU is used if there is one",
    "resume_from_checkpoint ignore_data_skip": "--resume continues from the last checkpoint in "
    "output_dir",
    "push_to_hub hub_*": "`hf upload you/anna outputs/anna` publishes a finished run",
    "*eval* do_*": "sample_steps sets when a run is evaluated, held_out on what",
    "load_best_model_at_end metric_for_best_model greater_is_better": "the best checkpoint is "
    "always kept, and checks.csv names it",
    "dataset_* shuffle_dataset truncation_mode *_only_loss chat_template_path eos_token pad_token "
    "train_sampling_strategy": "the rows come tokenised, ordered and labelled from the dataset",
    "model_init_kwargs trust_remote_code": "weights and device_map set how the base is loaded",
    "parallelism_config": "device_map, torchrun and fsdp use several GPUs",
}


def nearest(name: str, known) -> str:
    """Return a hint at the one of the `known` names that is most like `name`."""
    if name in ALIASES:
        return f"use {ALIASES[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"the nearest is {near[0]!r}" if near else "--help lists them"


def check_name(name: str, source: str) -> None:
    """Raises: UserError for a key that nothing has, or that cannot be set."""
    if name in Settings.model_fields:
        return
    if name not in trainer_keys():
        hint = nearest(name, [*Settings.model_fields, *sorted(trainer_keys())])
        raise UserError(f"{source}: no key is named {name!r}; {hint}")
    for patterns, reason in REFUSED.items():
        if any(fnmatch(name, pattern) for pattern in patterns.split()):
            raise UserError(f"{source}: {name} cannot be set, leave it out: {reason}")


# ---------------------------------------------------------------- values


def read_settings(
    config: str | Path | None = None, overrides: dict | None = None, saved: bool = False
) -> Settings:
    """Return the settings of a config file, and of the command line over it.

    Args:
        config: the file that stands in for the project's own config.json, which may be missing.
        overrides: the command line's keys, with their values or the words for them.
        saved: the file was written by a run, which had checked the names in it.

    Raises:
        UserError: for a file that cannot be read, an unknown key or a wrong value.
    """
    file = Path(config or ROOT / "config.json")
    given = read_json(file) if config or file.exists() else {}
    words = {name: parse_word(word) for name, word in (overrides or {}).items()}
    sources = dict.fromkeys(given, str(file)) | dict.fromkeys(words, COMMAND_LINE)
    for name, source in sources.items():
        if not saved or source == COMMAND_LINE:
            check_name(name, source)
    given.setdefault("dataset", Settings.model_fields["dataset"].default)  # this one is a path
    for name in given.keys() & set(PATHS):
        given[name] = find_path(given[name], file)
    return parse(Settings, given | words, sources)


def parse_word(word: Any) -> Any:
    """Return a word of the command line as JSON, but strings and numbers as the word itself."""
    try:
        value = json.loads(word)
    except (TypeError, ValueError):
        return word
    return value if value is None or isinstance(value, bool | list | dict) else word


def parse(model: type[BaseModel], values: dict[str, Any], sources: dict[str, str]) -> BaseModel:
    """Return `values` as a `model` has them.

    Raises: UserError with the key's name, source and default.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        name = errors[0]["loc"][0]
        reasons = dict.fromkeys(e["msg"] for e in errors if e["loc"][0] == name)
        wrong = json.dumps(values[name], ensure_ascii=False)[:80]
        field = model.model_fields[name]
        default = "" if field.is_required() else json.dumps(field.default)
        usual = (
            f"; the default is {default}" if 0 < len(default) < 60 else ""
        )  # sample_texts' is long
        message = f"{sources[name]}: {name} is {wrong}: {' or '.join(reasons)}{usual}"
        raise UserError(message) from error


def parse_trainer_keys(settings: Settings, hints: dict[str, Any]) -> Settings:
    """Return the settings with the keys that only SFTConfig has in its types, which are `hints`.

    Raises: UserError for a value of another type.
    """
    given = settings.model_extra
    fields = {name: (hints[name], ...) for name in given}
    model = create_model("SFTConfig", __config__=ConfigDict(allow_inf_nan=False), **fields)
    return settings.replace(**dict(parse(model, given, dict.fromkeys(given, "settings"))))


def find_path(path: Any, config: Path) -> Any:
    """Return a config's path from the current folder, else from the config's, else from ROOT."""
    folders = ("", config.parent, ROOT) if isinstance(path, str) else ()
    return next((p for f in folders if os.path.exists(p := os.path.join(f, path))), path)


# ---------------------------------------------------------------- files


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file.

    Raises: UserError if it cannot be read, or has another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16" if utf_16 else f"another encoding ({error})"
        message = f"{path}: cannot be read as UTF-8: it is {kind}; save it as UTF-8"
        raise UserError(message) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises: UserError if it cannot be read, is none, or repeats a key.
    """

    def unique(pairs):
        if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
            raise UserError(f"{path}: the key {twice[0]!r} is there twice; remove one")
        return dict(pairs)

    try:
        values = json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be one JSON object of keys and values")
    return values


# ---------------------------------------------------------------- how a script ends

# Parts of the messages of torch, cuBLAS and cuDNN, and Unsloth's loss, whose errors have only
# RuntimeError in common.
OUT_OF_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED", "negligible GPU memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU's memory is full."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def run(main):
    """Calls `main`; a UserError becomes one line and exit code 2, Ctrl-C one line and 130."""
    sys.stdout.reconfigure(line_buffering=True)  # so that a log or a pipe shows each line at once
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
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = "the GPU's memory is full: README, Out of memory, says what to change first"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def quiet_libraries():
    """Keeps what libraries print to standard output off the console, unless an error passes."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def first_reason(error: Exception) -> str:
    """The first line of an exception's message, and the second where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    if not lines or not isinstance(error, OSError | RuntimeError | ValueError):
        lines = [f"{type(error).__name__} {' '.join(lines)}".strip()]  # KeyError: 'weight_map'
    return textwrap.shorten(lines[0], 200, placeholder=" …")
