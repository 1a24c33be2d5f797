"""Fine-tunes Orpheus-TTS on a folder of clips: 4-bit LoRA with Unsloth and TRL, on one GPU.

    python finetune.py --dataset my_voice --output_dir outputs/my_voice
    python finetune.py --config data/demo/config.json     # the demo, on any machine
    python finetune.py --resume                           # go on after a stop

Every key of config.json can be given as --key value, and so can every key of TRL's SFTConfig.
"""

import json
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import infer
from data import prepare
from infer import Mistake, Settings

# ---------------------------------------------------------------- before anything is loaded


def check_output(settings: Settings) -> Path | None:
    """The checkpoint to go on from. `Mistake` where a run would be lost, or nothing be written."""
    out = Path(settings.output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise Mistake(f"{out}: cannot be written: {error.strerror}; try --output_dir") from None
    finished, checkpoint = infer.is_adapter(out), last_checkpoint(out)
    if settings.resume:
        if finished:
            print(f"{out} holds a finished run: nothing to resume (--overwrite starts anew)")
            sys.exit(0)
        if checkpoint is None:
            print(f"{out} holds no checkpoint: starting from the beginning")
        return checkpoint
    if not settings.overwrite and (finished or checkpoint):
        what = "a finished run:" if finished else "an unfinished run: --resume goes on,"
        raise Mistake(f"{out} holds {what} --overwrite replaces it, --output_dir goes elsewhere")
    return None


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint: one whose trainer_state.json parses, which is written last."""
    checkpoints = [p for p in out.glob("checkpoint-*") if p.name[11:].isdigit()]
    for path in sorted(checkpoints, key=lambda p: int(p.name[11:]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            print(f"{path} was not written to its end: passed over")
    return None


def check_machine(settings: Settings) -> None:
    """Orpheus-3B is not started on a CPU; a local model, which may be small, is."""
    import torch

    if not torch.cuda.is_available() and not os.path.isdir(settings.model):
        raise Mistake(
            f"no GPU here: {settings.model} would take days on a CPU; "
            "`make demo` runs the same path on a tiny model, and --model takes a local folder"
        )


# ---------------------------------------------------------------- settings for the trainer


def trainer_arguments(settings: Settings):
    """SFTConfig from every key it knows. A key unknown to all is a `Mistake`; what a backend
    replaced is printed, since a remedy that is not in force must not look as if it were."""
    from typing import get_type_hints

    from trl import SFTConfig

    hints = get_type_hints(SFTConfig)
    for name, (value, source) in settings.trainer.items():
        if name not in hints:
            raise infer.unknown_key(name, [*infer.OWN_KEYS, *hints], source)
        settings.trainer[name] = infer.checked(name, value, hints[name], source), source
    asked = {name: value for name, value in settings.flat().items() if name in hints}
    asked["gradient_checkpointing"] = bool(settings.gradient_checkpointing)
    try:
        arguments = SFTConfig(**asked)
    except (ValueError, ImportError) as error:
        raise Mistake(f"settings: {' '.join(str(error).split())}") from None
    for name, value in asked.items():
        used = getattr(arguments, name)
        used = getattr(used, "value", used)
        if value not in (None, "none", used):
            print(f"changed {name}: {value} is not for this machine, {used} is used")
    return arguments


# ---------------------------------------------------------------- model

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_model(settings: Settings):
    """The base through Unsloth, 4-bit where asked, with LoRA on every linear layer."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        settings.model, max_seq_length=settings.max_length, load_in_4bit=settings.load_in_4bit
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
        use_gradient_checkpointing=settings.gradient_checkpointing,
        random_state=settings.seed,
    )
    # Unsloth may have loaded another repository's 4-bit copy; the adapter names what was asked for.
    model.peft_config["default"].base_model_name_or_path = infer.local(settings.model)
    return model


def check_context(settings: Settings) -> None:
    """`Mistake` where max_length is more than the base can see."""
    from transformers import AutoConfig

    folder = infer.fetch(settings.model, ["config.json"])
    try:
        context = AutoConfig.from_pretrained(str(folder)).max_position_embeddings
    except (OSError, ValueError) as error:
        raise Mistake(f"{folder}: no model that loads: {str(error).splitlines()[0]}") from None
    if settings.max_length > context:
        over = f"max_length {settings.max_length} is over"
        raise Mistake(f"{over} the {context} tokens that {settings.model} sees")


# ---------------------------------------------------------------- training


def make_trainer(model, tokenizer, rows: list[dict], arguments, stop: dict):
    """SFTTrainer over ready rows; says how its batches are made."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class StopOnSignal(TrainerCallback):
        """Ctrl-C or a kill ends the run after the step at hand, with a checkpoint."""

        def on_step_end(self, args, state, control, **_):
            if stop:
                control.should_save = control.should_training_stop = True
            return control

    asked = arguments.packing
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[StopOnSignal()],
    )
    if asked and not trainer.args.packing:
        print("changed packing: Unsloth turned it off when the trainer was made")
    how = "packed rows" if trainer.args.packing else "each padded to its longest row"
    size, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    print(f"batches {how}; {size} rows × {steps} for a step")
    return trainer


def train(trainer, settings: Settings, checkpoint: Path | None, stop: dict) -> float:
    """Trains to the end and returns the epochs done; on a signal saves, says how to go on."""

    def handle(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop["signal"] = number
        print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)")

    begin = infer.read_json(checkpoint / "trainer_state.json")["epoch"] if checkpoint else 0
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    state = trainer.state
    if stop and state.global_step < state.max_steps:
        again = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        print(f"stopped at step {state.global_step}; checkpoint in {settings.output_dir}")
        print(f"go on with: {shlex.join(['python', *again, '--resume'])}")
        sys.exit(130)
    return state.epoch - begin


def clear_run(out: Path) -> None:
    """Takes away what an earlier run left in output_dir, and nothing else."""
    for path in [*out.glob("checkpoint-*"), out / "samples"]:
        shutil.rmtree(path, ignore_errors=True)
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    for name in (*adapter, infer.SAVED_CONFIG, infer.SAVED_REPORT):
        (out / name).unlink(missing_ok=True)


# ---------------------------------------------------------------- what a run leaves


def save_config(settings: Settings) -> None:
    """The resolved settings, with paths that hold from any folder; checkpoints need them, too."""
    flat = settings.flat() | {"overwrite": False, "resume": False}
    for name in ("model", "codec", "dataset"):
        flat[name] = infer.local(flat[name])
    path = Path(settings.output_dir) / infer.SAVED_CONFIG
    infer.write_text(path, json.dumps(flat, indent=2, ensure_ascii=False) + "\n")


def save_adapter(model, tokenizer, out: Path) -> None:
    """Adapter and tokenizer, written aside and renamed into `out`, adapter_config.json last."""
    part = out / ".adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))
    for path in sorted(part.iterdir(), key=lambda p: p.name == "adapter_config.json"):
        os.replace(path, out / path.name)
    part.rmdir()


def speak_samples(model, tokenizer, codec, settings: Settings, report: prepare.Report) -> None:
    """Each of sample_texts to output_dir/samples, in the first voice of the data."""
    from unsloth import FastLanguageModel

    texts, folder = settings.sample_texts, Path(settings.output_dir) / "samples"
    paths = [folder / f"{n:02}.wav" for n in range(1, len(texts) + 1)]
    voice = next(iter(report.voices), None)
    model = FastLanguageModel.for_inference(model)
    infer.speak(texts, paths, model, tokenizer, codec, settings, voice)


def end_block(settings: Settings, trainer, tokens: float, started: float) -> None:
    """Minutes, tokens per second, peak memory, and where everything is."""
    import torch

    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log] or [logs[-1]["train_loss"]]
    trained, whole = logs[-1]["train_runtime"], time.perf_counter() - started  # seconds
    peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "RAM"
    if torch.cuda.is_available():
        peak, where = torch.cuda.max_memory_reserved(), "GPU memory"
    print("---")
    print(f"steps    {trainer.state.global_step}, loss {losses[0]:.3f} → {losses[-1]:.3f}")
    print(f"minutes  {whole / 60:.1f}, of which training {trained / 60:.1f}")
    print(f"speed    {tokens / trained:,.0f} tokens/s")
    print(f"memory   {peak / 2**30:.2f} GiB of {where} at its peak")
    print(f"adapter  {settings.output_dir}")
    print(f'say more: python infer.py "…" --model {shlex.quote(settings.output_dir)}')


# ---------------------------------------------------------------- command line


def main() -> None:
    started = time.perf_counter()
    settings = infer.read_command_line(__doc__)
    checkpoint = check_output(settings)
    clips = prepare.read_clips(settings)
    check_machine(settings)
    import unsloth  # noqa: F401  before trl, transformers and peft, which it patches

    arguments = trainer_arguments(settings)
    check_context(settings)
    tokenizer = infer.load_tokenizer(infer.fetch(settings.model, infer.TOKENIZER_FILES))
    codec = infer.load_codec(settings.codec, infer.device())
    rows, report = prepare.make_rows(clips, settings, tokenizer, codec)
    report.tell(settings.max_length)
    model, stop = load_model(settings), {}
    trainer = make_trainer(model, tokenizer, rows, arguments, stop)
    out = Path(settings.output_dir)
    if settings.overwrite and not settings.resume:
        clear_run(out)
    save_config(settings)
    report.save(out / infer.SAVED_REPORT)
    epochs = train(trainer, settings, checkpoint, stop)
    save_adapter(trainer.model, tokenizer, out)
    speak_samples(trainer.model, tokenizer, codec, settings, report)
    end_block(settings, trainer, report.tokens * epochs, started)


if __name__ == "__main__":
    infer.run(main)
