"""Fine-tunes Orpheus-TTS on a folder of clips: 4-bit LoRA with Unsloth and TRL, on one GPU.

    python finetune.py --dataset my_voice --output_dir outputs/my_voice
    python finetune.py --config data/demo/config.json     # the demo, on any machine
    python finetune.py --plan                             # will it fit? where the memory goes
    python finetune.py --resume                           # continue after a stop
    torchrun --nproc-per-node 2 finetune.py               # two GPUs; accelerate launch does as well

Every key can stand in config.json, or be given as --key value: these, and those of TRL's SFTConfig.
"""

import contextlib
import functools
import io
import os
import sys
import time
from pathlib import Path

from orpheus import files, runs
from orpheus.settings import Settings, UserError, read_command_line, read_json, run


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
        checkpoint = runs.find_checkpoint(settings)
        if checkpoint and runs.is_finished(settings, checkpoint):
            longer = "a higher max_steps or num_train_epochs trains it longer"
            print(f"{out} holds a finished run of this length: nothing to resume ({longer})")
            return
        if settings.resume and not checkpoint:
            print(f"warning  no complete checkpoint in {out}: training starts from the beginning")
        fine_tune(settings, checkpoint, started)


def fine_tune(settings: Settings, checkpoint: Path | None, started: float) -> None:
    """From clips to an adapter, in an output_dir that is this process's own."""
    from orpheus import clips

    # 1. The dataset, the machine, and the settings as that allows
    out, dataset = Path(settings.output_dir), clips.read_clips(settings)
    import_backend(settings)
    from orpheus import checks, codec, doctor, memory, models, rows, trainer

    models.check_machine(settings.model)
    settings = trainer.resolve_settings(settings)
    arguments = make_sft_config(settings, checkpoint)
    trainer.print_machine(settings, memory.read_base(settings))

    # 2. Clips → rows of tokens, before the base is loaded
    tokenizer = models.load_tokenizer(files.fetch(settings.model, files.TOKENIZER_FILES))
    snac = codec.load_codec(settings.codec, models.device())
    train_rows, held_out, report = rows.make_rows(dataset, settings, tokenizer, snac)
    report.print_summary(settings)
    doctor.warn_of_few_clips(report)
    if checkpoint:
        runs.check_resumed(settings, report.digest, checkpoint)
    runs.set_aside(settings)
    evaluator = checks.SampleEvaluator(tokenizer, snac, settings, report, held_out)

    # 3. The base with a LoRA, and the trainer
    model = load_model(settings, arguments)
    sft_trainer = make_trainer(model, tokenizer, train_rows.dataset, arguments, settings, evaluator)

    # 4. Training, and what it leaves: the adapter, the table of the checks, the model card
    if not runs.RANK:
        runs.save_config(settings)
        report.save(out)
    with runs.reporting_full_disk(out, lambda: f"step {sft_trainer.state.global_step}"):
        train(sft_trainer, settings, checkpoint)
        save_model(sft_trainer, tokenizer, out)
    if not runs.RANK:
        checks.save_checks(sft_trainer.state.log_history, out)
        runs.save_card(settings)
    trainer.print_summary(sft_trainer, settings, started)


def import_backend(settings: Settings) -> None:
    """Import unsloth before transformers, trl and peft, which it patches."""
    print(f"loading  torch, trl and {settings.backend}")
    if settings.backend == "unsloth":
        # Unsloth counts runs by downloading from the hub, and waits minutes for one that is down
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        with contextlib.redirect_stdout(io.StringIO()):  # what libraries print
            import unsloth  # noqa: F401


def make_sft_config(settings: Settings, checkpoint: Path | None = None):
    """Return TRL's SFTConfig: the settings that it has, and what follows from others.

    Raises: UserError for a value that it does not take, or that this machine does not allow.
    """
    from trl import SFTConfig

    from orpheus import models, trainer

    follows = {
        "packing": settings.batching == "pack",
        "padding_free": False,  # else Unsloth flattens padded batches; packing turns it on itself
        "pad_to_multiple_of": settings.max_length if settings.batching == "pad_to_max" else None,
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "use_cpu": models.device() == "cpu",
        "eval_strategy": "no",  # TrainingMonitor evaluates every sample_steps
        "metric_for_best_model": "eval_score",  # keeps the best checkpoint from rotation
        "greater_is_better": True,
        "disable_tqdm": True,
    }
    try:
        arguments = SFTConfig(**settings.trainer | follows)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"settings: {error}") from error
    if checkpoint and arguments.auto_find_batch_size:  # go on with the rows that it came to
        state = read_json(checkpoint / "trainer_state.json")
        arguments.per_device_train_batch_size = state["train_batch_size"]
    if (count := arguments.n_gpu) > 1:  # transformers would use nn.DataParallel, and add the losses
        print(f"warning  1 of {count} GPUs is used; for all: torchrun --nproc-per-node {count} …")
        arguments._n_gpu = 1  # private: there is no key for it
    trainer.check_compatibility(settings, arguments)
    return arguments


def load_model(settings: Settings, arguments):
    """Return the base, quantised as `weights` says, with a LoRA on its linear layers."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from orpheus.models import check_loaded, settle_model, training_dtype

    load = load_with_unsloth if settings.backend == "unsloth" else load_with_transformers
    # Never left to a library: Unsloth would take bfloat16 wherever the machine has it
    dtype = training_dtype(arguments)
    if settings.full_finetuning and arguments.fp16:  # the gradient scaler needs fp32 gradients
        dtype = torch.float32
    folder = files.fetch(settings.model, files.MODEL_FILES)
    files.check_weights(folder)
    print(f"loading  {settings.model}")
    disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        model = load(folder, settings, dtype)
    check_loaded(model, settings, dtype)
    settle_model(model, dtype)
    if not settings.full_finetuning:
        name = files.absolute_path_or_hub_id(settings.model)
        model.peft_config["default"].base_model_name_or_path = name
        # PEFT would ask the hub at each checkpoint whether the base's vocabulary was another
        model.save_pretrained = functools.partial(
            model.save_pretrained, save_embedding_layers=False
        )
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
    """Return the trainer over a Dataset of `input_ids` and `labels`."""
    from datasets import disable_progress_bars
    from transformers import PrinterCallback

    from orpheus.tokens import TOKEN_NAMES
    from orpheus.trainer import SpeechTrainer, print_batches, print_changes

    tokenizer.pad_token = TOKEN_NAMES["pad"]
    disable_progress_bars()  # nothing is downloaded from here on
    trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = SpeechTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset.select_columns(["input_ids", "labels"]).with_format(None),
            processing_class=tokenizer,
            evaluator=evaluator,
        )
    for parameter, data in trained:  # TRL casts a quantised model's LoRA to bf16; keep it in fp32
        parameter.data = data.to(parameter.device)
    trainer.remove_callback(PrinterCallback)
    print_changes(settings, trainer.args)
    print_batches(trainer)
    return trainer


def train(trainer, settings: Settings, checkpoint: Path | None) -> None:
    """Train to the end. A signal makes it save a checkpoint and exit with 130."""
    from orpheus.trainer import StopOnSignal, TrainingMonitor

    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {"global_step": 0}
    if state["global_step"] >= trainer.total_steps:
        print(f"{checkpoint} is at the last step already: nothing left to train")
        # Otherwise transformers would train one step more; so it only loads the checkpoint.
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    with StopOnSignal() as stop:
        for callback in (TrainingMonitor(settings), stop):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        print(f"stopped at step {trainer.state.global_step}; checkpoint in {settings.output_dir}")
        print(f"continue with: {runs.command('--resume')}")
        sys.exit(130)


def save_model(trainer, tokenizer, out: Path) -> None:
    """Save the adapter (or the whole model) and the tokenizer: all of their files, or none."""
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
