"""Checks of a model in training: its loss on held-out rows by slot, and how it speaks."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from orpheus.codec import decode_stream
from orpheus.doctor import Report
from orpheus.files import write_text
from orpheus.generation import make_utterance, speak
from orpheus.memory import read_config
from orpheus.models import training_dtype
from orpheus.runs import RANK
from orpheus.scoring import Judge, load_judges
from orpheus.settings import Settings
from orpheus.tokens import SAMPLE_RATE, SLOTS, SpeechIds, parts_of, read_speech_ids, whole_frames

SCORES = ("wer", "likeness", "mos")  # the judges' that the console shows
REFERENCES = 20  # recordings whose voice the samples are compared with
POSITIONS = 256  # whose logits are held at once: those of a whole row would fill a small GPU


def held_out_metrics(
    model, rows: list[dict], ids: SpeechIds, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Mean loss (nats) and accuracy over held-out rows: of all tokens, and by kind of token.

    Kinds are text, slots 0 to 6, and the end of speech.

    Args:
        rows: `input_ids` and `labels`, one-dimensional arrays; they are computed one by one.
        dtype: the dtype to autocast to, as in training; float32 for none.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = [*(f"slot{n}" for n in range(SLOTS)), "end", "text"]
    losses, hits, counts = np.zeros((3, len(kinds)))
    autocast = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast:
        for row in rows:
            labels = torch.from_numpy(row["labels"]).to(model.device)[1:]
            input_ids = torch.from_numpy(row["input_ids"]).to(model.device)[None, :-1]
            hidden = causal.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            for part, targets in zip(hidden.split(POSITIONS), labels.split(POSITIONS), strict=True):
                counted = targets != -100
                targets = targets[counted]
                logits = causal.get_output_embeddings()(part).float()[counted]  # (n, vocabulary)
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                hit = (logits.argmax(-1) == targets).float()
                kind = target_kinds(targets, ids).cpu().numpy()
                np.add.at(losses, kind, loss.cpu().numpy())
                np.add.at(hits, kind, hit.cpu().numpy())
                np.add.at(counts, kind, 1)
    if not rows:
        return {}
    metrics = {"eval_loss": losses.sum() / max(counts.sum(), 1)}
    for n in np.flatnonzero(counts):
        metrics[f"eval_loss_{kinds[n]}"] = losses[n] / counts[n]
        metrics[f"eval_accuracy_{kinds[n]}"] = hits[n] / counts[n]
    return {name: float(value) for name, value in metrics.items()}


def target_kinds(targets: torch.Tensor, ids: SpeechIds) -> torch.Tensor:
    """(n,) ids → (n,) kinds: 0–6 for the slot of a code, 7 for the end of speech, 8 for text."""
    kind = (targets - ids.audio).div(ids.codebook_size, rounding_mode="floor")
    kind[(kind < 0) | (kind >= SLOTS)] = SLOTS + 1
    kind[(targets == ids.eos) | (targets == ids.eoa)] = SLOTS
    return kind


@dataclass
class SampleEvaluator:
    """Evaluates a model in training: held-out loss and spoken `sample_texts`.

    Making one raises `UserError` for a sample text for which the base's context has no room.
    """

    tokenizer: object
    codec: object
    settings: Settings
    report: Report
    held_out: list[dict]  # rows
    trained: list[dict]  # rows, whose voice the judges compare with if none is held out

    def __post_init__(self):
        self.ids = read_speech_ids(self.tokenizer, self.codec.codebook_size)
        self.voice = next(iter(self.report.voices), None)
        config = read_config(self.settings)
        for text in self.settings.sample_texts:
            for part in parts_of(text, self.settings):
                make_utterance(config, self.tokenizer, self.ids, part, self.settings, self.voice)
        self.judges = self.load_judges() if self.settings.judge_samples and not RANK else []

    def load_judges(self) -> list[Judge]:
        """The judges that are installed; the recordings through the codec are the voice."""
        model = self.settings.judge_samples
        rows = [row for row in self.held_out if row["voice"] == (self.voice or "")]
        rows = rows or [row for row in self.trained if row["voice"] == (self.voice or "")]
        speech = [
            row["input_ids"][np.argmax(row["input_ids"] == self.ids.sos) + 1 :] for row in rows
        ]
        codes = [whole_frames(ids, self.ids)[0] for ids in speech[:REFERENCES]]
        recordings = [np.concatenate([*decode_stream(self.codec, c, seed=0)]) for c in codes]
        return load_judges("base" if model is True else model, recordings)

    def __call__(self, model, step: int) -> tuple[dict[str, float], list]:
        """(metrics, [(samples, whether the speech ended by itself), …]); writes the wavs.

        Neither the training RNG nor the model's mode is changed.
        """
        settings, texts = self.settings, self.settings.sample_texts
        folder = sample_folder(settings, step)
        paths = [folder / f"{n:02}.wav" for n in range(1, len(texts) + 1)]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        dtype = training_dtype(settings)
        # Unsloth's full fine-tuning has norms in fp32 and the rest in bf16: without autocast such a
        # model cannot generate
        mixed = settings.full_finetuning and dtype == torch.bfloat16
        autocast = torch.autocast(model.device.type, dtype, enabled=mixed)
        set_mode(model, settings, "inference")
        with torch.random.fork_rng(devices):
            loaded = model, self.tokenizer, self.codec
            with autocast:
                samples = speak(texts, paths, *loaded, settings, self.voice, quiet=True)
            scores = self.judge(samples)
        metrics = held_out_metrics(model, self.held_out, self.ids, dtype)
        set_mode(model, settings, "training")
        loss = metrics.get("eval_loss", 0.0)
        return metrics | speech_metrics(texts, samples, self.report, loss, scores), samples

    def judge(self, samples: list) -> dict[str, float]:
        """The mean of each judge's scores over the samples that it has scored."""
        scores = [
            {name: value for judge in self.judges for name, value in judge(audio, text).items()}
            for text, (audio, _) in zip(self.settings.sample_texts, samples, strict=True)
        ]
        names = dict.fromkeys(name for row in scores for name in row)
        return {name: float(np.mean([r[name] for r in scores if name in r])) for name in names}


def set_mode(model, settings: Settings, mode: str) -> None:
    """`mode` is training or inference. Unsloth's models have methods of their own for it."""
    if settings.backend == "unsloth":
        getattr(model, f"for_{mode}")()
    else:
        model.train(mode == "training")


def sample_folder(settings: Settings, step: int) -> Path:
    return Path(settings.output_dir) / f"samples/step-{step:06}"


def speech_metrics(
    texts: list[str], samples: list, report: Report, loss: float, scores: dict[str, float]
) -> dict:
    """The share of samples that ended by themselves, their pace, and a score to compare steps by.

    The pace is seconds a character, relative to the data's. The score weighs the share that ended
    first, then the pace, the held-out loss last. With the judges' `scores`, it weighs the share
    that ended, the word errors, the likeness, the pace and the loss, each ten times the next.
    """
    if not samples:
        return {"eval_score": -loss / 10}
    ended = sum(end for _, end in samples) / len(samples)
    seconds = sum(len(audio) for audio, _ in samples) / SAMPLE_RATE
    pace = seconds / sum(map(len, texts)) / (report.seconds / report.characters)
    distance = min(abs(math.log(pace)), 5)
    score = 100 * ended - 10 * distance - loss / 10
    if scores:
        words, likeness = min(scores.get("wer", 0.0), 2), scores.get("likeness", 0.0)
        score = 1000 * ended - 100 * words + 10 * likeness - distance - loss / 10
    metrics = {"eval_ended": ended, "eval_pace": pace, "eval_score": score}
    return metrics | {f"eval_{name}": value for name, value in scores.items()}


def format_check(logs: dict, step: int, settings: Settings) -> str:
    """The console's line for one check; checks.csv and TensorBoard have all of its values."""
    parts = [f"check    step {step}"]
    if "eval_loss" in logs:
        parts.append(f"held-out {logs['eval_loss']:.2f}")
        losses = [logs.get(f"eval_loss_slot{n}", math.nan) for n in range(SLOTS)]
        parts.append(f"slots 0–6: {' '.join(f'{loss:.1f}' for loss in losses)}")
    if "eval_ended" in logs:
        count = len(settings.sample_texts)
        parts.append(f"ended {round(logs['eval_ended'] * count)}/{count}")
        parts += [f"{n} {logs[f'eval_{n}']:.2f}" for n in SCORES if f"eval_{n}" in logs]
        parts += [f"pace {logs['eval_pace']:.2f}", f"samples: {sample_folder(settings, step)}/"]
    return "   ".join(parts)


def save_checks(log_history: list[dict], out: Path) -> None:
    """Writes the table of all checks to checks.csv, and prints which step was the best."""
    checks = [log for log in log_history if "eval_score" in log]
    if not checks:
        return
    names = ["step", *sorted({name for log in checks for name in log if name[:5] == "eval_"})]
    lines = [",".join(names)]
    digits = {"eval_score": 12}  # the held-out loss, which decides last, is in its last digits
    lines += [
        ",".join(f"{log.get(name, float('nan')):.{digits.get(name, 6)}g}" for name in names)
        for log in checks
    ]
    write_text(out / "checks.csv", "\n".join(lines) + "\n")
    best = max(checks, key=lambda log: log["eval_score"])
    shown = (f"eval_{name}" for name in ("ended", *SCORES, "pace", "loss"))
    parts = [f"{name[5:]} {best[name]:.3g}" for name in shown if name in best]
    checkpoint = out / f"checkpoint-{best['step']}"
    parts += [f"kept in {checkpoint}"] if checkpoint.is_dir() else []
    print(f"best     step {best['step']} of {len(checks)} checks: {', '.join(parts)}")
