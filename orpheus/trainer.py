"""SFTTrainer for speech: sampler, checks with per-slot metrics and samples, log, guards."""

import argparse
import contextlib
import io
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from orpheus.batching import count_padded, length_batches
from orpheus.doctor import Report
from orpheus.files import write_text
from orpheus.generation import make_utterance, parts_of, speak
from orpheus.memory import GIB, peak_memory, read_config
from orpheus.runs import PREVIOUS, RANK, RANKS, last_checkpoint, record_files
from orpheus.settings import Settings, UserError
from orpheus.tokens import SAMPLE_RATE, SLOTS, TOKEN_NAMES, SpeechIds, read_speech_ids


def check_schedule(arguments, steps: int) -> None:
    """`UserError` where there is no learning rate for the first, last or any warm-up step."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=arguments.learning_rate)
    warmup, more = arguments.get_warmup_steps(steps), arguments.lr_scheduler_kwargs
    names = f"settings: lr_scheduler_type {arguments.lr_scheduler_type.value}, over {steps} steps"
    try:
        schedule = get_scheduler(
            arguments.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=more
        )
        optimizer.step()  # else torch warns of a schedule that goes ahead of its optimizer
        for schedule.last_epoch in (0, warmup - 1, steps - 1):
            schedule.step()
    except (ImportError, ValueError, TypeError, ArithmeticError) as error:
        told = f"{' '.join(str(error).split())}; change it, lr_scheduler_kwargs or warmup_steps"
        raise UserError(f"{names} of which {warmup} warm up: {told}") from None


@contextlib.contextmanager
def quiet_libraries():
    """Keeps what libraries print off the console, but for their warnings (on standard error).

    If an error passes through, what was printed before it is shown.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def held_out_metrics(model, rows: list[dict], ids: SpeechIds, dtype=None) -> dict:
    """Loss and accuracy over held-out rows: in all, and for text, slots 0 to 6 and the end.

    Row by row and 256 positions at a time, since the logits of a long row would fill a small card.
    """
    import torch

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = [*(f"slot{n}" for n in range(SLOTS)), "end", "text"]
    sums = np.zeros((3, len(kinds)))  # losses, hits, count
    autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)
    with torch.no_grad(), autocast:
        for row in rows:
            labels = torch.from_numpy(row["labels"]).to(model.device)[1:]
            inputs = torch.from_numpy(row["input_ids"]).to(model.device)[None, :-1]
            hidden = whole.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state[0]
            for part, wanted in zip(hidden.split(256), labels.split(256), strict=True):
                logits = whole.get_output_embeddings()(part).float()  # (256, vocabulary)
                kept = wanted != -100
                loss = torch.nn.functional.cross_entropy(
                    logits[kept], wanted[kept], reduction="none"
                )
                kind = (wanted[kept] - ids.audio).div(ids.codebook_size, rounding_mode="floor")
                kind[(kind < 0) | (kind >= SLOTS)] = kinds.index("text")
                kind[(wanted[kept] == ids.eos) | (wanted[kept] == ids.eoa)] = kinds.index("end")
                hits = (logits[kept].argmax(-1) == wanted[kept]).float()
                for line, values in zip(sums, (loss, hits, torch.ones_like(hits)), strict=True):
                    np.add.at(line, kind.cpu().numpy(), values.cpu().numpy())
    losses, hits, counts = sums
    metrics = {"eval_loss": losses.sum() / max(counts.sum(), 1)}
    for n in np.flatnonzero(counts):
        metrics[f"eval_loss_{kinds[n]}"] = losses[n] / counts[n]
        metrics[f"eval_accuracy_{kinds[n]}"] = hits[n] / counts[n]
    return {name: float(value) for name, value in metrics.items()} if rows else {}


def make_sample_evaluator(tokenizer, codec, settings: Settings, report: Report, held: list[dict]):
    """listen(model, step): speaks sample_texts, looks at the held-out rows; (metrics, spoken)."""
    import torch

    ids = read_speech_ids(tokenizer, codec.codebook_size)
    texts, voice = settings.sample_texts, next(iter(report.voices), None)
    base = argparse.Namespace(config=read_config(settings))
    for part in (part for text in texts for part in parts_of(text, settings)):
        make_utterance(
            base, tokenizer, ids, part, settings, voice
        )  # a UserError now, not at the end

    def listen(model, step: int, dtype=None) -> tuple[dict, list]:
        folder = sample_folder(settings, step)
        paths = [folder / f"{n:02}.wav" for n in range(1, len(texts) + 1)]
        for_inference, for_training = model.eval, model.train
        if settings.backend == "unsloth":
            for_inference, for_training = model.for_inference, model.for_training
        for_inference()
        with torch.random.fork_rng():  # does not advance the training RNG
            more = {"quiet": True}
            spoken = speak(texts, paths, model, tokenizer, codec, settings, voice, **more)
        metrics = held_out_metrics(model, held, ids, dtype)
        for_training()
        return metrics | speech_metrics(texts, spoken, report, metrics.get("eval_loss", 0)), spoken

    return listen


def sample_folder(settings: Settings, step: int) -> Path:
    return Path(settings.output_dir) / f"samples/step-{step:06}"


def speech_metrics(texts: list[str], spoken: list, report: Report, loss: float) -> dict:
    """What can be told of a voice without ears: does it end, and at the corpus's pace?

    The score orders checkpoints: the share that ended, then the pace, the held-out loss last.
    """
    if not spoken:
        return {"eval_score": -loss / 10}
    ended = sum(end for _, end in spoken) / len(spoken)
    seconds = sum(len(audio) for audio, _ in spoken) / SAMPLE_RATE
    pace = seconds / sum(map(len, texts)) / (report.seconds / report.characters)
    score = 100 * ended - 10 * min(abs(math.log(pace)), 5) - loss / 10
    return {"eval_ended": ended, "eval_pace": pace, "eval_score": score}


EAR = ("eval_ended", "eval_pace", "eval_loss")


def save_checks(trainer, out: Path) -> None:
    """The table of all checks to checks.csv, and which step came out best."""
    checks = [log for log in trainer.state.log_history if "eval_score" in log]
    if not checks:
        return
    names = ["step", *sorted({name for log in checks for name in log if name[:5] == "eval_"})]
    lines = [",".join(names)]
    lines += [",".join(f"{log.get(name, float('nan')):.6g}" for name in names) for log in checks]
    record_files(out, "checks.csv")
    write_text(out / "checks.csv", "\n".join(lines) + "\n")
    best = max(checks, key=lambda log: log["eval_score"])
    told = [f"{name[5:]} {best[name]:.3g}" for name in EAR if name in best]
    told += ["kept"] if (out / f"checkpoint-{best['step']}").is_dir() else []
    print(f"best     step {best['step']} of {len(checks)} checks: {', '.join(told)}")


def clips_in(rows, tokenizer) -> str:
    """What a batch says, be its rows a clip each or packed: the start of every prompt in it."""
    flat = rows.flatten().tolist()
    bos, eot = (tokenizer.convert_tokens_to_ids(TOKEN_NAMES[n]) for n in ("bos", "eot"))
    heads = [flat[n + 1 : n + 60] for n, token in enumerate(flat) if token == bos]
    heads = [head[: head.index(eot)] if eot in head else head for head in heads]
    return "; ".join(tokenizer.batch_decode(heads))[:500]


def length_sampler(lengths: list[int], size: int, seed: int):
    """length_batches as a torch sampler: another order every epoch, the same in every run."""
    from torch.utils.data import Sampler

    class LengthSampler(Sampler):
        epoch = 0

        def set_epoch(self, epoch: int):
            self.epoch = epoch

        def __iter__(self):
            return iter(length_batches(lengths, size, seed + self.epoch))

        def __len__(self):
            return len(lengths)

    return LengthSampler()


def training_monitor(settings: Settings, stop: dict):
    """Console, checks and stopping: one line for each logging step and for each check."""
    from accelerate.utils import gather_object
    from tqdm import tqdm
    from transformers import TrainerCallback

    class TrainingMonitor(TrainerCallback):
        bar = None

        def on_train_begin(self, args, state, control, **_):
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                leave=False,
                disable=True if RANK else None,  # None: only on a terminal
            )

        def close(self):
            """Removes the bar, so that the next line starts at the margin."""
            if self.bar is not None:
                self.bar.close()

        def on_step_end(self, args, state, control, **_):
            self.bar.update()
            last = state.global_step >= state.max_steps
            due = last or state.global_step % settings.sample_steps == 0
            control.should_evaluate = due and not args.fsdp  # its weights lie in parts
            control.should_log |= last
            if any(gather_object([bool(stop)])):  # a signal may reach one rank a step earlier
                stop.setdefault("signal", None)
                control.should_save = control.should_training_stop = True
            return control

        def on_log(self, args, state, control, logs, model=None, **_):
            if "loss" in logs:
                self.bar.write(format_step(logs, state))
            elif "eval_score" in logs:
                self.bar.write(format_check(logs, state.global_step, settings))
            for message in loss_warnings(logs, state, model.config.vocab_size):
                self.bar.write(f"warning  step {state.global_step}: {message}")

    return TrainingMonitor()


def format_step(logs: dict, state) -> str:
    """The console's line for one logging step."""
    parts = [f"step     {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.3f}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}".replace("e-0", "e-"))
    if "audio_hours" in logs:  # tokens are counted
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{logs['audio_hours']:.2f} h heard")
    parts.append(f"{logs['peak_gib']:.1f} GiB")
    parts.append(f"{format_minutes(logs['seconds_left'])} left")
    return "   ".join(parts)


def format_minutes(seconds: float) -> str:
    """1 h 02, 12 min, or 40 s."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02}" if minutes >= 60 else f"{minutes} min"


def format_check(logs: dict, step: int, settings: Settings) -> str:
    """The console's line for one check; checks.csv and TensorBoard have all of its values."""
    parts = [f"check    step {step}"]
    if "eval_loss" in logs:
        parts.append(f"held-out {logs['eval_loss']:.2f}")
        losses = [logs.get(f"eval_loss_slot{n}", math.nan) for n in range(SLOTS)]
        parts.append(f"slots 0–6: {' '.join(f'{loss:.1f}' for loss in losses)}")
    if "eval_ended" in logs:
        count = len(settings.sample_texts)
        parts += [f"ended {round(logs['eval_ended'] * count)}/{count}"]
        parts += [f"pace {logs['eval_pace']:.2f}", f"samples: {sample_folder(settings, step)}/"]
    return "   ".join(parts)


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


def trainer_class(lengths: list[int], seconds: float, listen):
    """SFTTrainer with batches of like lengths; `listen` takes the place of its evaluation.

    `seconds` of audio are in all rows together.
    """
    import torch
    from accelerate.utils import broadcast_object_list
    from trl import SFTTrainer

    class SpeechTrainer(SFTTrainer):
        slots = 0  # of all batches so far, padding included
        check_seconds = 0.0  # spent in evaluate, which is no training
        started = None  # time at which this process's first step began
        logged = None  # training seconds, tokens and steps up to the last line of the log

        def create_model_card(self, *_, **__):
            pass  # TRL's would replace output_dir/README.md at every checkpoint

        def _get_train_sampler(self, train_dataset=None):
            if self.args.packing or self.args.pad_to_multiple_of:
                return super()._get_train_sampler(train_dataset)
            return length_sampler(lengths, self._train_batch_size, self.args.seed)

        def training_step(self, model, inputs, *args, **kwargs):
            if self.started is None:
                self.started = time.perf_counter()
                self.logged = 0.0, self.state.num_input_tokens_seen, self.state.global_step
            rows = inputs["input_ids"]
            size = torch.tensor([rows.numel()], device=rows.device)
            self.slots += self.accelerator.gather(size).sum().item()
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not loss.isfinite():
                good = last_checkpoint(Path(self.args.output_dir)) or "none yet"
                told = f"loss is {loss.item()} at step {self.state.global_step + 1}"
                said = clips_in(rows, self.processing_class)
                raise UserError(f"{told}; last checkpoint: {good}; in the batch: {said}")
            return loss

        def log(self, logs, start_time=None):
            if "loss" in logs:
                seen, state = self.state.num_input_tokens_seen, self.state
                if self.args.include_num_input_tokens_seen != "no":
                    logs["audio_hours"] = seen * seconds / sum(lengths) / 3600
                    trained = seen - self._initial_num_input_tokens_seen
                    logs["useful_share"] = trained / self.slots
                logs["peak_gib"] = peak_memory() / GIB
                now = self.training_seconds(), seen, state.global_step
                spent, tokens, steps = np.subtract(now, self.logged).tolist()
                self.logged = now
                logs["tokens_per_second"] = tokens / spent
                logs["seconds_left"] = spent / steps * (state.max_steps - state.global_step)
            if "train_runtime" in logs:  # transformers' figures for the whole run
                logs["check_runtime"], whole = self.check_seconds, logs["train_runtime"]
                logs["train_runtime"] = self.training_seconds()
                for name in [name for name in logs if name.endswith("_per_second")]:
                    logs[name] *= whole / max(logs["train_runtime"], 1e-9)
            super().log(logs, start_time and start_time + self.check_seconds)

        def training_seconds(self) -> float:
            """Seconds since the first step began, without those of the checks."""
            if self.started is None:  # a run resumed at its last step
                return 0.0
            return time.perf_counter() - self.started - self.check_seconds

        def evaluate(self, *_, **__):
            started = time.perf_counter()
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            heard = ({}, []) if RANK else listen(self.model, self.state.global_step, dtype)
            metrics, spoken = broadcast_object_list([heard[0]])[0], heard[1]
            self.check_seconds += time.perf_counter() - started
            self.model.eval()  # TRL files what is logged now under evaluation
            self.log(metrics)
            self.model.train()
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            log_audio(self, spoken)
            return metrics

    return SpeechTrainer


def log_audio(trainer, spoken: list) -> None:
    """The samples of a check to TensorBoard, where it is logged to."""
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if writer := getattr(callback, "tb_writer", None):
            for n, (audio, _) in enumerate(spoken, 1):
                name = f"sample/{n:02}"
                writer.add_audio(name, audio[None], step, sample_rate=SAMPLE_RATE)


def align_special_tokens(model, tokenizer) -> None:
    """Sets the model's special tokens to the tokenizer's, as transformers' Trainer wants them."""
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
        config.eos_token_id = [tokenizer.eos_token_id, *ends] if ends else tokenizer.eos_token_id


def print_batches(trainer, lengths: list[int]) -> None:
    """How the batches are made, and the share of their slots that hold a token of a row."""
    args, size = trainer.args, trainer.args.per_device_train_batch_size
    if args.packing:
        how, slots = "packed", len(trainer.train_dataset) * args.max_length
        how += f", {args.max_length:,} tokens a row"
    elif args.pad_to_multiple_of:
        how, slots = f"padded to {args.max_length:,} tokens", len(lengths) * args.max_length
    else:
        how, slots = "padded to their longest row", count_padded(lengths, size, args.seed)
    rows = size * args.gradient_accumulation_steps * RANKS
    batches = math.ceil(len(trainer.train_dataset) / (size * RANKS))
    epoch = math.ceil(batches / args.gradient_accumulation_steps)  # optimiser steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    check_schedule(args, steps)
    used = f"{100 * sum(lengths) / slots:.1f} % used"
    print(f"batches  {how}, {used}; {rows} rows a step; {steps} steps")


@contextlib.contextmanager
def stopping_on_signals(stop: dict):
    """Fills `stop` on Ctrl-C, SIGTERM or a closed terminal; Ctrl-C after that stops at once.

    A closed terminal often sends SIGHUP twice: from the kernel, and from the shell.
    """

    def handle(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop:
            return
        stop["signal"] = number
        told = "stopping after this step, with a checkpoint (Ctrl-C again: at once, without)"
        write_unbuffered(2, "\n")  # below the progress bar
        write_unbuffered(1, "" if RANK else f"{told}\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def run_recorder(out: Path, trainer):
    """A callback that keeps the manifest, and lets the replaced run go at the first checkpoint."""
    from transformers import TrainerCallback

    class RunRecorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            for callback in trainer.callback_handler.callbacks:
                if writer := getattr(callback, "tb_writer", None):
                    folder = Path(os.path.relpath(writer.get_logdir(), out))
                    if folder.parts[0] != "..":
                        record_files(out, str(folder))

        def on_step_end(self, args, state, control, **_):
            names = [f"checkpoint-{state.global_step}"] if control.should_save else []
            names += [f"samples/step-{state.global_step:06}"] if control.should_evaluate else []
            if names and not RANK:
                record_files(out, *names)

        on_epoch_end = on_step_end

        def on_save(self, args, state, control, **_):
            if not RANK:
                shutil.rmtree(out / PREVIOUS, ignore_errors=True)

    return RunRecorder()
