"""Checks during a run: held-out metrics, samples, scores, and the best checkpoint."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from running import run_here, same_file, settings_of

from data import prepare
from orpheus.checks import (
    SampleEvaluator,
    held_out_metrics,
    loss_warnings,
    speech_metrics,
)
from orpheus.clips import read_clips
from orpheus.models import load_model, load_tokenizer
from orpheus.scoring import BY_ITSELF
from orpheus.voice import Speech


def prepare_rows(**overrides):
    settings = settings_of(**overrides)
    tokenizer = load_tokenizer(ROOT / settings.model)
    return prepare.make_rows(read_clips(settings), settings, tokenizer)


def test_held_out_metrics_equal_a_plain_account(tokenizer, ids):
    """Against one log-softmax over all positions and a loop in Python."""
    rows, *_ = prepare_rows(limit="3", train_on="all")
    model, _ = load_model("data/demo/base")
    metrics = held_out_metrics(model, rows, ids)
    seen = {}
    for row in rows:
        inputs = torch.from_numpy(row["input_ids"])
        scores = model(input_ids=inputs[None]).logits[0].log_softmax(-1)
        for at in range(len(inputs) - 1):
            wanted = int(inputs[at + 1])
            slot = (wanted - ids.audio) // ids.codebook_size
            name = f"slot{slot}" if slot >= 0 else "end" if wanted in (ids.eos, ids.eoa) else "text"
            hit = float(scores[at].argmax() == wanted)
            seen.setdefault(name, []).append((-float(scores[at, wanted]), hit))
    assert set(seen) == {*(f"slot{n}" for n in range(7)), "end", "text"}
    for name, pairs in seen.items():
        loss, hits = np.mean(pairs, axis=0)
        assert np.isclose(metrics[f"eval_loss_{name}"], loss, rtol=1e-4), name
        assert np.isclose(metrics[f"eval_accuracy_{name}"], hits), name
    everything = [loss for pairs in seen.values() for loss, _ in pairs]
    assert np.isclose(metrics["eval_loss"], np.mean(everything), rtol=1e-4)


def test_scores_weigh_what_ended_then_pace_then_loss():
    def score(ended=1, pace=1.0, loss=1.0):
        samples = [
            Speech("x" * 10, [SimpleNamespace(end=BY_ITSELF * (n < ended))], iter([np.zeros(size)]))
            for n, size in enumerate([round(pace * 24_000)] * 2)
        ]
        return speech_metrics(samples, 0.1, loss)["eval_score"]

    best_first = [
        score(ended=2, pace=2.0, loss=9.0),
        score(pace=1.1, loss=9.0),
        score(pace=1.3, loss=1.4),
        score(pace=1.3, loss=1.5),
    ]
    assert best_first == sorted(best_first, reverse=True) and len(set(best_first)) == 4


def test_listening_changes_nothing(tmp_path, monkeypatch):
    """Checks at every step, with dropout drawing from the same generator: the same adapter."""
    keys = {"lora_dropout": "0.1", "sample_texts": '["two"]', "max_seconds": "0.3"}
    run_here(monkeypatch, tmp_path / "often", sample_steps="1", **keys)
    run_here(monkeypatch, tmp_path / "once", sample_steps="3", **keys)
    name = "adapter_model.safetensors"
    assert same_file(tmp_path / "often" / name, tmp_path / "once" / name)
    folders = sorted(p.name for p in (tmp_path / "often/samples").iterdir())
    assert folders == ["step-000001", "step-000002", "step-000003"]


def test_full_finetuning_in_bf16_is_checked_with_norms_in_fp32(tmp_path, tokenizer, codec):
    """Unsloth keeps them so, and computes under autocast in its own forward, which we pass by."""
    keys = {"full_finetuning": "true", "weights": "16bit", "bf16": "true", "max_seconds": "0.3"}
    keys |= {"backend": "transformers", "sample_texts": '["two"]', "output_dir": str(tmp_path)}
    settings = settings_of(limit="8", **keys)
    rows, _, report = prepare.make_rows(read_clips(settings), settings, tokenizer, codec)
    model = load_model("data/demo/base")[0].bfloat16()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    evaluator = SampleEvaluator(tokenizer, codec, settings, report, rows[:2])
    metrics, ((audio, _),) = evaluator(model, 1)
    assert metrics["eval_loss"] > 0 and len(audio) == 3 * 2048


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_a_check_leaves_quantised_weights_as_they_are(tmp_path, monkeypatch, weights):
    """Training goes on after speaking; bitsandbytes repacks 4-bit weights in eval mode where it
    finds avx512_bf16, and keeps tensors of the first forward pass with 8-bit ones."""
    import bitsandbytes

    keys = {"weights": weights, "held_out": "0.3", "sample_steps": "1", "max_seconds": "0.3"}
    for found in (False, True) if weights == "4bit" else (False,):
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda found=found: found)
        run_here(monkeypatch, tmp_path / str(found), **keys, sample_texts='["two"]')
    name = "adapter_model.safetensors"
    if weights == "4bit":
        assert same_file(tmp_path / "True" / name, tmp_path / "False" / name)


def test_checks_are_logged_and_the_best_is_told(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = {"sample_texts": '["two", "six"]', "max_seconds": "0.3", "held_out": "0.3"}
    keys |= {"report_to": "tensorboard", "sample_steps": "1", "save_steps": "1"}
    run_here(monkeypatch, tmp_path, **keys, save_total_limit="2")
    with open(tmp_path / "checks.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {"eval_loss_slot3", "eval_pace", "eval_ended"} <= set(rows[0])
    best = max(rows, key=lambda row: float(row["eval_score"]))["step"]
    assert f"best     step {best} of 3 checks" in capsys.readouterr().out
    assert (tmp_path / f"checkpoint-{best}").is_dir()
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent), {"audio": 0}).Reload()
    assert sorted(events.Tags()["audio"]) == ["sample/01", "sample/02"]
    assert len(events.Audio("sample/01")) == 3
    told = {"loss", "audio_hours", "peak_gib", "num_input_tokens_seen"}
    told = {f"train/{name}" for name in told | {"train_tokens_per_second"}}
    assert told | {"eval/loss_slot6"} <= set(events.Tags()["scalars"])


def state_of(*losses, every=10):
    history = [{"loss": loss, "step": every * n} for n, loss in enumerate(losses, 1)]
    return SimpleNamespace(log_history=history, global_step=every * len(losses))


def warnings_of(*losses, **logs):
    state = state_of(*losses)
    return loss_warnings({"loss": losses[-1], **logs}, state, 156_940)


def test_signs_of_wrong_tokens_are_named_and_only_those():
    (message,) = warnings_of(11.9, *[11.5] * 6)
    assert message.startswith("loss 11.5 is no better than guessing (12.0) and has not fallen")
    assert warnings_of(11.9, 11.5, 11.4) == []  # too early to tell
    assert warnings_of(12.9, 12.4, 12.0, 11.7, 11.4, 11.2) == []  # it falls
    assert warnings_of(*[4.5] * 7) == []
    assert len(warnings_of(2.0, 1.5, 3.9)) == 1  # it rose by over 2 nats
    assert warnings_of(2.0, 1.5, 3.9, 4.0) == []  # said once
    slots = {f"eval_loss_slot{n}": 4.0 + 0.1 * n for n in range(7)}
    assert warnings_of(4.5, **slots) == []
    (message,) = warnings_of(4.5, **(slots | {"eval_loss_slot3": 8.2}))
    assert message.startswith("slot 3's loss 8.2 is far above the others' 4.4")
