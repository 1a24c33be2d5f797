"""Checks during a run: held-out metrics, samples, scores, and the best checkpoint."""

import csv

import numpy as np
import torch
from conftest import ROOT
from running import run_here, same_file, settings_of

import orpheus.checks
from data import prepare
from orpheus.audio import Sound
from orpheus.checks import SampleEvaluator, held_out_metrics, speech_metrics
from orpheus.clips import read_clips
from orpheus.doctor import Measures, Report
from orpheus.models import load_model, load_tokenizer


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


def test_scores_weigh_what_ended_then_words_then_likeness_then_pace_then_loss():
    report = Report("x", measures=[Measures("a", "", "x" * 24_000, Sound(seconds=1.0))])

    def score(ended=1, pace=1.0, loss=1.0, **scores):
        samples = [(np.zeros(round(pace * 24_000)), n < ended) for n in range(2)]
        scores = {"wer": 0.1, "likeness": 0.7} | scores
        texts = ["x" * 24_000, "x" * 24_000]
        return speech_metrics(texts, samples, report, loss, scores)["eval_score"]

    best_first = [
        score(ended=2, wer=0.9, likeness=0.2, pace=2.0, loss=9.0),
        score(wer=0.0, likeness=0.2, pace=2.0, loss=9.0),
        score(likeness=0.9, pace=2.0, loss=9.0),
        score(pace=1.1, loss=1.5),
        score(pace=1.3, loss=1.4),
        score(pace=1.3, loss=1.5),
    ]
    assert best_first == sorted(best_first, reverse=True) and len(set(best_first)) == 6


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
    evaluator = SampleEvaluator(tokenizer, codec, settings, report, rows[:2], rows)
    evaluator.judges = [lambda audio, text: {"autocast": torch.is_autocast_enabled("cpu")}]
    metrics, ((audio, _),) = evaluator(model, 1)
    assert metrics["eval_loss"] > 0 and len(audio) == 3 * 2048
    assert metrics["eval_autocast"] == 0  # judges compute as they were trained


def test_a_check_leaves_4_bit_weights_as_they_are_on_any_cpu(tmp_path, monkeypatch):
    """bitsandbytes repacks them in eval mode where it finds avx512_bf16, and training stops."""
    import bitsandbytes

    keys = {"weights": "4bit", "held_out": "0.3", "sample_steps": "1"}
    for found in (False, True):
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda found=found: found)
        run_here(monkeypatch, tmp_path / str(found), **keys)
    name = "adapter_model.safetensors"
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
    told = {"loss", "audio_hours", "useful_share", "peak_gib", "num_input_tokens_seen"}
    told = {f"train/{name}" for name in told | {"train_tokens_per_second"}}
    assert told | {"eval/loss_slot6"} <= set(events.Tags()["scalars"])
    share = [event.value for event in events.Scalars("train/useful_share")]
    assert all(0.5 < value <= 1 for value in share), share


def test_judges_choose_the_best_check_and_the_lowest_loss_does_not(tmp_path, monkeypatch, capsys):
    """The judge hears more word errors, and another likeness, at every check; the loss falls."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard, recordings = [], []

    def judge(audio, text):
        heard.append((len(audio), text))
        return {"wer": (len(heard) - 1) // 2 / 4, "likeness": 0.5} if text == "two" else {}

    def judges(whisper, sounds):
        recordings.append((whisper, sounds))
        return [judge]

    monkeypatch.setattr(orpheus.checks, "load_judges", judges)
    keys = {"sample_texts": '["two", "six"]', "max_seconds": "0.3", "held_out": "0.3"}
    keys |= {"report_to": "tensorboard", "sample_steps": "1", "save_steps": "1"}
    run_here(
        monkeypatch, tmp_path, **keys, save_total_limit="2", max_steps="4", judge_samples="a.en"
    )
    ((whisper, sounds),) = recordings
    assert whisper == "a.en" and all(len(sound) % 2048 == 0 for sound in sounds) and sounds
    assert [text for _, text in heard] == ["two", "six"] * 4
    with open(tmp_path / "checks.csv") as file:
        rows = [{n: float(value) for n, value in row.items()} for row in csv.DictReader(file)]
    assert [row["eval_wer"] for row in rows] == [0, 0.25, 0.5, 0.75]
    assert min(rows, key=lambda row: row["eval_loss"])["step"] != 1
    printed = capsys.readouterr().out
    assert "best     step 1 of 4 checks" in printed and "wer 0.75   likeness 0.50" in printed
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert [e.value for e in events.Scalars("eval/wer")] == [0, 0.25, 0.5, 0.75]
