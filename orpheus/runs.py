"""What a run's folder holds: saved settings and report, checkpoints, what may change on resume."""

import contextlib
import json
import os
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from orpheus.files import write_text
from orpheus.hub import absolute_path_or_hub_id, check_weights
from orpheus.settings import PATHS, SPEAKING, Settings, UserError, read_json

SAVED_CONFIG = "finetune_config.json"  # the resolved settings of a run, beside its adapter
SAVED_REPORT = "data_report.json"  # what the run was trained on: its voices, among others
PREVIOUS = ".previous_run"  # where finetune.py --overwrite keeps a run until the new one saves
RANK = int(os.environ.get("RANK", 0))  # set by torchrun, and by accelerate
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# On resume only the run length, logging, saving and sampling keys may change.
CHANGEABLE = {"max_steps", "num_train_epochs", "output_dir", "overwrite", "resume", "report_to"}
CHANGEABLE |= {"cache_dir", "sample_steps", "sample_texts", "judge_samples", "plan", "fit"}
CHANGEABLE |= set(SPEAKING) - {"seed"}
CHANGEABLE_PREFIXES = ("logging_", "save_")
DISK_FULL = ("No space left", "File too large", "quota exceeded", "inline_container")


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint in `out`."""
    checkpoints = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for path in sorted(checkpoints, key=lambda path: int(path.name[11:]), reverse=True):
        if is_complete(path):
            return path
        print(f"{path} is incomplete or damaged: passed over")
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's weights, tensors and state, which is written last, can be read."""
    try:
        step = read_json(checkpoint / "trainer_state.json").get("global_step")
        if not any(checkpoint.glob("pytorch_model*")):  # as FSDP writes them
            check_weights(checkpoint)
    except UserError:
        return False
    return isinstance(step, int) and all(map(zipfile.is_zipfile, checkpoint.glob("*.pt*")))


def python_command() -> str:
    """The Python in use, as a person in this folder would call it."""
    return sys.executable.removeprefix(os.getcwd() + os.sep)


def resume_command(settings: Settings) -> str:
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORLD_SIZE)]
    ranks = ranks if WORLD_SIZE > 1 else []
    resume = [] if settings.resume else ["--resume"]
    return shlex.join([python_command(), *ranks, *sys.argv, *resume])


def resolve_paths(settings: Settings) -> dict:
    """The flat settings as they are saved, with paths that hold from any folder."""
    paths = {name: absolute_path_or_hub_id(getattr(settings, name)) for name in PATHS}
    return settings.flat() | paths | {"overwrite": False, "resume": False}


def save_config(settings: Settings) -> None:
    """Saves the settings; before the first step, because checkpoints need them, too."""
    path = Path(settings.output_dir) / SAVED_CONFIG
    write_text(path, json.dumps(resolve_paths(settings), indent=2, ensure_ascii=False) + "\n")


def check_resumed(settings: Settings, digest: str) -> None:
    """`UserError` if the run to continue had other settings, or rows of another digest."""
    out = Path(settings.output_dir)
    saved, now = read_json(out / SAVED_CONFIG), resolve_paths(settings)
    changes = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in sorted((saved.keys() | now.keys()) - CHANGEABLE)
        if saved.get(name) != now.get(name) and not name.startswith(CHANGEABLE_PREFIXES)
    ]
    if read_json(out / SAVED_REPORT).get("digest") != digest:
        changes.append("the training data has changed")
    if changes:
        raise UserError(f"{out}: cannot resume: {'; '.join(changes)}; --overwrite starts anew")


@contextlib.contextmanager
def reporting_full_disk(out: Path, progress: Callable[[], str]) -> Iterator[None]:
    """A disk that fills up while something is saved becomes a `UserError` with the remedy.

    `progress` says how far the run is. torch, safetensors and the system raise different errors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not any(phrase in str(error) for phrase in DISK_FULL):
            raise
        message = f"{progress()}: {out} cannot be written, its disk is full: free some of it"
        checkpoint = last_checkpoint(out) or "none yet"
        raise UserError(f"{message}, then --resume; last checkpoint: {checkpoint}") from None
