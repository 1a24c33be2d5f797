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
    """Make a folder and keep it to this process, until it ends or is killed; or raise UserError."""
    lock = FileLock(os.path.realpath(out / LOCK))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        remedy = "wait for it, or choose another --output_dir"
        raise UserError(f"another run is writing to {out}: {remedy}") from None
    except OSError as error:
        if not os.path.exists(lock.lock_file):
            message = f"{out}: cannot be written: {error.strerror}; try another --output_dir"
            raise UserError(message) from error
        print(f"warning  {out} cannot be locked ({error.strerror}): start no second run in it")
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def find_checkpoint(settings: Settings) -> Path | None:
    """Return the checkpoint from which the run in output_dir goes on; None: it begins.

    Raises UserError if neither `resume` nor `overwrite` says so of a run, and for other files.
    """
    out = Path(settings.output_dir)
    strange = [path.name for path in out.glob("*") if not HARMLESS.fullmatch(path.name)]
    if strange and not (out / SAVED_CONFIG).is_file():
        message = f"{out} holds {min(strange)}, and no run of finetune.py"
        raise UserError(f"{message}: choose another --output_dir, or move what is in it")
    if settings.overwrite and not settings.resume:
        return None
    checkpoint, finished = last_checkpoint(out), is_model(out)
    nothing = not finished and not any(out.glob("checkpoint-*"))
    if nothing or (settings.resume and (checkpoint or not finished)):
        return checkpoint
    more = "it has no checkpoint to resume"
    if checkpoint and finished:
        steps = str(2 * int(checkpoint.name[11:]))
        more = f"`{command('--resume', '--max_steps', steps)}` trains it longer"
    elif checkpoint:
        more = f"`{command('--resume')}` continues it"
    kind = "a finished run" if finished else "an unfinished run"
    anew = f"`{command('--overwrite')}` starts anew, and keeps this one"
    raise UserError(f"{out} holds {kind}: {more}; {anew}")


def set_aside(settings: Settings) -> None:
    """Rename the folder of the run that `overwrite` replaces, if there is one, and say so."""
    out = Path(settings.output_dir).resolve()
    begun = is_model(out) or any(out.glob("checkpoint-*"))
    if RANK or settings.resume or not settings.overwrite or not begun:
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
    words = [*(ranks if WORLD_SIZE > 1 else []), *sys.argv, *options[options[0] in sys.argv :]]
    return shlex.join([python_command(), *words])


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
    """Return whether a checkpoint's run is saved, and was as long as the settings want it."""
    state = read_json(checkpoint / "trainer_state.json")
    long = state["epoch"] >= settings.num_train_epochs
    if settings.max_steps > 0:
        long = state["global_step"] >= settings.max_steps
    return long and is_model(checkpoint.parent)


def save_config(settings: Settings) -> None:
    """Save the settings, with paths that hold from any folder; before any checkpoint needs them."""
    paths = {name: absolute_path_or_hub_id(getattr(settings, name)) for name in PATHS}
    values = dict(settings) | paths | {"overwrite": False, "resume": False}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_text(Path(settings.output_dir) / SAVED_CONFIG, text)


def check_resumed(settings: Settings, digest: str, checkpoint: Path) -> None:
    """Raise UserError where a run cannot go on from a checkpoint as it began, with the reasons."""
    out = Path(settings.output_dir)
    saved = read_settings(out / SAVED_CONFIG, saved=True)  # newer keys have their defaults
    before, now = dict(saved), dict(settings)
    now["model"] = absolute_path_or_hub_id(settings.model)  # as it is saved
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
        keeps = f"gradient_accumulation_steps {settings.gradient_accumulation_steps * had / has:g}"
        changes.append(f"a step had {had} rows on {ranks} GPUs and has {has} ({keeps} keeps them)")
    if read_json(out / SAVED_REPORT).get("digest") != digest:
        changes.append("the training data has changed")
    if changes:
        raise UserError(f"{out}: cannot resume: {'; '.join(changes)}; --overwrite starts anew")
    complete = all(any(checkpoint.glob(name)) for name in ("optimizer*", "scheduler.pt"))
    if not complete and settings.resume != "weights":
        message = f"{checkpoint}: without optimizer.pt and scheduler.pt, both would start anew"
        raise UserError(f"{message}: copy them there, or if that is meant, give --resume weights")


@contextlib.contextmanager
def reporting_full_disk(out: Path, progress: Callable[[], str]) -> Iterator[None]:
    """Raise a `UserError` with the remedy, and how far the run is, where the disk fills up."""
    try:
        yield
    except Exception as error:
        if not any(phrase in str(error) for phrase in DISK_FULL):
            raise
        message = f"{progress()}: {out} cannot be written, its disk is full: free some of it, then"
        last = last_checkpoint(out) or "none yet"
        raise UserError(f"{message} --resume; last checkpoint: {last}") from error


def find_sample(home: Path) -> Path | None:
    """Return the first sample of a run's last check."""
    return max(home.glob("samples/step-*/01.wav"), default=None)


def model_card(home: Path, settings: Settings, name: str, merged: str = "") -> str:
    """Return the README.md of the run in `home`, as the hub shows it under `name`.

    For its merged model, `merged` is what the comparison with the adapter says.
    """
    report = read_json(home / SAVED_REPORT)
    adapter = not (merged or settings.full_finetuning)
    lora = f"a LoRA of rank {settings.lora_r} over {settings.weights} weights"
    values = {
        **dict(settings),
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
