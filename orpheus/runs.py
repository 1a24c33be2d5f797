"""What a run's folder holds: saved settings and report, checkpoints, what may change on resume."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orpheus.files import write_text
from orpheus.models import (
    MODEL_FILES,
    TOKENIZER_FILES,
    check_machine,
    check_weights,
    fetch,
    is_model,
    load_model,
    local,
    on_hub,
)
from orpheus.settings import RUN_KEYS, SPEAKING, Settings, UserError, read_json, read_settings

SAVED_CONFIG = "finetune_config.json"  # the resolved settings of a run, beside its adapter
SAVED_REPORT = "data_report.json"  # what the run was trained on: its voices, among others
PREVIOUS = ".previous_run"  # where finetune.py --overwrite keeps a run until the new one saves
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
# On resume only the run length, logging, saving and sampling keys may change.
CHANGEABLE = {"max_steps", "num_train_epochs", "output_dir", "overwrite", "resume", "report_to"}
CHANGEABLE |= {"cache_dir", "sample_steps", "sample_texts", "plan", "fit", *SPEAKING}
CHANGEABLE_PREFIXES = ("logging_", "save_", "eval_")
DISK_FULL = ("No space left", "File too large", "quota exceeded", "inline_container")


@dataclass
class RunInfo:
    """What speaks: a model's folder, and what finetune.py left beside it."""

    settings: Settings
    folder: Path | None = None  # --wav and --tokens need none
    voices: list[str] = dataclasses.field(default_factory=list)  # that it was trained on
    pace: float | None = None  # seconds a character of theirs
    home: Path | None = None  # where the run's settings and report are


def load_run_info(
    model: str | None, overrides: dict, patterns: list[str] = MODEL_FILES, config=None
) -> RunInfo:
    """The Run of --model; without it config.json's run, or its base.

    With no more than the tokenizer asked for (--wav, --tokens) there need be no folder.
    """
    plain = read_settings(config, overrides)
    chosen = read_json(Path(config)) if config else {}  # of these, the run keeps what made it
    if model is None:
        out = Path(plain.output_dir)
        made = is_model(out) or (out / PREVIOUS).is_dir()
        if not made and patterns is TOKENIZER_FILES:
            return RunInfo(plain)
        model = plain.output_dir if made else plain.model
        print(f"model    {model}" + ("" if made else ", the base: no run in output_dir yet"))
    if patterns is MODEL_FILES:
        check_machine(model)
    folder = fetch(model, patterns)
    for home in (folder, folder.resolve().parent):  # a checkpoint's run is its parent
        if (home / SAVED_CONFIG).is_file():
            voices, pace = read_report(home / SAVED_REPORT)
            settings = read_settings(home / SAVED_CONFIG, overrides, saved=True)
            named = "codec" not in overrides and "codec" not in chosen
            if named and not os.path.isdir(settings.codec) and not on_hub(settings.codec):
                place = f"{home / SAVED_CONFIG}: no folder {settings.codec}"
                raise UserError(f"{place}; correct codec there, or give --codec")
            spoken_with = {name: getattr(plain, name) for name in RUN_KEYS if name in chosen}
            settings = settings.replace(**spoken_with)
            return RunInfo(settings, folder, voices, pace, home)
    if (folder / PREVIOUS).is_dir():
        told = "the run that was to replace the one in it was killed"
        raise UserError(f"{folder}: {told}; finetune.py --resume puts the earlier one back")
    return RunInfo(plain, folder)


def read_report(path: Path) -> tuple[list[str], float | None]:
    """The voices of a run's data, and their seconds a character."""
    report = read_json(path)
    voices, sizes = report.get("voices"), [report.get(n, 0) for n in ("seconds", "characters")]
    if not isinstance(voices, dict) or not all(isinstance(size, int | float) for size in sizes):
        raise UserError(f"{path}: damaged: voices, seconds or characters")
    return list(voices), sizes[0] / sizes[1] if all(0 < size < math.inf for size in sizes) else None


def load_run(run: RunInfo):
    """(model, tokenizer) of a run, in the precision that it was trained in; prints which."""
    fp32 = run.settings.bf16 is False
    model, tokenizer = load_model(str(run.folder), run.settings.weights == "4bit", fp32=fp32)
    print(f"model    {run.folder}: {str(model.dtype).removeprefix('torch.')}")
    return model, tokenizer


def choose_voice(asked: str | None, run: RunInfo) -> str | None:
    """The voice asked for, or the run's first; `UserError` for one that it was not trained on."""
    if asked and run.voices and asked not in run.voices:
        raise UserError(f"--voice {asked}: {run.folder} was trained on {', '.join(run.voices)}")
    return asked or (run.voices[0] if run.voices else run.settings.voice)


def overrides(arguments: argparse.Namespace) -> dict[str, str]:
    given = {n: getattr(arguments, n) for n in RUN_KEYS if getattr(arguments, n) is not None}
    return given | ({"codec": local(given["codec"])} if "codec" in given else {})


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
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)] if RANKS > 1 else []
    resume = [] if settings.resume else ["--resume"]
    return shlex.join([python_command(), *ranks, *sys.argv, *resume])


def first_rank_first():
    """A context in which the first rank runs before the others: they find what it has written."""
    from accelerate import PartialState

    return PartialState().main_process_first() if RANKS > 1 else contextlib.nullcontext()


def resolve_paths(settings: Settings) -> dict:
    """The flat settings as they are saved, with paths that hold from any folder."""
    paths = {name: local(getattr(settings, name)) for name in ("model", "codec", "dataset")}
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
        changes.append("the rows are others")
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
