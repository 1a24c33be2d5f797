"""Keeps output_dir safe: one run at a time, no file of the user lost, an earlier run kept."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from orpheus.cards import base_name, card_sections, find_sample, model_card
from orpheus.files import write_text
from orpheus.hub import is_model
from orpheus.runs import PREVIOUS, RANK, last_checkpoint
from orpheus.settings import PATHS, Settings, UserError, read_json

MANIFEST = "finetune_files.json"  # lists the files and folders that runs made in output_dir
MOVING = ".previous_run.part"  # an earlier run that is being moved to PREVIOUS, or back
# What a run would replace, or remove: transformers rotates all folders named checkpoint-*. The
# other files of a run have new names, or are written only if there are none.
RUN_FILES = re.compile(
    r"checkpoint-.*|samples/step-[0-9]+|checks\.csv|finetune_config\.json"
    r"|adapter_(config\.json|model\.safetensors)|(generation_)?config\.json"
    r"|model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|chat_template\.jinja"
)
# Of these, what --resume may find without a manifest, as in a copy of parts of a run.
RESUMABLE = re.compile(r"checkpoint-[0-9]+|finetune_config\.json")


@contextlib.contextmanager
def output_lock(settings: Settings) -> Iterator[None]:
    """Keeps output_dir to this process; `UserError` if it is in use or cannot be written to.

    The kernel releases the lock when the process ends, however it ends.
    """
    if RANK:  # the first rank holds it for all
        yield
        return
    out = check_location(settings)
    path = out / ".finetune.lock"
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            lock_file(file)
            stack.callback(path.unlink, missing_ok=True)
            path.write_bytes(b"%-4096d" % os.getpid())  # fails if the disk is full
        except BlockingIOError:
            file.seek(0)
            message = f"another run (process {file.read().strip()}) is writing to {out}"
            raise UserError(f"{message}: wait for it, or choose another --output_dir") from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{out}: cannot be written: {reason}; try --output_dir") from None
        yield


def lock_file(file) -> None:
    """Locks an open file without waiting; BlockingIOError if another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems
        warning = f"no locks here ({error.strerror}): start no second run in this folder"
        print(f"{file.name}: {warning}")
        return
    if os.fstat(file.fileno()).st_nlink == 0:  # a run that has just ended has removed the file
        raise BlockingIOError


def check_location(settings: Settings) -> Path:
    """output_dir; `UserError` if it is or contains the dataset, the base or the codec."""
    out = Path(os.path.realpath(settings.output_dir))
    for name in PATHS:
        path = getattr(settings, name)
        source = Path(os.path.realpath(path)) if os.path.exists(path) else None
        if source and out in (source, *source.parents):
            verb = "is" if out == source else "holds"
            message = f"output_dir {settings.output_dir} {verb} the {name} {path}"
            raise UserError(f"{message}: choose another --output_dir")
    return Path(settings.output_dir)


def owned_files(out: Path) -> list[Path]:
    """The files and folders in `out` that runs made, by the manifest, which comes last."""
    path = out / MANIFEST
    if not path.is_file():
        return []
    names = read_json(path).get("files")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    parts = [Path(name).parts for name in names] if is_list else [()]
    if not all(part and part[0] != "/" and ".." not in part for part in parts):
        raise UserError(f"{path}: must list files of this folder; choose another --output_dir")
    names = [*sorted(set(names) - {MANIFEST}), MANIFEST]
    return [out / name for name in names if os.path.lexists(out / name)]


def record_files(out: Path, *names: str) -> None:
    """Adds to the manifest what a run is about to make in `out`."""
    known = (str(path.relative_to(out)) for path in owned_files(out))
    text = json.dumps({"files": sorted({MANIFEST, *known, *names})}, indent=2) + "\n"
    write_text(out / MANIFEST, text)


def move_into(source: Path, target: Path) -> None:
    """Moves all that is in a folder into another, which may have folders of the same names."""
    for path in source.iterdir():
        if path.is_dir() and (target / path.name).is_dir():
            move_into(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


@contextlib.contextmanager
def previous_run(settings: Settings) -> Iterator[None]:
    """With `overwrite`, sets the run in output_dir aside until the new one has saved something."""
    out = Path(settings.output_dir)
    if RANK or settings.resume or not settings.overwrite:
        yield
        return
    try:
        with user_errors(out):
            set_aside(out)
        yield
    finally:
        with user_errors(out):
            finish_replacement(out)


def set_aside(out: Path) -> None:
    """Moves the run in `out` to the hidden folder PREVIOUS there, which is whole or not there."""
    for path in owned_files(out):
        target = out / MOVING / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    if (out / MOVING).is_dir():
        os.replace(out / MOVING, out / PREVIOUS)


def finish_replacement(out: Path) -> None:
    """Removes a run that was set aside if the new one has saved something; else moves it back.

    Called at the end of a run, and at the start of the next one in case that one was killed.
    """
    if (out / PREVIOUS).is_dir():
        if is_model(out) or last_checkpoint(out):
            shutil.rmtree(out / PREVIOUS)
            return
        for path in owned_files(out):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.replace(out / PREVIOUS, out / MOVING)
    if (out / MOVING).is_dir():
        move_into(out / MOVING, out)
        print(f"{out} holds the earlier run again: the new one ended before it had saved anything")


@contextlib.contextmanager
def user_errors(out: Path) -> Iterator[None]:
    """A file in `out` that cannot be moved or removed becomes a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None


def check_output(settings: Settings) -> Path | None:
    """The checkpoint to resume from, if any; `UserError` if a run or files would be lost."""
    out = Path(settings.output_dir)
    if RANK:  # the first rank checks for all
        if settings.resume and is_model(out):  # it ends, too
            sys.exit(0)
        return None
    with user_errors(out):
        finish_replacement(out)
    owned = owned_files(out)
    for path in sorted([*out.glob("*"), *out.glob("samples/*")]):
        name = str(path.relative_to(out))
        resumed = settings.resume and RESUMABLE.fullmatch(name)
        if RUN_FILES.fullmatch(name) and path not in owned and not resumed:
            message = f"{path}: finetune.py did not make it, and a run would replace or remove it"
            raise UserError(f"{message}: move it, or choose another --output_dir")
    for path in (out / "samples", out / "runs"):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; a run needs a folder there: try --output_dir")
    finished, checkpoint = is_model(out), last_checkpoint(out)
    if settings.resume:
        if finished:
            print(f"{out} holds a finished run: nothing to resume (--overwrite starts anew)")
            sys.exit(0)
        if checkpoint is None:
            missing = f"--resume found no complete checkpoint in {out}"
            print(f"warning  {missing}: training starts from the beginning")
        return checkpoint
    if not settings.overwrite and (finished or checkpoint):
        kind = "a finished run:" if finished else "an unfinished run: --resume continues it,"
        raise UserError(f"{out} holds {kind} --overwrite replaces it, --output_dir goes elsewhere")
    return None


def save_card(settings: Settings) -> None:
    """Writes README.md, a model card, from what is in the run's folder.

    A README.md that the user has put there is kept.
    """
    out = Path(settings.output_dir)
    path = out / "README.md"
    if os.path.lexists(path) and path not in owned_files(out):
        print(f"card     {path} was there before: kept, no model card written")
        return
    full, sample = settings.full_finetuning, find_sample(out)
    body = [
        f"{'Fine-tuned from' if full else 'A LoRA adapter for'} {base_name(settings)}, trained "
        "with orpheus-finetune.",
        *([f"[A sample]({sample.relative_to(out)}) from training."] if sample else []),
        f'```\npython infer.py "Hello there" --model {shlex.quote(str(out))}\n```',
        *card_sections(out, settings),
    ]
    record_files(out, path.name)
    library = "transformers" if full else "peft"
    write_text(path, model_card(settings, out.resolve().name, library, "\n\n".join(body)))
