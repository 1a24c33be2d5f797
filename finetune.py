"""Fine-tunes Orpheus-TTS on a folder of clips: 4-bit LoRA with Unsloth and TRL, on one GPU.

    python finetune.py --dataset my_voice --output_dir outputs/my_voice
    python finetune.py --config data/demo/config.json     # the demo, on any machine
    python finetune.py --plan                             # will it fit? where the memory goes
    python finetune.py --resume                           # continue after a stop
    torchrun --nproc-per-node 2 finetune.py               # two GPUs; accelerate launch does as well

Every key can stand in config.json, or be given as --key value: these, and those of TRL's SFTConfig.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from orpheus import runs
from orpheus.files import (
    MODEL_FILES,
    TOKENIZER_FILES,
    absolute_path_or_hub_id,
    check_weights,
    fetch,
)
from orpheus.settings import (
    Settings,
    UserError,
    quiet_libraries,
    read_command_line,
    read_json,
    run,
)


def main() -> None:
    started = time.perf_counter()
    settings = read_command_line(__doc__)
    if settings.plan:
        from orpheus import memory, trainer

        settings = trainer.resolve_settings(settings)
        memory.print_plan(settings, memory.read_base(settings))
        return
    if runs.RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first rank prints for all
    out = Path(settings.output_dir)
    with contextlib.nullcontext() if runs.RANK else runs.lock_folder(out):
        fine_tune(settings, started)


def import_backend(settings: Settings) -> None:
    """Imports unsloth before transformers, trl and peft, which it patches."""
    print(f"loading  torch, trl and {settings.backend}")
    if settings.backend == "unsloth":
        # Unsloth counts runs by downloading from the hub, and waits minutes for one that is down
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        with quiet_libraries():
            import unsloth  # noqa: F401


def fine_tune(settings: Settings, started: float) -> None:
    """From clips to an adapter, in an output_dir that is this process's own."""
    from orpheus import clips

    # 1. What the output folder and the dataset hold
    out, checkpoint = Path(settings.output_dir), runs.find_checkpoint(settings)
    if checkpoint and runs.is_finished(settings, checkpoint):
        longer = "a higher max_steps or num_train_epochs trains it longer"
        print(f"{out} holds a finished run of this length: nothing to resume ({longer})")
        return
    if settings.resume and not checkpoint:
        print(f"warning  no complete checkpoint in {out}: training starts from the beginning")
    dataset = clips.read_clips(settings)
    import_backend(settings)
    from orpheus import checks, codec, doctor, memory, models, rows, trainer

    # 2. The settings, as this machine and its memory allow
    models.check_machine(settings.model)
    settings = trainer.resolve_settings(settings)
    arguments = make_sft_config(settings)
    trainer.check_compatibility(settings, arguments)
    trainer.print_machine(settings)
    memory.print_memory(settings, memory.read_base(settings))
    if checkpoint and arguments.auto_find_batch_size:  # go on with the rows that it came to
        state = read_json(checkpoint / "trainer_state.json")
        arguments.per_device_train_batch_size = state["train_batch_size"]

    # 3. Clips → rows of tokens, before the base is loaded
    tokenizer = models.load_tokenizer(fetch(settings.model, TOKENIZER_FILES))
    snac = codec.load_codec(settings.codec, models.device())
    train_rows, held_out, report = rows.make_rows(dataset, settings, tokenizer, snac)
    report.print_summary(settings)
    doctor.warn_of_few_clips(report)
    if checkpoint:
        runs.check_resumed(settings, report.digest, checkpoint)
    runs.set_aside(settings)
    evaluator = checks.SampleEvaluator(tokenizer, snac, settings, report, held_out)

    # 4. The base with a LoRA, and the trainer
    model = load_model(settings, arguments)
    sft_trainer = make_trainer(model, tokenizer, train_rows.dataset, arguments, settings, evaluator)
    trainer.print_changes(settings, sft_trainer.args)

    # 5. Training, and saving
    if not runs.RANK:
        runs.save_config(settings)
        report.save(out)
    tokens = train(sft_trainer, settings, checkpoint)
    with runs.reporting_full_disk(out, lambda: "the adapter"):
        save_model(sft_trainer, tokenizer, out)

    # 6. The table of the checks, the model card, and a summary
    if not runs.RANK:
        checks.save_checks(sft_trainer.state.log_history, out)
        runs.save_card(settings)
    trainer.print_summary(sft_trainer, settings, tokens, started)


def make_sft_config(settings: Settings):
    """TRL's SFTConfig: every key of it in the settings, and those that follow from other keys."""
    import torch
    from trl import SFTConfig

    from orpheus.trainer import use_one_gpu

    pad_to_max = settings.batching == "pad_to_max"
    try:
        arguments = SFTConfig(
            **settings.trainer  # has output_dir, seed and max_length, too
            | {
                "packing": settings.batching == "pack",
                "padding_free": False,  # else Unsloth flattens padded batches; packing turns it on
                "pad_to_multiple_of": settings.max_length if pad_to_max else None,
                "gradient_checkpointing": bool(settings.gradient_checkpointing),
                "use_cpu": not torch.cuda.is_available(),
                "eval_strategy": "no",  # TrainingMonitor evaluates every sample_steps
                "metric_for_best_model": "eval_score",  # keeps the best checkpoint from rotation
                "greater_is_better": True,
            }
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"settings: {error}") from error
    use_one_gpu(arguments)
    return arguments


def load_model(settings: Settings, arguments):
    """Loads the base, quantised as `weights` says, and adds a LoRA to its linear layers."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from orpheus.models import check_loaded, settle_model, training_dtype

    load = load_with_unsloth if settings.backend == "unsloth" else load_with_transformers
    # Never left to a library: Unsloth would take bfloat16 wherever the machine has it
    dtype = training_dtype(arguments)
    if settings.full_finetuning and arguments.fp16:  # the gradient scaler needs fp32 gradients
        dtype = torch.float32
    folder = fetch(settings.model, MODEL_FILES)
    check_weights(folder)
    print(f"loading  {settings.model}")
    disable_progress_bar()
    with quiet_libraries():
        model = load(folder, settings, dtype)
    check_loaded(model, settings, dtype)
    settle_model(model, dtype)
    if not settings.full_finetuning:
        config = model.peft_config["default"]
        config.base_model_name_or_path = absolute_path_or_hub_id(settings.model)
    return model


def load_with_unsloth(folder: Path, settings: Settings, dtype):
    from unsloth import FastLanguageModel

    from orpheus.models import LINEAR_LAYERS

    optional = {"load_in_fp8": True} if settings.weights == "fp8" else {}  # unknown on its CPU side
    optional |= {"device_map": settings.device_map} if settings.device_map else {}
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=settings.max_length,
        dtype=dtype,
        load_in_4bit=settings.weights == "4bit",
        load_in_8bit=settings.weights == "8bit",
        load_in_16bit=settings.weights == "16bit",
        full_finetuning=settings.full_finetuning,
        use_gradient_checkpointing=settings.gradient_checkpointing,
        use_exact_model_name=True,  # else a 4-bit copy, quantised otherwise than in infer.py
        **optional,
    )
    if settings.full_finetuning:
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
        use_gradient_checkpointing=settings.gradient_checkpointing,
        random_state=settings.seed,
    )


def load_with_transformers(folder: Path, settings: Settings, dtype):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from orpheus.models import LINEAR_LAYERS, load_base

    model = load_base(folder, settings.weights, dtype, settings.device_map)
    if settings.full_finetuning:
        return model
    if settings.weights != "16bit":
        checkpointing = bool(settings.gradient_checkpointing)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    return get_peft_model(model, lora)


def make_trainer(model, tokenizer, dataset, arguments, settings: Settings, evaluator):
    """The trainer over a Dataset of `input_ids` and `labels`; prints how its batches are made."""
    from datasets import disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback

    from orpheus.tokens import TOKEN_NAMES
    from orpheus.trainer import SpeechTrainer, align_special_tokens, print_batches

    tokenizer.pad_token = TOKEN_NAMES["pad"]
    align_special_tokens(model, tokenizer)
    disable_progress_bars()  # nothing is downloaded from here on
    trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        with quiet_libraries():
            trainer = SpeechTrainer(
                model=model,
                args=arguments,
                train_dataset=dataset.select_columns(["input_ids", "labels"]).with_format(None),
                processing_class=tokenizer,
                evaluator=evaluator,
            )
    except ValueError as error:
        raise UserError(f"settings: {error}") from None
    for parameter, data in trained:  # TRL casts a quantised model's LoRA to bf16; keep it in fp32
        parameter.data = data.to(parameter.device)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    print_batches(trainer)
    return trainer


def train(trainer, settings: Settings, checkpoint: Path | None) -> int:
    """Trains to the end, and returns the tokens seen. A signal makes it save and exit with 130."""
    from orpheus.trainer import StopOnSignal, TrainingMonitor

    out = Path(settings.output_dir)
    before = read_json(checkpoint / "trainer_state.json") if checkpoint else {}
    if before.get("global_step", 0) >= trainer.total_steps:
        print(f"{checkpoint} is at the last step already: nothing left to train")
        # Otherwise transformers would train one step more; so it only loads the checkpoint.
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    watched = runs.reporting_full_disk(out, lambda: f"step {trainer.state.global_step}")
    with StopOnSignal() as stop, watched:
        for callback in (TrainingMonitor(settings), stop):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state  # resuming made a new one
    if stop.requested and state.global_step < state.max_steps:
        print(f"stopped at step {state.global_step}; checkpoint in {out}")
        print(f"continue with: {runs.command('--resume')}")
        sys.exit(130)
    return state.num_input_tokens_seen - before.get("num_input_tokens_seen", 0)


def save_model(trainer, tokenizer, out: Path) -> None:
    """Saves the adapter (or the whole model) and the tokenizer: all of their files, or none."""
    from orpheus.models import add_old_names

    weights = None
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all ranks gather
    if runs.RANK:
        return
    part = out / ".adapter.part"  # what a killed run left there is overwritten
    trainer.model.save_pretrained(str(part), state_dict=weights)
    tokenizer.save_pretrained(str(part))
    add_old_names(part)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's; runs.save_card writes ours
    last = ("adapter_config.json", "config.json")  # where these are, the rest is
    for path in sorted(part.iterdir(), key=lambda path: path.name in last):
        os.replace(path, out / path.name)
    part.rmdir()


if __name__ == "__main__":
    run(main)
