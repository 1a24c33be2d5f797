"""What speaks: a model's folder, and the settings, voices and pace that finetune.py left there."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from orpheus.hub import MODEL_FILES, TOKENIZER_FILES, fetch, is_hub_id, is_model
from orpheus.models import check_machine, device, load_model, training_dtype
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT, last_checkpoint
from orpheus.settings import RUN_KEYS, Settings, UserError, read_json, read_settings


@dataclass
class RunInfo:
    """A model's folder, and what finetune.py left beside it."""

    settings: Settings
    folder: Path | None = None  # None if only the codec is needed, and there is no run yet
    voices: list[str] = field(default_factory=list)  # that it was trained on
    pace: float | None = None  # seconds per character of those voices
    home: Path | None = None  # the folder of the run's settings and report; None without a run


def load_run_info(
    model: str | None, overrides: dict, patterns: list[str] = MODEL_FILES, config=None
) -> RunInfo:
    """The RunInfo of a folder or hub id; of None, that of config.json's run, else of its base.

    The settings are those of the run, then RUN_KEYS of the file `config`, then `overrides`. With
    TOKENIZER_FILES as `patterns`, as for decoding, there need be no folder. Raises `UserError`.
    """
    plain = read_settings(config, overrides)
    chosen = read_json(Path(config)) if config else {}
    if model is None:
        model = default_model(plain.output_dir, plain.model, patterns)
        if model is None:
            return RunInfo(plain)
    if patterns is MODEL_FILES:
        check_machine(model)
    folder = fetch(model, patterns)
    if not is_model(folder) and patterns is MODEL_FILES:
        remedy = "give a finished run, a checkpoint or a model"
        if checkpoint := last_checkpoint(folder):
            remedy = f"give {checkpoint}, or finish the run with finetune.py --resume"
        raise UserError(f"{folder}: no adapter or model in it; {remedy}")
    for home in (folder, folder.resolve().parent):  # a checkpoint's run is its parent
        if (home / SAVED_CONFIG).is_file():
            voices, pace = read_report(home / SAVED_REPORT)
            settings = read_settings(home / SAVED_CONFIG, overrides, saved=True)
            if "codec" not in overrides and "codec" not in chosen:
                check_codec(settings.codec, home / SAVED_CONFIG)
            changes = {name: getattr(plain, name) for name in RUN_KEYS if name in chosen}
            return RunInfo(settings.replace(**changes), folder, voices, pace, home)
    return RunInfo(plain, folder)


def default_model(output_dir: str, base: str, patterns: list[str]) -> str | None:
    """output_dir if it holds a run, otherwise `base`; None if only a run's tokenizer is wanted."""
    out = Path(output_dir)
    trained = is_model(out)
    if not trained and patterns is TOKENIZER_FILES:
        return None
    print(f"model    {output_dir if trained else f'{base}, the base: no run in output_dir yet'}")
    return output_dir if trained else base


def check_codec(codec: str, config: Path) -> None:
    """`UserError` if the codec that a run's settings name is gone."""
    if not os.path.isdir(codec) and not is_hub_id(codec):
        raise UserError(f"{config}: no folder {codec}; correct codec there, or give --codec")


def read_report(path: Path) -> tuple[list[str], float | None]:
    """The voices in a run's data report, and their seconds per character, if it has any."""
    report = read_json(path)
    voices, sizes = report.get("voices"), [report.get(n, 0) for n in ("seconds", "characters")]
    if not isinstance(voices, dict) or not all(isinstance(size, int | float) for size in sizes):
        raise UserError(f"{path}: damaged: voices, seconds or characters")
    return list(voices), sizes[0] / sizes[1] if all(0 < size < math.inf for size in sizes) else None


def held_weights(run: RunInfo) -> str:
    """How the base's weights are held when speaking: as in training, on every machine.

    A model without a run's settings has no weights of training; on a GPU it follows config.json.
    """
    return run.settings.weights if run.home or device() == "cuda" else "16bit"


def speaking_dtype(run: RunInfo) -> torch.dtype | None:
    """The dtype that a run was trained in; None, that of the stored weights, without a run."""
    return training_dtype(run.settings) if run.home else None


def load_run(run: RunInfo):
    """(model, tokenizer) of a run, in the precision of its training; prints which that is."""
    weights = held_weights(run)
    model, tokenizer = load_model(str(run.folder), weights, dtype=speaking_dtype(run))
    notes = {
        "16bit": "",
        "4bit": "; 4-bit weights",
        "8bit": "; 8-bit weights",
        "fp8": "; trained over fp8 weights, speaks over 16-bit ones instead",
    }
    print(f"model    {run.folder}: {str(model.dtype).removeprefix('torch.')}{notes[weights]}")
    return model, tokenizer


def choose_voice(requested: str | None, run: RunInfo) -> str | None:
    """`requested`, or the run's first voice; `UserError` for a voice that it was not trained on."""
    if requested and run.voices and requested not in run.voices:
        raise UserError(f"--voice {requested}: {run.folder} was trained on {', '.join(run.voices)}")
    return requested or (run.voices[0] if run.voices else run.settings.voice)
