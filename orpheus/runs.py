"""What a run's folder holds: saved settings and report, checkpoints, what may change on resume."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from orpheus.audio import write_text
from orpheus.hub import absolute_path_or_hub_id, check_weights, is_hub_id, is_model
from orpheus.settings import SPEAKING, Settings, UserError, read_json

SAVED_CONFIG = "finetune_config.json"  # the resolved settings of a run, beside its adapter
PREVIOUS = ".previous_run"  # where finetune.py --overwrite keeps a run until the new one saves
SAVED_REPORT = "data_report.json"  # what the run was trained on: its voices, among others


def base_name(settings: Settings) -> str:
    """The base as a model card names it: its hub id, or the name of its folder."""
    return settings.model if is_hub_id(settings.model) else Path(settings.model).name


def model_card(settings: Settings, title: str, library: str, body: str) -> str:
    """README.md of a run or a merged model: metadata for the hub, a title, and `body` (Markdown).

    `library` is what loads it: "peft" or "transformers".
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=settings.model if is_hub_id(settings.model) else None,
        library_name=library,
        pipeline_tag="text-to-speech",
        tags=["orpheus"],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n"))


RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
MANIFEST = "finetune_files.json"  # lists what a run made in output_dir
PREVIOUS, MOVING = PREVIOUS, ".previous_run.part"  # a replaced run, and one being moved
# Everything that a run may write into output_dir, for runs from before there was a manifest.
RUN_FILES = re.compile(
    r"checkpoint-[0-9]+|samples/step-[0-9]{6,}|runs/[A-Z][a-z]{2}[0-9]{2}_[0-9-]{8}_.+|checks\.csv"
    r"|finetune_(config|files)\.json|data_report\.json|adapter_(config\.json|model\.safetensors)"
    r"|(generation_)?config\.json|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|chat_template\.jinja"
)


@contextlib.contextmanager
def output_lock(settings: Settings):
    """Keeps output_dir to this process. `UserError` where it is in use, or cannot be written to.

    The kernel gives the lock back when the process ends, however it ends.
    """
    if RANK:  # the first rank holds it for all
        yield
        return
    out = check_place(settings)
    path = out / ".finetune.lock"
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            lock_file(file)
            stack.callback(path.unlink, missing_ok=True)
            path.write_bytes(b"%-4096d" % os.getpid())  # fails where the disk is full
        except BlockingIOError:
            file.seek(0)
            told = f"another run (process {file.read().strip()}) is writing to {out}"
            raise UserError(f"{told}: wait for it, or choose another --output_dir") from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{out}: cannot be written: {reason}; try --output_dir") from None
        yield


def lock_file(file) -> None:
    """Locks an open file, without waiting. BlockingIOError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems
        print(f"{file.name}: no locks here ({error.strerror}): start no second run in this folder")


def check_place(settings: Settings) -> Path:
    """output_dir. `UserError` where it is, or holds, what the run reads."""
    out = Path(os.path.realpath(settings.output_dir))
    for name in ("dataset", "model", "codec"):
        given = getattr(settings, name)
        source = Path(os.path.realpath(given)) if os.path.exists(given) else None
        if source and out in (source, *source.parents):
            holds = "is" if out == source else "holds"
            told = f"output_dir {settings.output_dir} {holds} the {name} {given}"
            raise UserError(f"{told}: choose another --output_dir")
    return Path(settings.output_dir)


def run_files(out: Path) -> list[Path]:
    """What stands in `out` under a name that a run would give."""
    paths = [path for folder in (out, out / "samples", out / "runs") for path in folder.glob("*")]
    return [path for path in paths if RUN_FILES.fullmatch(str(path.relative_to(out)))]


def owned_files(out: Path) -> list[Path]:
    """The files and folders in `out` that runs made, by the manifest."""
    path = out / MANIFEST
    if not path.is_file():
        return run_files(out) if (out / SAVED_CONFIG).is_file() else []
    names = read_json(path).get("files")
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    parts = [Path(name).parts for name in names] if listed else [()]
    if not all(part and part[0] != "/" and ".." not in part for part in parts):
        raise UserError(f"{path}: must list files of this folder; choose another --output_dir")
    return [out / name for name in names if os.path.lexists(out / name)]


def record_files(out: Path, *names: str) -> None:
    """Adds to the manifest, before they are made, what a run is about to make."""
    known = {str(path.relative_to(out)) for path in owned_files(out)}
    text = json.dumps({"files": sorted(known | {MANIFEST, *names})}, indent=2) + "\n"
    write_text(out / MANIFEST, text)


def set_aside(out: Path) -> None:
    """Moves the run in `out` to a hidden folder there."""
    for path in owned_files(out):
        target = out / MOVING / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        with contextlib.suppress(OSError):  # samples, runs: where they are empty now
            path.parent.rmdir()
    if (out / MOVING).is_dir():
        os.replace(out / MOVING, out / PREVIOUS)


def settle_previous(out: Path) -> None:
    """Puts a run that was set aside back, unless the one that replaces it has saved something.

    At the end of a run, and at the start of the next one, in case this one was killed.
    """
    if (out / PREVIOUS).is_dir():
        if is_model(out) or last_checkpoint(out):
            shutil.rmtree(out / PREVIOUS)
            return
        for path in owned_files(out):
            remove(path)
        os.replace(out / PREVIOUS, out / MOVING)
    if (out / MOVING).is_dir():
        move_into(out / MOVING, out)
        print(f"{out} holds the earlier run again: the new one ended before it had saved anything")


def move_into(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_dir() and (target / path.name).is_dir():
            move_into(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def previous_run(settings: Settings):
    """With `overwrite`, sets the run in output_dir aside until the new one has saved something."""
    out = Path(settings.output_dir)
    if RANK or settings.resume or not settings.overwrite:
        yield
        return
    try:
        with writing(out):
            set_aside(out)
        yield
    finally:
        with writing(out):
            settle_previous(out)


@contextlib.contextmanager
def writing(out: Path):
    """A file of `out` that cannot be moved or removed becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None


def check_output(settings: Settings) -> Path | None:
    """The checkpoint to go on from. `UserError` where a run or the user's files would be lost."""
    out = Path(settings.output_dir)
    if RANK:  # the first rank looks for all
        if settings.resume and is_model(out):  # it ends, too
            sys.exit(0)
        return None
    with writing(out):
        settle_previous(out)
    made = owned_files(out)
    for path in run_files(out):
        # The doctor writes a report before there is a run, TensorBoard's folders are always new.
        harmless = path.name == SAVED_REPORT or path.parent.name == "runs"
        resumed = settings.resume and path.name.startswith("checkpoint-")
        if path not in made and not harmless and not resumed:
            told = f"{path}: finetune.py did not make it, and a run would replace it"
            raise UserError(f"{told}: choose another --output_dir")
    for path in (out / "samples", out / "runs"):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; a run needs a folder there: try --output_dir")
    finished, checkpoint = is_model(out), last_checkpoint(out)
    if settings.resume:
        if finished:
            print(f"{out} holds a finished run: nothing to resume (--overwrite starts anew)")
            sys.exit(0)
        if checkpoint is None:
            print(f"{out} holds no checkpoint: starting from the beginning")
        return checkpoint
    if not settings.overwrite and (finished or checkpoint):
        what = "a finished run:" if finished else "an unfinished run: --resume goes on,"
        raise UserError(f"{out} holds {what} --overwrite replaces it, --output_dir goes elsewhere")
    return None


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    checkpoints = [p for p in out.glob("checkpoint-*") if p.name[11:].isdecimal()]
    for path in sorted(checkpoints, key=lambda p: int(p.name[11:]), reverse=True):
        if is_whole(path):
            return path
        print(f"{path} is incomplete or damaged: passed over")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read: its state, which is written last, weights and tensors."""
    try:
        step = read_json(checkpoint / "trainer_state.json").get("global_step")
        if not any(checkpoint.glob("pytorch_model*")):  # as FSDP writes them
            check_weights(checkpoint)
    except UserError:
        return False
    return isinstance(step, int) and all(map(zipfile.is_zipfile, checkpoint.glob("*.pt*")))


# On resume only the run length, logging, saving and sampling keys may change.
FREE_KEYS = ("max_steps", "num_train_epochs", "output_dir", "overwrite", "resume", "report_to")
FREE_KEYS += ("cache_dir", "sample_steps", "sample_texts", "plan", "fit", *SPEAKING)
FREE_PARTS = ("logging_", "save_", "eval_")


def check_resumed(settings: Settings, digest: str) -> None:
    """`UserError` where the run to go on with had other settings or other rows."""
    out = Path(settings.output_dir)
    then, now = read_json(out / SAVED_CONFIG), resolved(settings)
    changed = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
        and name not in FREE_KEYS
        and not name.startswith(FREE_PARTS)
    ]
    if read_json(out / SAVED_REPORT).get("digest") != digest:
        changed.append("the rows are others")
    if changed:
        raise UserError(f"{out}: cannot resume: {'; '.join(changed)}; --overwrite starts anew")


DISK_FULL = ("No space left", "File too large", "quota exceeded", "inline_container")


@contextlib.contextmanager
def disk_watched(out: Path, where):
    """A full disk while something is saved becomes one line that says what is left, and what to do.

    torch, safetensors and the system each have an exception of their own for it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not any(word in str(error) for word in DISK_FULL):
            raise
        left = f"last checkpoint: {last_checkpoint(out) or 'none yet'}"
        told = f"{where()}: {out} cannot be written, its disk is full: free some, then --resume"
        raise UserError(f"{told}; {left}") from None


def resolved(settings: Settings) -> dict:
    """The settings as they are saved: with paths that hold from any folder."""
    names = ("model", "codec", "dataset")
    paths = {name: absolute_path_or_hub_id(getattr(settings, name)) for name in names}
    return settings.flat() | paths | {"overwrite": False, "resume": False}


def save_config(settings: Settings) -> None:
    """Before the first step, since a checkpoint needs them as much as the adapter does."""
    path = Path(settings.output_dir) / SAVED_CONFIG
    write_text(path, json.dumps(resolved(settings), indent=2, ensure_ascii=False) + "\n")
