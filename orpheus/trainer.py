"""SFTTrainer for speech: its batches, checks and console, and what machine and backend allow."""

import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from orpheus import memory
from orpheus.checks import format_check, loss_warnings
from orpheus.doctor import FEW_STEPS
from orpheus.models import add_old_names
from orpheus.rows import count_padded, length_batches
from orpheus.runs import RANK, WORLD_SIZE, last_checkpoint, python_command
from orpheus.settings import Settings, UserError, is_out_of_memory
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS, TOKEN_NAMES

# What we use of libraries beyond their public names: SpeechTrainer overrides _save,
# _get_train_sampler and _inner_training_loop and sets _train_batch_size, print_machine asks
# torch._C and Unsloth. Besides, these lines are kept off the console:
UNWANTED = {
    "trl.trainer.sft_trainer": "Flash Attention variant",  # SDPA keeps packed clips apart, too
    "transformers.trainer_utils": "were aligned accordingly",  # special tokens, as they should be
    "transformers.trainer": "Unsloth - 2x faster free finetuning",  # a banner
}
for logger, words in UNWANTED.items():
    logging.getLogger(logger).addFilter(lambda line, words=words: words not in line.getMessage())
# With ranks on a CPU, accelerate's device is cpu:0, where torch.load cannot put an optimiser.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
)


@dataclass
class LengthSampler:
    """Group rows of similar length into batches; the order depends on the epoch and the seed."""

    lengths: list[int]
    batch_size: int
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self):
        return iter(length_batches(self.lengths, self.batch_size, self.seed + self.epoch))

    def __len__(self):
        return len(self.lengths)


class SpeechTrainer(SFTTrainer):
    """TRL's trainer over rows of speech.

    Args:
        train_dataset: a Dataset of `input_ids` and `labels` (-100 where there is no loss).
        evaluator: `evaluator(model, step)` returns (metrics, samples), in place of TRL's
            evaluation loop. See `orpheus.checks.SampleEvaluator`.
    """

    def __init__(self, *args, train_dataset, evaluator, **kwargs):
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self.evaluator = evaluator
        self.lengths, frames = [], 0  # before packing
        for batch in train_dataset.with_format("arrow").iter(1000):
            lengths = pc.list_value_length(batch["input_ids"]).to_numpy()
            trained = pc.list_flatten(batch["labels"]).to_numpy() != -100
            starts = np.cumsum(lengths) - lengths
            frames += (np.add.reduceat(trained, starts, dtype=int) // SLOTS).sum()
            self.lengths += lengths.tolist()
        self.seconds_per_token = frames * FRAME_SAMPLES / SAMPLE_RATE / sum(self.lengths)

    def create_model_card(self, *_, **__):
        """Do nothing: TRL's card would replace output_dir/README.md at every checkpoint."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        add_old_names(Path(output_dir or self.args.output_dir))

    def _get_train_sampler(self, train_dataset=None):
        if self.args.packing or self.args.pad_to_multiple_of:
            return super()._get_train_sampler(train_dataset)
        return LengthSampler(self.lengths, self._train_batch_size, self.args.seed)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    @property
    def rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * WORLD_SIZE

    def _inner_training_loop(self, batch_size, **kwargs):
        """Train, or try to with the rows per batch that `auto_find_batch_size` has come to.

        Raises: UserError for a full GPU where fewer rows are not tried. After the first step they
            are not, since the weights would be trained already when training begins anew.
        """
        self.micro_batches = []  # (input_ids, loss) of the step so far
        self.started, self.check_seconds = time.perf_counter(), 0.0
        # Training seconds, tokens and steps: at the first step, and at the last line of the log
        self.first = self.logged = None
        if batch_size < self._train_batch_size:
            full, self._train_batch_size = self._train_batch_size, batch_size
            now = f"{self.rows_per_step} rows a step, {self.total_steps} steps"
            print(f"batches  {full} rows a batch do not fit in memory: now {batch_size}; {now}")
        try:
            return super()._inner_training_loop(batch_size, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            first = not self.first or self.first[2] == self.state.global_step
            if self.args.auto_find_batch_size and first and batch_size > 1:
                raise torch.OutOfMemoryError("GPU out of memory.") from error  # accelerate's words
            remedy = "--plan shows what fits"
            if batch_size > 1 and not self.args.auto_find_batch_size:
                remedy += ", --auto_find_batch_size true tries fewer rows"
            raise UserError(self.at_step(f"out of GPU memory; {remedy}")) from error

    def at_step(self, fault: str) -> str:
        good = last_checkpoint(Path(self.args.output_dir)) or "none yet"
        return f"step {self.state.global_step + 1}: {fault}; last checkpoint: {good}"

    def training_step(self, model, inputs, *args, **kwargs):
        if self.first is None:
            self.first = self.logged = self.progress()
        elif self.logged is self.first and self.state.global_step > self.first[2]:
            self.logged = self.progress()  # speed leaves out the first step, which compiles kernels
        input_ids = inputs["input_ids"]  # super() takes it out of `inputs`
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.micro_batches.append((input_ids, loss.detach()))
        if self.accelerator.sync_gradients:  # the step's last: the GPU is waited for once a step
            self.check_losses()
        return loss

    def check_losses(self) -> None:
        """Raises: UserError that names the texts of a micro-batch whose loss is not finite."""
        losses = torch.stack([loss for _, loss in self.micro_batches]).tolist()
        for (input_ids, _), loss in zip(self.micro_batches, losses, strict=True):
            if not math.isfinite(loss):
                prompt = "(.*?)".join(re.escape(TOKEN_NAMES[name]) for name in ("bos", "eot"))
                found = re.findall(prompt, self.processing_class.decode(input_ids.flatten()))
                fault = self.at_step(f"the loss is {loss}")
                raise UserError(f"{fault}; in the batch: {'; '.join(found)[:500]}")
        self.micro_batches = []

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.training_figures()
        super().log(logs, start_time and start_time + self.check_seconds)

    def training_figures(self) -> dict[str, float]:
        """Hours of audio so far, peak memory, speed since the last line, and the time left."""
        state, now = self.state, self.progress()
        seconds, tokens, steps = np.subtract(now, self.logged).tolist()
        figures = {
            "peak_gib": memory.peak_memory() / memory.GIB,
            "tokens_per_second": tokens / seconds,
        }
        if self.args.include_num_input_tokens_seen != "no":
            figures["audio_hours"] = now[1] * self.seconds_per_token / 3600
        if self.logged[2] > self.first[2]:
            figures["seconds_left"] = seconds / steps * (state.max_steps - state.global_step)
        self.logged = now
        return figures

    def progress(self) -> tuple[float, int, int]:
        """Return seconds in this process, without those of the checks; tokens and steps."""
        seconds = time.perf_counter() - self.started - self.check_seconds
        return seconds, self.state.num_input_tokens_seen, self.state.global_step

    def evaluate(self, *_, **__):
        started = time.perf_counter()
        metrics, samples = {}, []
        if not RANK:
            metrics, samples = self.evaluator(self.model, self.state.global_step)
        metrics = broadcast_object_list([metrics])[0]
        self.check_seconds += time.perf_counter() - started
        self.model.eval()  # TRL files what is logged now under evaluation
        self.log(metrics)
        self.model.train()
        notify = self.callback_handler.on_evaluate
        self.control = notify(self.args, self.state, self.control, metrics)
        writers = [getattr(c, "tb_writer", None) for c in self.callback_handler.callbacks]
        for writer in filter(None, writers):  # TensorBoard's, where the run reports to it
            for n, (audio, _) in enumerate(samples, 1):
                name, step = f"sample/{n:02}", self.state.global_step
                writer.add_audio(name, audio[None], step, sample_rate=SAMPLE_RATE)
        return metrics


def print_batches(trainer: SpeechTrainer) -> None:
    """Print how the batches are made, and the share of their positions that rows fill."""
    args, lengths = trainer.args, trainer.lengths
    size, steps = args.per_device_train_batch_size, trainer.total_steps
    if args.packing:
        how = f"packed, {args.max_length:,} tokens a row"
        positions = len(trainer.train_dataset) * args.max_length
    elif args.pad_to_multiple_of:
        how, positions = f"padded to {args.max_length:,} tokens", len(lengths) * args.max_length
    else:
        how, positions = "padded to their longest row", count_padded(lengths, size, args.seed)
    if steps < FEW_STEPS and args.max_steps <= 0:
        print(f"warning  only {steps} optimiser steps: raise num_train_epochs or set max_steps")
    used = f"{100 * sum(lengths) / positions:.1f} % used"
    print(f"batches  {how}, {used}; {trainer.rows_per_step} rows a step; {steps} steps")


def print_changes(settings: Settings, arguments: SFTConfig) -> None:
    """Print the settings that TRL or the backend replaced while it made its trainer."""
    requested = settings.trainer | {"packing": settings.batching == "pack"}
    requested["gradient_checkpointing"] = bool(settings.gradient_checkpointing)
    for name, value in requested.items():
        used = getattr(arguments, name)
        used = getattr(used, "value", used)
        if value not in (None, "none", used, *(used if isinstance(used, list) else [])):
            print(f"changed {name}: {value} → {used} (by the backend, for this machine)")


def print_summary(trainer: SpeechTrainer, settings: Settings, started: float) -> None:
    """Print minutes, tokens per second, peak memory, and where everything is."""
    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    (training, seen, steps), checks = trainer.progress(), trainer.check_seconds
    whole = time.perf_counter() - started
    kind = "GPU memory" if torch.cuda.is_available() else "RAM"
    times = f"training {training / 60:.1f}, checks {checks / 60:.1f}"
    print("---")
    loss = f", loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    print(f"steps    {steps}{loss}")
    print(f"minutes  {whole / 60:.1f}: {times}, setting up {(whole - training - checks) / 60:.1f}")
    if trainer.first and (tokens := seen - trainer.first[1]):
        print(f"speed    {tokens / training:,.0f} tokens/s in training")
    print(f"memory   {memory.peak_memory() / memory.GIB:.2f} GiB of {kind} at its peak")
    print(f"{'model' if settings.full_finetuning else 'adapter':9}{settings.output_dir}")
    print(f'say more: {python_command()} infer.py "…" --model {shlex.quote(settings.output_dir)}')


class TrainingMonitor(TrainerCallback):
    """Print a line for each logging step and each check, and set when a check is due."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def on_train_begin(self, args, state, control, **_):
        if torch.cuda.is_available() and self.settings.backend == "unsloth":
            print("step     the first one compiles Unsloth's kernels and takes longer")

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
        parts.append(f"{logs['audio_hours']:.2f} h of audio")
    parts.append(f"{logs['peak_gib']:.1f} GiB")
    if "seconds_left" in logs:
        parts.append(f"{timedelta(seconds=round(logs['seconds_left']))} left")
    return "   ".join(parts)


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
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
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
    """Print from a signal handler, where a buffered print could meet one that it interrupted.

    A terminal that is gone is replaced by /dev/null, for later prints, too.
    """
    try:
        os.write(file, text.encode())
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)


def resolve_settings(settings: Settings) -> Settings:
    """Return the settings with the precision decided, or raise a UserError for bf16 without it.

    `bf16` null takes bf16 where the machine has it, as a CPU always does, else fp16.
    """
    gpu = torch.cuda.is_available()
    has_bf16 = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.bf16 and not has_bf16:
        raise UserError("settings: bf16 needs an Ampere or newer GPU; set bf16 false, fp16 true")
    if settings.bf16 is not None:
        return settings
    return settings.replace(bf16=has_bf16 and not settings.fp16, fp16=settings.fp16 or not has_bf16)


def check_compatibility(settings: Settings, arguments: SFTConfig) -> None:
    """Raises: UserError for what this backend or machine cannot do, before a model is loaded."""
    cpu, unsloth, weights = arguments.use_cpu, settings.backend == "unsloth", settings.weights
    old = cpu or torch.cuda.get_device_capability() < (9, 0)
    optim = getattr(arguments.optim, "value", arguments.optim)
    lean = any(word in optim for word in ("8bit", "paged", "bnb"))
    offload = settings.gradient_checkpointing == "unsloth"
    several = arguments.auto_find_batch_size and WORLD_SIZE > 1
    refused = [
        (unsloth and cpu and weights == "8bit", 'weights "8bit" need backend "transformers" here'),
        (
            weights == "fp8" and (old or not unsloth),
            'weights "fp8" need Unsloth and an H100 or newer',
        ),
        (settings.full_finetuning and weights != "16bit", 'full_finetuning needs weights "16bit"'),
        (offload and not unsloth, 'gradient_checkpointing "unsloth" needs Unsloth; set it to true'),
        (arguments.fp16 and cpu, "fp16 needs a GPU; set bf16, or neither for fp32"),
        (lean and cpu, f"optim {optim} needs a GPU; adamw_torch_fused does not"),
        (arguments.fsdp and unsloth, 'fsdp needs backend "transformers"'),
        (several, "auto_find_batch_size works on a single GPU"),
    ]
    for condition, message in refused:
        if condition:
            raise UserError(f"settings: {message}")
    if unsloth and not cpu:
        check_compiler()
    for name in set(arguments.report_to) - set(get_available_reporting_integrations()):
        remedy = f"`pip install {name}`, if that is a tracker of transformers"
        raise UserError(f"settings: report_to {name} is not installed: {remedy}")


def check_compiler() -> None:
    """Raises: UserError where Triton could not build its launcher for Unsloth's first kernel."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    compiler = any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))
    if not compiler or not header.is_file():
        missing = "a C compiler" if not compiler else f"Python's C headers ({header})"
        packages = f"build-essential python3.{sys.version_info.minor}-dev"
        remedy = f"`sudo apt install {packages}`, or --backend transformers"
        raise UserError(f"Unsloth's kernels need {missing}: {remedy}")


def print_machine(settings: Settings, base: memory.Base) -> None:
    """Print the GPU, its memory and what the run needs of it, driver, versions and attention."""
    if not torch.cuda.is_available():
        return
    config, (free, total) = dict(settings), torch.cuda.mem_get_info()
    driver, attention = torch._C._cuda_getDriverVersion(), "sdpa"  # 12080 for CUDA 12.8
    if settings.backend == "unsloth":
        from unsloth.utils import attention_dispatch

        packed = settings.batching == "pack"
        attention = attention_dispatch.select_attention_backend(use_varlen=packed)
    sizes = free, total, memory.total_bytes(config, base)
    sizes = "{:.1f} of {:.1f} GiB free, {:.1f} planned".format(*(n / memory.GIB for n in sizes))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", settings.backend))
    driver = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    card = torch.cuda.get_device_name()
    print(f"machine  {card}, {sizes}; {driver}; {versions}; attention: {attention}")
    change = memory.smallest_change(config, base, free)
    if change != {} and not (settings.device_map or settings.trainer.get("fsdp")):
        print(f"warning  the run may not fit; what would: {memory.format_settings(change)}")
