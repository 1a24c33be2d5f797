"""The run's callbacks: stopping on signals, and warnings about the loss."""

import os
import re
import signal
from types import SimpleNamespace

import pytest
from running import run_here

from orpheus.callbacks import StopOnSignal, loss_warnings, write_unbuffered
from orpheus.hub import is_adapter
from orpheus.runs import python_command


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


def test_a_loss_that_rises_is_a_warning(tmp_path, monkeypatch, capsys):
    from trl import SFTTrainer

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
    from trl import SFTTrainer

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
