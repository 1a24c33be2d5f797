"""SFTTrainer with length-grouped batches, loss checks, throughput figures and spoken samples."""

import functools
import logging
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from trl import SFTTrainer

from orpheus.callbacks import log_samples
from orpheus.compatibility import check_schedule
from orpheus.doctor import FEW_STEPS
from orpheus.memory import GIB, peak_memory
from orpheus.models import add_old_names
from orpheus.rows import count_padded, length_batches
from orpheus.runs import RANK, WORLD_SIZE, last_checkpoint, python_command
from orpheus.settings import Settings, UserError
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS, TOKEN_NAMES

# With ranks on a CPU, accelerate's device is cpu:0, where torch.load cannot put an optimiser.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
)
# TRL warns that only flash attention keeps packed clips apart. SDPA does so as well, by their
# position_ids: tests/test_rows.py compares it with each row alone.
logging.getLogger("trl.trainer.sft_trainer").addFilter(
    lambda record: "Flash Attention variant" not in record.getMessage()
)


class LengthSampler(torch.utils.data.Sampler):
    """Groups rows of similar length into batches; the order depends on the epoch and the seed."""

    epoch = 0

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed

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
        self.lengths = [len(row) for row in train_dataset["input_ids"]]  # before packing
        frames = sum((np.array(row) != -100).sum() // SLOTS for row in train_dataset["labels"])
        self.seconds_per_token = frames * FRAME_SAMPLES / SAMPLE_RATE / sum(self.lengths)
        self.positions = 0  # in this rank's batches so far, padding included
        self.micro_batches = []  # (input_ids, loss) of the step so far
        self.check_seconds = 0.0  # time spent in `evaluate`
        self.started = None  # when this process's first step began
        self.logged = None  # training seconds, tokens and steps at the last line of the log

    def create_model_card(self, *_, **__):
        """Does nothing: TRL's card would replace output_dir/README.md at every checkpoint."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        add_old_names(Path(output_dir or self.args.output_dir))

    def _get_train_sampler(self, train_dataset=None):
        if self.args.packing or self.args.pad_to_multiple_of:
            return super()._get_train_sampler(train_dataset)
        return LengthSampler(self.lengths, self._train_batch_size, self.args.seed)

    @functools.cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def training_step(self, model, inputs, *args, **kwargs):
        if self.started is None:
            self.started = time.perf_counter()
            self.logged = 0.0, self.state.num_input_tokens_seen, self.state.global_step
        input_ids = inputs["input_ids"]
        self.positions += input_ids.numel()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.micro_batches.append((input_ids, loss.detach()))
        if self.accelerator.sync_gradients:  # the step's last: the GPU is waited for once a step
            self.check_losses()
        return loss

    def check_losses(self) -> None:
        """`UserError` that names the texts of a micro-batch whose loss is not finite."""
        losses = torch.stack([loss for _, loss in self.micro_batches]).tolist()
        for (input_ids, _), loss in zip(self.micro_batches, losses, strict=True):
            if not math.isfinite(loss):
                good = last_checkpoint(Path(self.args.output_dir)) or "none yet"
                texts = decode_prompts(input_ids, self.processing_class)
                raise UserError(
                    f"loss is {loss} at step {self.state.global_step + 1}; "
                    f"last checkpoint: {good}; in the batch: {texts}"
                )
        self.micro_batches = []

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.training_figures()
        if "train_runtime" in logs:  # transformers' figures for the whole run, checks included
            logs["check_runtime"], whole = self.check_seconds, logs["train_runtime"]
            logs["train_runtime"] = self.training_seconds()
            for name in [name for name in logs if name.endswith("_per_second")]:
                logs[name] *= whole / max(logs["train_runtime"], 1e-9)
        super().log(logs, start_time and start_time + self.check_seconds)

    def training_figures(self) -> dict[str, float]:
        """Hours of audio and useful share so far, peak memory, speed since the last line."""
        state, figures = self.state, {"peak_gib": peak_memory() / GIB}
        seen = state.num_input_tokens_seen
        if self.args.include_num_input_tokens_seen != "no":
            positions = torch.tensor([self.positions], device=self.args.device)
            trained = seen - self._initial_num_input_tokens_seen
            figures["audio_hours"] = seen * self.seconds_per_token / 3600
            figures["useful_share"] = trained / self.accelerator.gather(positions).sum().item()
        now = self.training_seconds(), seen, state.global_step
        seconds, tokens, steps = np.subtract(now, self.logged).tolist()
        self.logged = now
        figures["tokens_per_second"] = tokens / seconds
        figures["seconds_left"] = seconds / steps * (state.max_steps - state.global_step)
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
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        log_samples(self, samples)
        return metrics


def decode_prompts(input_ids: torch.Tensor, tokenizer) -> str:
    """The texts in a batch, of one clip a row or of many: the start of every prompt in it."""
    flat = input_ids.flatten().tolist()
    bos, eot = (tokenizer.convert_tokens_to_ids(TOKEN_NAMES[n]) for n in ("bos", "eot"))
    texts = [flat[n + 1 : n + 60] for n, token in enumerate(flat) if token == bos]
    texts = [text[: text.index(eot)] if eot in text else text for text in texts]
    return "; ".join(tokenizer.batch_decode(texts))[:500]


def align_special_tokens(model, tokenizer) -> None:
    """Sets the model's special tokens to the tokenizer's, as transformers' Trainer wants them."""
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
        config.eos_token_id = [tokenizer.eos_token_id, *ends] if ends else tokenizer.eos_token_id


def print_batches(trainer: SpeechTrainer) -> None:
    """Prints how the batches are made, and the share of their positions that rows fill.

    `UserError` where the learning-rate schedule does not work for this number of steps.
    """
    args, lengths = trainer.args, trainer.lengths
    size, steps = args.per_device_train_batch_size, trainer.total_steps
    if args.packing:
        how = f"packed, {args.max_length:,} tokens a row"
        positions = len(trainer.train_dataset) * args.max_length
    elif args.pad_to_multiple_of:
        how, positions = f"padded to {args.max_length:,} tokens", len(lengths) * args.max_length
    else:
        how, positions = "padded to their longest row", count_padded(lengths, size, args.seed)
    check_schedule(args, steps)
    if steps < FEW_STEPS and args.max_steps <= 0:
        print(f"warning  only {steps} optimiser steps: raise num_train_epochs or set max_steps")
    rows = size * args.gradient_accumulation_steps * WORLD_SIZE
    used = f"{100 * sum(lengths) / positions:.1f} % used"
    print(f"batches  {how}, {used}; {rows} rows a step; {steps} steps")


def print_summary(trainer: SpeechTrainer, settings: Settings, tokens: int, started: float) -> None:
    """Prints minutes, tokens per second, peak memory, and where everything is."""
    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    training, checks = logs[-1]["train_runtime"], logs[-1]["check_runtime"]  # seconds
    whole = time.perf_counter() - started
    memory = "GPU memory" if torch.cuda.is_available() else "RAM"
    times = f"training {training / 60:.1f}, checks {checks / 60:.1f}"
    print("---")
    loss = f", loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    print(f"steps    {trainer.state.global_step}{loss}")
    print(f"minutes  {whole / 60:.1f}: {times}, setting up {(whole - training - checks) / 60:.1f}")
    if tokens:
        print(f"speed    {tokens / training:,.0f} tokens/s in training")
    print(f"memory   {peak_memory() / GIB:.2f} GiB of {memory} at its peak")
    print(f"adapter  {settings.output_dir}")
    print(f'say more: {python_command()} infer.py "…" --model {shlex.quote(settings.output_dir)}')
