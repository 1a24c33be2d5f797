"""Callbacks of a run: the console's lines and warnings, stopping on signals."""

import math
import os
import signal

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback

from orpheus.checks import format_check
from orpheus.runs import RANK
from orpheus.settings import Settings
from orpheus.tokens import SAMPLE_RATE, SLOTS


class TrainingMonitor(TrainerCallback):
    """Prints a line for each logging step and each check, and sets when a check is due."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def on_step_end(self, args, state, control, **_):
        last = state.global_step >= state.max_steps
        due = last or state.global_step % self.settings.sample_steps == 0
        control.should_evaluate = due and not args.fsdp  # FSDP's ranks hold parts of the weights
        control.should_log |= last
        return control

    def on_log(self, args, state, control, logs, model=None, **_):
        if "loss" in logs:
            print(format_step(logs, state))
        elif "eval_score" in logs:
            print(format_check(logs, state.global_step, self.settings))
        for message in loss_warnings(logs, state, model.config.vocab_size):
            print(f"warning  step {state.global_step}: {message}")


def format_step(logs: dict, state) -> str:
    """The console's line for one logging step."""
    parts = [f"step     {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.3f}"]
    parts.append(f"lr {logs['learning_rate']:.1e}".replace("e-0", "e-"))
    if "audio_hours" in logs:  # tokens are counted
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{logs['audio_hours']:.2f} h heard")
    parts.append(f"{logs['peak_gib']:.1f} GiB")
    parts.append(f"{format_duration(logs['seconds_left'])} left")
    return "   ".join(parts)


def format_duration(seconds: float) -> str:
    """1 h 02, 12 min, or 40 s."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02}" if minutes >= 60 else f"{minutes} min"


STALLED_STEPS = 50  # a loss near that of guessing is normal at first, if it falls


def loss_warnings(logs: dict, state, vocab_size: int) -> list[str]:
    """Signs of rows that were tokenised wrongly, or of a learning rate that is too high."""
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


class StopOnSignal(TrainerCallback):
    """While entered: Ctrl-C, SIGTERM or a closed terminal end the run after a checkpoint.

    Ctrl-C after that stops at once. A closed terminal often sends SIGHUP twice: from the kernel,
    and from the shell.
    """

    requested = False

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested = True
        message = "stopping after this step, with a checkpoint (Ctrl-C again: at once, without)"
        write_unbuffered(2, "\n")  # below the terminal's ^C
        write_unbuffered(1, "" if RANK else f"{message}\n")

    def on_step_end(self, args, state, control, **_):
        if any(gather_object([self.requested])):  # a signal may reach one rank a step earlier
            self.requested = control.should_save = control.should_training_stop = True
        return control


def write_unbuffered(file: int, text: str) -> None:
    """For signal handlers. A terminal that is gone is replaced by /dev/null, for later prints too.

    A buffered print could meet the one that the signal interrupted.
    """
    try:
        os.write(file, text.encode())
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file)
        os.close(null)


def tensorboard_writers(trainer) -> list:
    callbacks = trainer.callback_handler.callbacks
    return [c.tb_writer for c in callbacks if getattr(c, "tb_writer", None)]


def log_samples(trainer, samples: list) -> None:
    """The spoken samples of a check to TensorBoard, where the run reports to it."""
    for writer in tensorboard_writers(trainer):
        for n, (audio, _) in enumerate(samples, 1):
            step = trainer.state.global_step
            writer.add_audio(f"sample/{n:02}", audio[None], step, sample_rate=SAMPLE_RATE)
