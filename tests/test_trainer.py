"""SpeechTrainer: a loss that is not finite, and the time of training and of checks."""

import json
import re
import time

import pytest
from running import run_here

import finetune
from orpheus.checks import SampleEvaluator
from orpheus.settings import UserError


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    load = finetune.load_model

    def spoilt(settings, arguments):
        model = load(settings, arguments)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(finetune, "load_model", spoilt)
    with pytest.raises(UserError, match=r"loss is nan at step 1; .* in the batch: slt:"):
        run_here(monkeypatch, tmp_path)


def test_the_time_of_checks_is_told_apart(tmp_path, monkeypatch, capsys):
    """The speed is that of training alone, however long a check takes."""
    evaluate = SampleEvaluator.__call__
    slow = lambda *words: time.sleep(3) or evaluate(*words)  # noqa: E731
    monkeypatch.setattr(SampleEvaluator, "__call__", slow)
    run_here(monkeypatch, tmp_path, sample_steps="1", save_steps="3", sample_texts='["two"]')
    printed = capsys.readouterr().out
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    tokens = state["num_input_tokens_seen"]
    speed = float(re.search(r"speed    ([\d,]+) tokens/s", printed)[1].replace(",", ""))
    training, checks = map(float, re.search(r"training (.*), checks (.*),", printed).groups())
    assert checks >= 0.1 and speed > tokens / 9  # three checks took nine seconds at least
    assert "3/3   loss" in printed and training < checks
