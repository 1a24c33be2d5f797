"""SpeechTrainer, its callbacks, and what machine and backend allow."""

import json
import os
import re
import signal
import time

import pytest
import torch
from conftest import DEMO, one_line
from running import PLAIN, run_here, settings_of
from trl import SFTConfig, SFTTrainer

import finetune
from orpheus import trainer
from orpheus.checks import SampleEvaluator
from orpheus.files import is_adapter
from orpheus.memory import GIB, read_base
from orpheus.runs import python_command
from orpheus.settings import UserError
from orpheus.trainer import (
    StopOnSignal,
    check_compatibility,
    check_compiler,
    print_changes,
    print_machine,
    resolve_settings,
    write_unbuffered,
)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    load = finetune.load_model

    def spoilt(settings, arguments):
        model = load(settings, arguments)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(finetune, "load_model", spoilt)
    with pytest.raises(UserError, match=r"step 1: the loss is nan; .*; in the batch: slt:"):
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


def too_many(rows, step=0):
    """SFTTrainer.training_step, but out of memory for more than so many rows from a step on."""
    train = SFTTrainer.training_step

    def training_step(self, model, inputs, *words, **more):
        if len(inputs["input_ids"]) > rows and self.state.global_step >= step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return train(self, model, inputs, *words, **more)

    return training_step


FOUND = {"per_device_train_batch_size": "4", "auto_find_batch_size": "true", "save_steps": "2"}


def test_auto_find_batch_size_says_what_it_came_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SFTTrainer, "training_step", too_many(2))
    run_here(monkeypatch, tmp_path, **FOUND, num_train_epochs="1", max_steps="-1")
    printed = capsys.readouterr().out
    assert "; 4 rows a step; 2 steps" in printed
    assert "batches  3 rows a batch do not fit in memory: now 2; 2 rows a step, 4 steps" in printed
    assert re.search(r"step     4/4   loss .* h of audio", printed)
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert state["train_batch_size"] == 2 and state["epoch"] == 1
    (tmp_path / "adapter_config.json").unlink()
    keys = FOUND | {"num_train_epochs": "2", "max_steps": "-1"}
    run_here(monkeypatch, tmp_path, **keys, resume="true")
    printed = capsys.readouterr().out
    assert "; 2 rows a step; 8 steps" in printed and "do not fit" not in printed
    assert "8/8   loss" in printed


@pytest.mark.parametrize(
    ("rows", "step", "found"), [(0, 0, "true"), (2, 0, "false"), (2, 1, "true")]
)
def test_a_full_gpu_is_one_line(rows, step, found, tmp_path, monkeypatch):
    """Not even one row fits, fewer are not to be tried, or training has begun already."""
    monkeypatch.setattr(SFTTrainer, "training_step", too_many(rows, step))
    with pytest.raises(UserError) as caught:
        run_here(monkeypatch, tmp_path, **FOUND | {"auto_find_batch_size": found})
    first = f"step {step + 1}: out of GPU memory; --plan shows what fits"
    assert str(caught.value).startswith(first)
    assert str(caught.value).endswith("; last checkpoint: none yet")


def test_the_time_left_leaves_out_the_first_step(tmp_path, monkeypatch, capsys):
    train = SFTTrainer.training_step

    def slow_at_first(self, *words, **more):
        if self.state.global_step == 0:
            time.sleep(5)
        return train(self, *words, **more)

    monkeypatch.setattr(SFTTrainer, "training_step", slow_at_first)
    run_here(monkeypatch, tmp_path, max_steps="3")
    first, second, _ = re.findall(r"^step     .*", capsys.readouterr().out, re.M)
    assert "left" not in first
    assert re.search(r"0:00:0[0-3] left", second)


# ---------------------------------------------------------------- callbacks


def test_a_loss_that_rises_is_a_warning(tmp_path, monkeypatch, capsys):
    step = SFTTrainer.training_step

    def spoil(self, model, *words, **more):
        if self.state.global_step == 2:
            for name, weight in model.named_parameters():
                if name.endswith("model.norm.weight"):
                    weight.data.mul_(20)
        return step(self, model, *words, **more)

    monkeypatch.setattr(SFTTrainer, "training_step", spoil)
    run_here(monkeypatch, tmp_path, max_steps="4", limit="60")  # no warning of few clips
    printed = capsys.readouterr().out
    assert re.findall(r"warning  step 3: loss rose from [\d.]+ to .* learning_rate", printed)
    assert printed.count("warning") == 1
    assert is_adapter(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(number, tmp_path, monkeypatch, capsys):
    step = SFTTrainer.training_step

    def kill(self, *words, **more):
        if self.state.global_step == 1:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # as shell and kernel both do for a closed terminal
        return step(self, *words, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr(SFTTrainer, "training_step", kill)
        run_here(patch, tmp_path, max_steps="9", report_to="none")
    assert done.value.code == 130
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    told = capsys.readouterr().out
    command = next(line for line in told.splitlines() if line.startswith("continue with: "))
    assert command.startswith(f"continue with: {python_command()} finetune.py --config")
    assert command.endswith(" --resume")
    run_here(monkeypatch, tmp_path, max_steps="3", report_to="none", resume="true")
    assert is_adapter(tmp_path)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not stop.requested


def test_a_closed_terminal_does_not_stop_the_saving():
    """What is printed after the terminal is gone goes nowhere, instead of failing."""
    ours, theirs = os.openpty()
    os.close(ours)
    with pytest.raises(OSError):
        os.write(theirs, b"a")
    write_unbuffered(theirs, "a")
    assert os.write(theirs, b"a") == 1
    os.close(theirs)


# ---------------------------------------------------------------- what the machine allows


def test_what_a_machine_cannot_do_is_refused_by_name(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine can")
    cases = [
        (["--weights", "fp8"], 'weights "fp8" need Unsloth'),
        (["--weights", "4bit", "--full_finetuning"], 'full_finetuning needs weights "16bit"'),
        (["--gradient_checkpointing", "unsloth"], "set it to true"),
        (["--optim", "paged_adamw_8bit"], "optim paged_adamw_8bit needs a GPU"),
        (["--fp16", "true"], "fp16 needs a GPU"),
        (
            ["--report_to", "comet_ml"],
            "report_to comet_ml is not installed: `pip install comet_ml`",
        ),
        (["--packing", "true"], "packing cannot be set, leave it out: it follows from batching"),
    ]
    for words, line in cases:
        words = [*DEMO, *PLAIN, "--output_dir", tmp_path / "out", *words]
        assert line in one_line(finetune.main, monkeypatch, *words)
    settings = resolve_settings(settings_of(weights="8bit"))
    with pytest.raises(UserError, match='need backend "transformers" here'):
        check_compatibility(settings, finetune.make_sft_config(settings))


def test_several_ranks_find_no_batch_size(monkeypatch):
    monkeypatch.setattr(trainer, "WORLD_SIZE", 2)
    settings = resolve_settings(settings_of(auto_find_batch_size="true", backend="transformers"))
    with pytest.raises(UserError, match="auto_find_batch_size works on a single GPU"):
        check_compatibility(settings, finetune.make_sft_config(settings))


def test_a_card_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="set bf16 false, fp16 true"):
        resolve_settings(settings_of(bf16="true"))
    settings = resolve_settings(settings_of(bf16="null"))
    assert (settings.bf16, settings.fp16) == (False, True)


def test_one_process_uses_one_gpu(monkeypatch, capsys):
    settings = resolve_settings(settings_of(backend="transformers"))
    finetune.make_sft_config(settings)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: self._n_gpu or 2))
    arguments = finetune.make_sft_config(settings)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 2
    assert "1 of 2 GPUs is used; for all: torchrun --nproc-per-node 2" in capsys.readouterr().out


def test_a_run_that_may_not_fit_is_warned_of(monkeypatch, capsys):
    keys = {"model": "tests/orpheus-3b", "weights": "4bit", "backend": "transformers"}
    settings = settings_of(**keys, bf16="true", per_device_train_batch_size="8")
    print_machine(settings, read_base(settings))
    assert capsys.readouterr().out == ""  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    print_machine(settings, read_base(settings))
    machine, fit = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"machine  Card, 12.0 of 16.0 GiB free, [\d.]+ planned; driver for CUDA 12.8; "
        r"torch 2\S+, transformers 5\S+; attention: sdpa",
        machine,
    )
    assert fit.startswith("warning  the run may not fit; what would: gradient_checkpointing true")


def test_unsloth_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match=r"C compiler: `sudo apt install build-essential python3\.\d"
    ):
        check_compiler()


def test_packing_that_is_dropped_is_told(capsys):
    settings = resolve_settings(settings_of(batching="pack", backend="transformers"))
    arguments = finetune.make_sft_config(settings)
    print_changes(settings, arguments)
    assert capsys.readouterr().out == ""
    arguments.packing = False
    print_changes(settings, arguments)
    assert "changed packing: True" in capsys.readouterr().out
