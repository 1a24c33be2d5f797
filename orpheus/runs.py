"""A run's folder: who writes to it, what is saved there, how a run goes on, and its card."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import Any

from filelock import FileLock, Timeout

from orpheus.files import absolute_path_or_hub_id, check_weights, is_hub_id, is_model, write_text
from orpheus.settings import (
    PATHS,
    DataSettings,
    MemorySettings,
    OutputSettings,
    Settings,
    SpeakingSettings,
    UserError,
    read_json,
    read_settings,
    read_text,
    trainer_keys,
)

SAVED_CONFIG = "finetune_config.json"  # the resolved settings of a run, beside its adapter
SAVED_REPORT = "data_report.json"  # what the run was trained on: its voices, among others
SAMPLE = "sample.wav"  # that the card links to
LOCK = ".lock"
# What may lie in the folder of a new run: hidden files, and what an earlier try, the doctor or a
# shell left there.
HARMLESS = re.compile(r"\..*|.*\.(log|out)|runs|data_report\.(json|png)")
RANK = int(os.environ.get("RANK", 0))  # set by torchrun, and by accelerate
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# In the errors of the system, of torch and of safetensors, which have only Exception in common.
DISK_FULL = ("No space left", "File too large", "quota exceeded", "inline_container")
# What may change on resume. The digest of the rows stands for the data and the codec, and the rows
# of a step for how they are shared out.
CHANGEABLE = {"codec", "max_steps", "num_train_epochs", *OutputSettings.model_fields}
CHANGEABLE |= {*DataSettings.model_fields, *MemorySettings.model_fields} - {"weights"}
CHANGEABLE |= SpeakingSettings.model_fields.keys() - {"seed"}


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Make a folder and keep it to this process, until the end or until the process is killed.

    Raises:
        UserError: another run has the folder, or it cannot be written to.
    """
    lock = FileLock(os.path.realpath(out / LOCK))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOCK).touch()
    except OSError as error:
        message = f"{out}: cannot be written: {error.strerror}"
        raise UserError(f"{message}; try another --output_dir") from error
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"another run is writing to {out}"
        raise UserError(f"{message}: wait for it, or choose another --output_dir") from None
    except OSError as error:  # as on some network file systems
        print(f"warning  {out} cannot be locked ({error.strerror}): start no second run in it")
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def find_checkpoint(settings: Settings) -> Path | None:
    """Return the checkpoint from which the run in output_dir goes on; None: it begins.

    Raises:
        UserError: the folder holds a run, and neither `resume` nor `overwrite` is set; or it holds
            anything else.
    """
    out = Path(settings.output_dir)
    strange = [path.name for path in out.glob("*") if not HARMLESS.fullmatch(path.name)]
    if strange and not (out / SAVED_CONFIG).is_file():
        message = f"{out} holds {min(strange)}, and no run of finetune.py"
        raise UserError(f"{message}: choose another --output_dir, or move what is in it")
    if not holds_run(out) or (settings.overwrite and not settings.resume):
        return None
    checkpoint, finished = last_checkpoint(out), is_model(out)
    if settings.resume and (checkpoint or not finished):
        return checkpoint
    kind, more = "an unfinished run", f"`{command('--resume')}` continues it"
    if finished:
        saved = read_settings(out / SAVED_CONFIG, saved=True)
        name = "max_steps" if saved.max_steps > 0 else "num_train_epochs"
        longer = command("--resume", f"--{name}", f"{2 * getattr(saved, name):g}")
        kind, more = "a finished run", f"`{longer}` trains it longer"
    if not checkpoint:
        more = "it has no checkpoint to resume"
    anew = f"`{command('--overwrite')}` starts anew, and keeps this one"
    raise UserError(f"{out} holds {kind}: {more}; {anew}")


def holds_run(out: Path) -> bool:
    """Whether a folder has anything that a new run in it would replace."""
    return is_model(out) or any(out.glob("checkpoint-*"))


def set_aside(settings: Settings) -> None:
    """Rename the folder of the run that `overwrite` replaces, if there is one, and say so."""
    out = Path(settings.output_dir).resolve()
    if RANK or settings.resume or not settings.overwrite or not holds_run(out):
        return
    names = (out.with_name(f"{out.name}.old{n}") for n in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    here = os.getcwd()
    out.rename(kept)
    out.mkdir()
    os.chdir(here)  # which may have been the folder
    (kept / LOCK).rename(out / LOCK)  # this process still has it
    print(f"kept     the earlier run, as {kept}")


def python_command() -> str:
    """Return the Python in use, as a person in this folder would call it."""
    return sys.executable.removeprefix(os.getcwd() + os.sep)


def command(*options: str) -> str:
    """Return the command line of this process with more options, as a person would type it."""
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORLD_SIZE)]
    ranks = ranks if WORLD_SIZE > 1 else []
    more = options[options[0] in sys.argv :]
    return shlex.join([python_command(), *ranks, *sys.argv, *more])


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's folder."""
    paths = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.name[11:]), reverse=True):
        with contextlib.suppress(UserError):
            read_json(path / "trainer_state.json")  # which is written last
            if not any(path.glob("pytorch_model*")):  # as FSDP writes them
                check_weights(path)
            if all(map(zipfile.is_zipfile, path.glob("*.pt*"))):
                return path
        print(f"{path} is incomplete or damaged: passed over")
    return None


def is_finished(settings: Settings, checkpoint: Path) -> bool:
    """Whether the run of a checkpoint is saved, and was as long as the settings want it."""
    state = read_json(checkpoint / "trainer_state.json")
    long = state["epoch"] >= settings.num_train_epochs
    if settings.max_steps > 0:
        long = state["global_step"] >= settings.max_steps
    return is_model(checkpoint.parent) and long


def resolve_paths(settings: Settings) -> dict[str, Any]:
    """Return the flat settings as they are saved, with paths that hold from any folder."""
    paths = {name: absolute_path_or_hub_id(getattr(settings, name)) for name in PATHS}
    return settings.flat() | paths | {"overwrite": False, "resume": False}


def save_config(settings: Settings) -> None:
    """Save the settings; before the first step, because checkpoints need them, too."""
    path = Path(settings.output_dir) / SAVED_CONFIG
    write_text(path, json.dumps(resolve_paths(settings), indent=2, ensure_ascii=False) + "\n")


def check_resumed(settings: Settings, digest: str, checkpoint: Path) -> None:
    """Check that a run can go on from a checkpoint as it began.

    Raises:
        UserError: it had other settings, or rows of another digest; or its optimiser is missing.
    """
    out = Path(settings.output_dir)
    saved = read_settings(out / SAVED_CONFIG, saved=True)  # newer keys have their defaults
    before, now = resolve_paths(saved), resolve_paths(settings)
    known = (Settings.model_fields.keys() | trainer_keys()) - CHANGEABLE
    changes = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) & known)
        if before.get(name) != now.get(name) and not name.startswith(("logging_", "save_"))
    ]
    ranks = len([*checkpoint.glob("rng_state_*")]) or 1  # several save one each
    had, has = (
        run.per_device_train_batch_size * run.gradient_accumulation_steps * count
        for run, count in ((saved, ranks), (settings, WORLD_SIZE))
    )
    if had != has:
        steps = had * settings.gradient_accumulation_steps / has
        remedy = f"gradient_accumulation_steps {steps:g} keeps them"
        changes.append(f"a step had {had} rows, on {ranks} GPUs, and has {has} ({remedy})")
    if read_json(out / SAVED_REPORT).get("digest") != digest:
        changes.append("the training data has changed")
    if changes:
        raise UserError(f"{out}: cannot resume: {'; '.join(changes)}; --overwrite starts anew")
    complete = any(checkpoint.glob("optimizer*")) and (checkpoint / "scheduler.pt").is_file()
    if not complete and settings.resume != "weights":
        message = f"{checkpoint}: without optimizer.pt and scheduler.pt, both would start anew"
        raise UserError(f"{message}: copy them there, or if that is meant, give --resume weights")


@contextlib.contextmanager
def reporting_full_disk(out: Path, progress: Callable[[], str]) -> Iterator[None]:
    """Raise a `UserError` with the remedy where the disk fills up while something is saved.

    `progress` says how far the run is.
    """
    try:
        yield
    except Exception as error:
        if not any(phrase in str(error) for phrase in DISK_FULL):
            raise
        message = f"{progress()}: {out} cannot be written, its disk is full: free some of it"
        checkpoint = last_checkpoint(out) or "none yet"
        raise UserError(f"{message}, then --resume; last checkpoint: {checkpoint}") from error


def find_sample(home: Path) -> Path | None:
    """Return the first sample of a run's last check."""
    return max(home.glob("samples/step-*/01.wav"), default=None)


def model_card(home: Path, settings: Settings, name: str, merged: str = "") -> str:
    """Return the README.md of a run, or of its merged model, as the hub shows it.

    Args:
        home: the run's folder.
        name: of the model, on the hub.
        merged: what the comparison of a merged model with its adapter says.
    """
    report = read_json(home / SAVED_REPORT)
    adapter = not (merged or settings.full_finetuning)
    lora = f"a LoRA of rank {settings.lora_r} over {settings.weights} weights"
    values = {
        **settings.flat(),
        **report,
        "name": name,
        "base": settings.model if is_hub_id(settings.model) else Path(settings.model).name,
        "codec": settings.codec if is_hub_id(settings.codec) else Path(settings.codec).name,
        "kind": "A LoRA adapter for" if adapter else "Fine-tuned from",
        "library": "peft" if adapter else "transformers",
        "auto": "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM",
        "sample": f" [A sample]({SAMPLE}) from training." if find_sample(home) else "",
        "voice": next((f"{voice}: " for voice in report["voices"]), ""),
        "voices": ", ".join(report["voices"]) or "not named",
        "dataset": Path(report["dataset"]).name,
        "minutes": f"{report['seconds'] / 60:.1f}",
        "trained": "all weights" if settings.full_finetuning else lora,
        "merged": f" Merged: {merged}." if merged else "",
    }
    return Template(read_text(Path(__file__).with_name("card.md"))).substitute(values)


def save_card(settings: Settings) -> None:
    """Write README.md, a model card, and the sample that it links to; one that is there is kept."""
    out = Path(settings.output_dir)
    if sample := find_sample(out):
        shutil.copy(sample, out / SAMPLE)
    if not (out / "README.md").exists():
        write_text(out / "README.md", model_card(out, settings, out.resolve().name))
