"""SFTTrainer for speech: its batches, checks and console, and what machine and backend allow."""

import logging
import math
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from orpheus.checks import format_check, loss_warnings
from orpheus.doctor import FEW_STEPS
from orpheus.memory import GIB, peak_memory
from orpheus.models import add_old_names
from orpheus.rows import count_padded, length_batches
from orpheus.runs import RANK, WORLD_SIZE, last_checkpoint, python_command
from orpheus.settings import Settings, UserError, is_out_of_memory, parse_trainer_keys
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS, TOKEN_NAMES

# What we use of libraries beyond their public names: SpeechTrainer overrides _save,
# _get_train_sampler and _inner_training_loop and sets _train_batch_size, print_machine asks
# torch._C and Unsloth. Besides, these lines are kept off the console:
UNWANTED = {
    # SDPA keeps packed clips apart as well, by their position_ids: tests/test_rows.py
    "trl.trainer.sft_trainer": "Flash Attention variant",
    # the model's special tokens become the tokenizer's, as they should
    "transformers.trainer_utils": "were aligned accordingly",
    # a banner that says once more what our lines say
    "transformers.trainer": "Unsloth - 2x faster free finetuning",
}
for logger, words in UNWANTED.items():
    logging.getLogger(logger).addFilter(lambda line, words=words: words not in line.getMessage())
# With ranks on a CPU, accelerate's device is cpu:0, where torch.load cannot put an optimiser.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
)


# ---------------------------------------------------------------- the trainer


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
        self.check_seconds = 0.0  # time spent in `evaluate`
        self.started = None  # when the first step of this process began
        self.first = None, 0  # the steps and tokens before it
        self.logged = None  # training seconds, tokens and steps at the last line of the log
        if batch_size < self._train_batch_size:
            full, self._train_batch_size = self._train_batch_size, batch_size
            now = f"{self.rows_per_step} rows a step, {self.total_steps} steps"
            print(f"batches  {full} rows a batch do not fit in memory: now {batch_size}; {now}")
        try:
            return super()._inner_training_loop(batch_size, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            first = self.first[0] in (None, self.state.global_step)
            if self.args.auto_find_batch_size and first and batch_size > 1:
                raise torch.OutOfMemoryError("GPU out of memory.") from error  # accelerate's words
            remedy = "--plan shows what fits"
            remedy += ", --auto_find_batch_size true tries fewer rows" if batch_size > 1 else ""
            raise UserError(self.at_step(f"out of GPU memory; {remedy}")) from error

    def at_step(self, fault: str) -> str:
        good = last_checkpoint(Path(self.args.output_dir)) or "none yet"
        return f"step {self.state.global_step + 1}: {fault}; last checkpoint: {good}"

    def training_step(self, model, inputs, *args, **kwargs):
        tokens, step = self.state.num_input_tokens_seen, self.state.global_step
        if self.started is None:
            self.started, self.first = time.perf_counter(), (step, tokens)
            self.logged = 0.0, tokens, step
        elif self.logged[2] == self.first[0] < step:  # the first step also compiles kernels
            self.logged = self.training_seconds(), tokens, step
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
                texts = decode_prompts(input_ids, self.processing_class)
                raise UserError(f"{self.at_step(f'the loss is {loss}')}; in the batch: {texts}")
        self.micro_batches = []

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.training_figures()
        super().log(logs, start_time and start_time + self.check_seconds)

    def training_figures(self) -> dict[str, float]:
        """Hours of audio so far, peak memory, speed since the last line, and the time left."""
        state, seen = self.state, self.state.num_input_tokens_seen
        now = self.training_seconds(), seen, state.global_step
        seconds, tokens, steps = np.subtract(now, self.logged).tolist()
        figures = {"peak_gib": peak_memory() / GIB, "tokens_per_second": tokens / seconds}
        if self.args.include_num_input_tokens_seen != "no":
            figures["audio_hours"] = seen * self.seconds_per_token / 3600
        if self.logged[2] > self.first[0]:
            figures["seconds_left"] = seconds / steps * (state.max_steps - state.global_step)
        self.logged = now
        return figures

    def training_seconds(self) -> float:
        """Seconds since the first step began, without those of the checks."""
        if self.started is None:  # a run resumed at its last step
            return 0.0
        return time.perf_counter() - self.started - self.check_seconds

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


def decode_prompts(input_ids: torch.Tensor, tokenizer) -> str:
    """The texts in a batch, of one clip a row or of many: the start of every prompt in it."""
    flat = input_ids.flatten().tolist()
    bos, eot = (tokenizer.convert_tokens_to_ids(TOKEN_NAMES[n]) for n in ("bos", "eot"))
    texts = [flat[n + 1 : n + 60] for n, token in enumerate(flat) if token == bos]
    texts = [text[: text.index(eot)] if eot in text else text for text in texts]
    return "; ".join(tokenizer.batch_decode(texts))[:500]


# ---------------------------------------------------------------- the console


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
    training, checks = trainer.training_seconds(), trainer.check_seconds
    whole = time.perf_counter() - started
    memory = "GPU memory" if torch.cuda.is_available() else "RAM"
    times = f"training {training / 60:.1f}, checks {checks / 60:.1f}"
    print("---")
    loss = f", loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    print(f"steps    {trainer.state.global_step}{loss}")
    print(f"minutes  {whole / 60:.1f}: {times}, setting up {(whole - training - checks) / 60:.1f}")
    tokens = trainer.state.num_input_tokens_seen - trainer.first[1]
    if tokens and training:
        print(f"speed    {tokens / training:,.0f} tokens/s in training")
    print(f"memory   {peak_memory() / GIB:.2f} GiB of {memory} at its peak")
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
        parts.append(f"{format_duration(logs['seconds_left'])} left")
    return "   ".join(parts)


def format_duration(seconds: float) -> str:
    """1 h 02, 12 min, or 40 s."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02}" if minutes >= 60 else f"{minutes} min"


# ---------------------------------------------------------------- stopping


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


# ---------------------------------------------------------------- what the machine allows


def resolve_settings(settings: Settings) -> Settings:
    """Return the settings with SFTConfig's keys in its types, and the precision decided.

    `bf16` null takes bf16 where the GPU has it, else fp16; a CPU computes in bf16 with or without
    instructions for it.

    Raises: UserError for a value that SFTConfig does not take, or bf16 on a GPU without it.
    """
    hints = get_type_hints(SFTConfig) | {"fsdp": bool | str | None}  # it takes true, which says str
    settings = parse_trainer_keys(settings, hints)
    gpu = torch.cuda.is_available()
    has_bf16 = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    bf16, fp16 = settings.bf16, settings.fp16
    if bf16 and not has_bf16:
        raise UserError("settings: bf16 needs an Ampere or newer GPU; set bf16 false, fp16 true")
    if bf16 is None:
        bf16, fp16 = has_bf16 and not fp16, fp16 or not has_bf16
    return settings.replace(bf16=bf16, fp16=fp16)


def check_compatibility(settings: Settings, arguments: SFTConfig) -> None:
    """Raises: UserError for what this backend or machine cannot do, before a model is loaded."""
    gpu, unsloth = torch.cuda.is_available(), settings.backend == "unsloth"
    weights = settings.weights
    new = gpu and torch.cuda.get_device_capability() >= (9, 0)
    optim = getattr(arguments.optim, "value", arguments.optim)
    lean = any(word in optim for word in ("8bit", "paged", "bnb"))
    refused = {
        'weights "8bit" need a GPU, or backend "transformers"': (
            weights == "8bit" and unsloth and not gpu
        ),
        'weights "fp8" need a GPU such as an H100 or RTX 50, and backend "unsloth"': (
            weights == "fp8" and not (new and unsloth)
        ),
        'full_finetuning needs weights "16bit"': settings.full_finetuning and weights != "16bit",
        'gradient_checkpointing "unsloth" needs backend "unsloth"; set it to true': (
            settings.gradient_checkpointing == "unsloth" and not unsloth
        ),
        "fp16 needs a GPU; set bf16, or neither for fp32": arguments.fp16 and not gpu,
        f"optim {optim} needs a GPU; adamw_torch_fused does not": lean and not gpu,
        'fsdp needs backend "transformers"': bool(arguments.fsdp) and unsloth,
        "auto_find_batch_size works on a single GPU; set per_device_train_batch_size": (
            arguments.auto_find_batch_size and WORLD_SIZE > 1
        ),
    }
    for message in (message for message, condition in refused.items() if condition):
        raise UserError(f"settings: {message}")
    if gpu and unsloth:
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


def print_machine(settings: Settings) -> None:
    """Print the GPU, what is free of its memory, its driver, the versions and the attention."""
    if not torch.cuda.is_available():
        return
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    driver, attention = torch._C._cuda_getDriverVersion(), "sdpa"  # 12080 for CUDA 12.8
    if settings.backend == "unsloth":
        from unsloth.utils import attention_dispatch as unsloth

        packed = settings.batching == "pack"
        attention = unsloth.select_attention_backend(use_varlen=packed)
        if packed and attention == unsloth.SDPA:  # torch's for rows of several clips, or slow calls
            varlen = unsloth._NATIVE_BEATS_XFORMERS
            attention = "torch varlen" if varlen else "sdpa for each clip (install xformers)"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", settings.backend))
    card = f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free"
    driver = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    print(f"machine  {card}; {driver}; {versions}; attention: {attention}")
    if total - free > 1.5:  # CUDA itself takes some 0.5
        print(f"warning  others use about {total - free - 0.5:.1f} GiB of it: see nvidia-smi")
