"""Adapter and base as one 16-bit model."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np

from orpheus.audio import write_text
from orpheus.codec import load_codec
from orpheus.generation import generate_batch, make_utterance
from orpheus.models import is_adapter, load_model, loads, on_hub
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT, RunInfo, held_weights
from orpheus.scoring import Utterance
from orpheus.settings import Settings, UserError, read_json, read_settings, read_text
from orpheus.tokens import SpeechIds, codes_to_ids, read_speech_ids


def generate_greedy(model, tokenizer, ids: SpeechIds, settings: Settings, voice) -> list[Utterance]:
    """The sample texts, five seconds of each at most, spoken without chance."""
    greedy = dataclasses.replace(
        settings, temperature=0.0, max_seconds=min(5.0, settings.max_seconds)
    )
    texts = settings.sample_texts or read_settings().sample_texts
    rows = [make_utterance(model, tokenizer, ids, text, greedy, voice) for text in texts]
    generate_batch(model, rows, ids, greedy)
    return rows


def logits_over(model, ids: SpeechIds, rows: list[Utterance]) -> list:
    """(tokens, vocabulary) logits of each row's speech, as it was spoken."""
    import torch

    logits = []
    for row in rows:
        tokens = [*row.prompt, *codes_to_ids(row.codes, ids).tolist()]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokens], device=model.device)).logits
        logits.append(out[0, len(row.prompt) - 1 :].float().cpu())
    return logits


def check_merged(run: RunInfo, voice, out: Path, ids: SpeechIds, rows, logits) -> tuple[bool, str]:
    """Whether the folder `out` speaks the greedy tokens of the adapter, and a line that says so."""
    model, tokenizer = load_model(str(out))
    merged = generate_greedy(model, tokenizer, ids, run.settings, voice)
    again = logits_over(model, ids, rows)
    far = max(float((a - b).abs().max()) for a, b in zip(logits, again, strict=True))
    same, total = 0, sum(row.codes.size for row in rows)
    for row, other in zip(rows, merged, strict=True):
        common = min(len(row.frames), len(other.frames))
        same += int((row.codes[:common] == other.codes[:common]).sum())
    passed = all(
        row.end == other.end and np.array_equal(row.codes, other.codes)
        for row, other in zip(rows, merged, strict=True)
    )
    told = f"{same} of {total} greedy tokens on {len(rows)} texts are the adapter's"
    return passed, f"{told}, logits differ by {far:.4f} at most"


def model_card(run: RunInfo) -> str:
    """README.md of a merged folder: where it comes from, data, settings, scores, {parity}."""
    settings, home = run.settings, run.home
    report = read_json(home / SAVED_REPORT)
    base = settings.model if on_hub(settings.model) else Path(settings.model).name
    lines = ["---", "library_name: transformers", "pipeline_tag: text-to-speech"]
    lines += [f"base_model: {base}"] if on_hub(settings.model) else []
    lines += ["---", "", f"# {Path(settings.output_dir).name}", ""]
    lines += [f"{base}, fine-tuned with orpheus-finetune: LoRA merged into fp16 weights.", ""]
    lines += ["Its prompt is SOH BOS `voice: text` EOT EOH SOA SOS; it writes SNAC 24 kHz tokens."]
    with loads(home / SAVED_REPORT):
        size = f"{report['rows']} clips, {report['hours']:.3f} hours"
        data = f"{size} of {Path(report['dataset']).name}"
    lines += ["", "## Data", "", f"{data}; voices: {', '.join(run.voices) or 'none named'}.", ""]
    if (home / "checks.csv").is_file():
        checks = list(csv.DictReader(read_text(home / "checks.csv").splitlines()))
        with loads(home / "checks.csv"):
            best = max(checks, key=lambda check: float(check["eval_score"]))
        lines += ["## Scores", "", "| measure, at the best check | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in best.items()] + [""]
    lines += ["## Parity", "", "{parity}.", "", "## Settings", "", "```json"]
    return "\n".join([*lines, json.dumps(settings.flat(), indent=2, ensure_ascii=False), "```", ""])


def merge(run: RunInfo, voice: str | None, out: Path) -> bool:
    """The adapter merged into its base, to the folder `out`; whether it still speaks the same."""
    from safetensors import SafetensorError

    if not is_adapter(run.folder):
        raise UserError(f"{run.folder}: no adapter: there is nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give --merge a new folder")
    card = model_card(run) if run.home else ""  # a UserError in what it is made from comes first
    weights = held_weights(run)
    model, tokenizer = load_model(str(run.folder), weights)
    ids = read_speech_ids(tokenizer, load_codec(run.settings.codec).codebook_size)
    rows = generate_greedy(model, tokenizer, ids, run.settings, voice)
    logits = logits_over(model, ids, rows)
    del model
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for saved in load_model(str(run.folder), weights, merged=True):
            saved.save_pretrained(str(part))
        if run.home:
            settings = run.settings.flat() | {"weights": "16bit"}
            write_text(part / SAVED_CONFIG, json.dumps(settings, indent=2) + "\n")
            shutil.copy(run.home / SAVED_REPORT, part)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written: {told}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    passed, told = check_merged(run, voice, out, ids, rows, logits)
    if run.home:
        write_text(out / "README.md", card.replace("{parity}", told, 1))
    print(f"merged   {out}: {told}")
    if not passed:
        print("parity   FAILED: it does not speak as the adapter does. Listen before you use it")
    return passed
