"""Reading settings from config.json, --config and the command line; the error of user mistakes."""

import ast
import contextlib
import difflib
import io
import json
import logging
import os
import signal
import sys
import textwrap
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from orpheus.keys import ALIASES, REFUSED, TRAINER_TYPES, Settings

# bitsandbytes warns that an optional package is missing, which would make 4-bit a bit faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Unsloth's banner at the start of training says once more what our lines say.
BANNER = "Unsloth - 2x faster free finetuning"
logging.getLogger("transformers.trainer").addFilter(lambda r: BANNER not in r.getMessage())

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = "command line"
SPEAKING = ("temperature", "top_p", "repetition_penalty", "max_seconds", "speak_batch_size")
SPEAKING += ("best_of", "cuda_graph", "language")
RUN_KEYS = ("codec", "seed", *SPEAKING)  # that infer.py takes
PATHS = ("model", "codec", "dataset")  # in a config they may be relative to its folder
# TRL's SFTConfig and its bases, by the files that define them.
SFTCONFIG_SOURCES = {
    "trl/trainer/sft_config.py": "SFTConfig",
    "trl/trainer/base_config.py": "_BaseConfig",
    "transformers/training_args.py": "TrainingArguments",
}


class UserError(ValueError):
    """A mistake that the user can correct: what, where and the remedy, in one line."""

    def __init__(self, message: str):
        lines = map(str.strip, message.splitlines())  # a file's name or an error may have several
        super().__init__(" ".join(line for line in lines if line))


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


def parse_json(word: str) -> Any:
    """A word of the command line as JSON; a string, and what is not JSON, as the word itself."""
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        return word
    return word if isinstance(value, str) else value


def validate(name: str, value: Any, hint: Any, source: str, default: Any = ...) -> Any:
    """`value` as the type `hint` has it; `UserError` with the key's name, source and `default`.

    A string from the command line may be JSON, a bare word such as True, or a name like 7. So may
    one of "settings", whose type was not known when it was read.
    """
    readings = [(value, True)]  # and whether the type must match exactly
    if source in (COMMAND_LINE, "settings") and isinstance(value, str):
        parsed = parse_json(value)
        readings = [(parsed, not isinstance(parsed, str))]
        readings += [(value, True)] if parsed is not None else []
    adapter = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    errors = []
    for reading, strict in readings:
        try:
            result = adapter.validate_json(json.dumps(reading), strict=strict)
        except ValidationError as error:
            errors += [error.errors()]
        else:
            check_strings(name, result, source)
            return result
    message = " or ".join(dict.fromkeys(error["msg"] for error in errors[0]))
    known = "" if default in (..., value) else json.dumps(default)
    usual = f"; the default is {known}" if 0 < len(known) < 60 else ""  # sample_texts are longer
    raise UserError(f"{source}: {name} is {json.dumps(value)[:80]}: {message}{usual}")


def check_strings(name: str, value: Any, source: str) -> None:
    """`UserError` for a NUL byte, for broken UTF-8, and for an empty string in config.json's keys.

    `value` may be a string, a list of strings, or anything else, which passes.
    """
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if "\0" in text:
            raise UserError(f"{source}: {name} holds a NUL byte; remove it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{source}: {name} is {text[:80]!r}: not valid UTF-8") from None
        if name in Settings.model_fields and not text.strip():
            what = f"{name}: the text" if isinstance(value, list) else name
            raise UserError(f"{source}: {what} is empty; give one, or leave it out")


def trainer_keys() -> set[str]:
    """The names of SFTConfig's keys, read from its source.

    Importing the class would take seconds, and unsloth has to be imported before it.
    """
    names = set()
    for source, class_name in SFTCONFIG_SOURCES.items():
        package, _, path = source.partition("/")
        folder = Path(find_spec(package).submodule_search_locations[0])
        for node in ast.parse((folder / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                names |= {field.target.id for field in fields}
    return {name for name in names if not name.startswith("_")}


def check_name(name: str, source: str) -> None:
    """`UserError` for a key that neither this project nor SFTConfig has, or that is not taken."""
    if name in REFUSED:
        raise UserError(f"{source}: {name} cannot be set, leave it out: {REFUSED[name]}")
    known = [*Settings.model_fields, *sorted(trainer_keys())]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"the nearest is {near[0]!r}" if near else "--help lists them"
        hint = f"use {ALIASES[name]}" if name in ALIASES else hint
        raise UserError(f"{source}: no key is named {name[:80]!r}; {hint}")


def check_regular(path: str | Path) -> None:
    """`UserError` for a folder, pipe or device: reading one could wait or go on forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be read: not a regular file")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; `UserError` if it cannot be read, or has another encoding."""
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` if it cannot be read, is none, or repeats a key."""

    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{path}: the key {twice[:80]!r} is there twice; remove one")
        return values

    try:
        values = json.loads(read_text(path), object_pairs_hook=unique)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path}: not JSON of keys and values: nested too deep") from None
    except ValueError as error:  # bad syntax, or a number of thousands of digits
        raise UserError(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be one JSON object of keys and values")
    return values


def find_path(path: str, config: str) -> str:
    """A path in a config: from the current folder, else from the config's, else from this one.

    Only for what is read. output_dir and cache_dir, which are written, are always relative to the
    current folder.
    """
    folders = ("", Path(config).parent, ROOT)
    return next((p for f in folders if os.path.exists(p := os.path.join(f, path))), path)


def read_settings(
    config: str | Path | None = None, overrides: dict | None = None, saved: bool = False
) -> Settings:
    """config.json, then `config` over it, then the command line's `--key value` over both.

    `saved`: `config` was saved by a run, which checked the names in it. Raises `UserError`.
    """
    defaults = read_json(ROOT / "config.json")
    layers = [(str(ROOT / "config.json"), defaults)]
    layers += [(str(config), read_json(Path(config)))] if config is not None else []
    layers += [(COMMAND_LINE, overrides or {})]
    values = {}
    for source, layer in layers:
        for name, value in layer.items():
            if name in Settings.model_fields:
                hint = Settings.model_fields[name].rebuild_annotation()
                value = validate(name, value, hint, source, defaults.get(name, ...))
                in_config = name in PATHS and source != COMMAND_LINE
                value = find_path(value, source) if in_config else value
            elif name in TRAINER_TYPES:
                value = validate(name, value, TRAINER_TYPES[name], source)
            elif not saved:
                check_name(name, source)
            values[name] = value
    if missing := [name for name in Settings.model_fields if name not in values]:
        raise UserError(f"{layers[0][0]}: lacks {', '.join(missing)}; it must contain every key")
    return Settings.model_construct(**values)


def first_reason(error: Exception) -> str:
    """The first line of an exception's message, and the second where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    if not lines or not isinstance(error, OSError | RuntimeError | ValueError):
        lines = [f"{type(error).__name__} {' '.join(lines)}".strip()]  # KeyError: 'weight_map'
    return textwrap.shorten(lines[0], 200, placeholder=" …")
