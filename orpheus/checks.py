"""Checks of a model in training: its loss on held-out rows by slot, and how it speaks."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from orpheus.audio import audio_file
from orpheus.doctor import Report
from orpheus.files import write_text
from orpheus.memory import read_config
from orpheus.models import training_dtype
from orpheus.settings import Settings
from orpheus.tokens import SAMPLE_RATE, SLOTS, SpeechIds
from orpheus.voice import Speech, Voice

POSITIONS = 256  # whose logits are held at once: those of a whole row would fill a small GPU


def held_out_metrics(
    model, rows: list[dict], ids: SpeechIds, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Return mean loss (nats) and accuracy over held-out rows, of all tokens and by kind of token.

    Kinds are text, slots 0 to 6, and the end of speech. Rows are computed one by one, under
    autocast to `dtype` as in training, unless that is float32.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = [*(f"slot{n}" for n in range(SLOTS)), "end", "text"]
    losses, hits, counts = np.zeros((3, len(kinds)))
    autocast = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast:
        for row in rows:
            labels = torch.from_numpy(row["labels"])[1:]
            input_ids = torch.from_numpy(row["input_ids"]).to(model.device)[None, :-1]
            hidden = causal.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            for part, targets in zip(hidden.split(POSITIONS), labels.split(POSITIONS), strict=True):
                logits = causal.get_output_embeddings()(part).float()
                targets = targets.to(logits.device)  # device_map may have the head on another card
                logits, targets = logits[targets != -100], targets[targets != -100]
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                hit = (logits.argmax(-1) == targets).float()
                kind = target_kinds(targets, ids).cpu().numpy()
                np.add.at(losses, kind, loss.cpu().numpy())
                np.add.at(hits, kind, hit.cpu().numpy())
                np.add.at(counts, kind, 1)
    metrics = {"eval_loss": losses.sum() / counts.sum()} if rows else {}
    for n in np.flatnonzero(counts):
        metrics[f"eval_loss_{kinds[n]}"] = losses[n] / counts[n]
        metrics[f"eval_accuracy_{kinds[n]}"] = hits[n] / counts[n]
    return {name: float(value) for name, value in metrics.items()}


def target_kinds(targets: torch.Tensor, ids: SpeechIds) -> torch.Tensor:
    """Return the kinds of (n,) ids: 0–6 for the slot of a code, 7 for the end, 8 for text."""
    kind = (targets - ids.audio).div(ids.codebook_size, rounding_mode="floor")
    kind[(kind < 0) | (kind >= SLOTS)] = SLOTS + 1
    kind[(targets == ids.eos) | (targets == ids.eoa)] = SLOTS
    return kind


class SampleEvaluator:
    """Evaluates a model in training: loss on `held_out` rows, and `sample_texts` as infer.py would
    say them, in the report's first voice. Raises a UserError for texts that cannot be spoken."""

    def __init__(self, tokenizer, codec, settings: Settings, report: Report, held_out):
        self.settings, self.held_out = settings, held_out
        base = SimpleNamespace(config=read_config(settings))  # the model comes with each check
        name = next(iter(report.voices), settings.voice)
        self.voice = Voice(base, tokenizer, codec, settings, name)
        self.voice.pace = report.seconds / max(report.characters, 1)
        for text in settings.sample_texts:
            self.voice.make_parts(text)

    def __call__(self, model, step: int) -> tuple[dict[str, float], list]:
        """Return the metrics of a step, and (samples, whether it ended by itself) of each text.

        The samples are written to wavs. Neither the training RNG nor the model's mode is changed.
        """
        settings, dtype = self.settings, training_dtype(self.settings)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        # Unsloth's full fine-tuning has norms in fp32 and the rest in bf16: without autocast such a
        # model cannot generate
        mixed = settings.full_finetuning and dtype == torch.bfloat16
        autocast = torch.autocast(model.device.type, dtype, enabled=mixed)
        set_mode(model, settings, "inference")
        with torch.random.fork_rng(devices), autocast:
            voice = dataclasses.replace(self.voice, model=model)
            samples = list(voice.speak(settings.sample_texts))
            for n, speech in enumerate(samples, 1):
                with audio_file(sample_folder(settings, step) / f"{n:02}.wav") as write:
                    write(speech.audio)
        metrics = held_out_metrics(model, self.held_out, voice.ids, dtype)
        set_mode(model, settings, "training")
        metrics |= speech_metrics(samples, voice.pace, metrics.get("eval_loss", 0))
        return metrics, [(speech.audio, speech.ended) for speech in samples]


def set_mode(model, settings: Settings, mode: str) -> None:
    """Set a model's mode, training or inference; Unsloth's have methods of their own for it."""
    if settings.backend == "unsloth":
        getattr(model, f"for_{mode}")()
    else:
        model.train(mode == "training")


def sample_folder(settings: Settings, step: int) -> Path:
    return Path(settings.output_dir) / f"samples/step-{step:06}"


def speech_metrics(samples: list[Speech], pace: float, loss: float) -> dict[str, float]:
    """Return the share of samples that ended by themselves, their pace, and a score of the step.

    Theirs is in multiples of the data's `pace`. The score weighs the share first, the loss last.
    """
    if not samples:
        return {"eval_score": -loss / 10}
    ended = sum(speech.ended for speech in samples) / len(samples)
    seconds = sum(len(speech.audio) for speech in samples) / SAMPLE_RATE
    relative = seconds / sum(len(speech.text) for speech in samples) / pace
    score = 100 * ended - 10 * min(abs(math.log(relative)), 5) - loss / 10
    return {"eval_ended": ended, "eval_pace": relative, "eval_score": score}


def format_check(logs: dict, step: int, settings: Settings) -> str:
    """Return the console's line for one check; checks.csv and TensorBoard have all values."""
    parts = [f"check    step {step}"]
    if "eval_loss" in logs:
        parts.append(f"held-out {logs['eval_loss']:.2f}")
        losses = [logs.get(f"eval_loss_slot{n}", math.nan) for n in range(SLOTS)]
        parts.append(f"slots 0–6: {' '.join(f'{loss:.1f}' for loss in losses)}")
    if "eval_ended" in logs:
        count = len(settings.sample_texts)
        parts.append(f"ended {round(logs['eval_ended'] * count)}/{count}")
        parts += [f"pace {logs['eval_pace']:.2f}", f"samples: {sample_folder(settings, step)}/"]
    return "   ".join(parts)


def save_checks(log_history: list[dict], out: Path) -> None:
    """Write the table of all checks to checks.csv, and print which step was the best."""
    checks = [log for log in log_history if "eval_score" in log]
    if not checks:
        return
    names = ["step", *sorted({name for log in checks for name in log if name[:5] == "eval_"})]
    rows = [[f"{log.get(name, math.nan):.12g}" for name in names] for log in checks]
    write_text(out / "checks.csv", "".join(",".join(row) + "\n" for row in [names, *rows]))
    best = max(checks, key=lambda log: log["eval_score"])
    shown = [name for name in ("eval_ended", "eval_pace", "eval_loss") if name in best]
    parts = [f"{name[5:]} {best[name]:.3g}" for name in shown]
    checkpoint = out / f"checkpoint-{best['step']}"
    parts += [f"kept in {checkpoint}"] if checkpoint.is_dir() else []
    print(f"best     step {best['step']} of {len(checks)} checks: {', '.join(parts)}")


STALLED_STEPS = 50  # a loss near that of guessing is normal at first, if it falls


def loss_warnings(logs: dict, state, vocab_size: int) -> list[str]:
    """Return signs of rows that were tokenised wrongly, or of a learning rate that is too high."""
    messages, guess, step = [], math.log(vocab_size), state.global_step
    earlier = [log for log in state.log_history if "loss" in log and log["step"] < step]
    if "loss" in logs and earlier:
        lowest = min(log["loss"] for log in earlier)
        if logs["loss"] > lowest + 2 >= earlier[-1]["loss"]:  # nats; said once for each rise
            rise = f"loss rose from {lowest:.2f} to {logs['loss']:.2f}"
            messages.append(f"{rise}: if it does not fall again, lower learning_rate")
        before = [log["loss"] for log in earlier if log["step"] <= step - STALLED_STEPS]
        if before and logs["loss"] > max(0.9 * guess, 0.95 * before[-1]):
            stalled = f"loss {logs['loss']:.1f} is no better than guessing ({guess:.1f})"
            remedy = "check that model is an Orpheus and that codec is the one it was trained with"
            messages.append(f"{stalled} and has not fallen in {STALLED_STEPS} steps: {remedy}")
    slots = {n: logs.get(f"eval_loss_slot{n}") for n in range(SLOTS)}
    if None not in slots.values():
        usual = float(np.median(list(slots.values())))
        for slot in (n for n, loss in slots.items() if loss > usual + 2.5):
            far = f"slot {slot}'s loss {slots[slot]:.1f} is far above the others' {usual:.1f}"
            messages.append(f"{far}: its codes are misplaced, or come from another codec")
    return messages
