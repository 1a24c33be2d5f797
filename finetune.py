"""Fine-tunes Orpheus-TTS on a folder of clips: 4-bit LoRA with Unsloth and TRL, on one GPU.

    python finetune.py --dataset my_voice --output_dir outputs/my_voice
    python finetune.py --config data/demo/config.json     # the demo, on any machine
    python finetune.py --plan                             # will it fit? where the memory goes
    python finetune.py --resume                           # go on after a stop
    torchrun --nproc-per-node 2 finetune.py               # two GPUs; accelerate launch does as well

Every key of config.json can be given as --key value, and so can every key of TRL's SFTConfig.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import numpy as np

from data import prepare
from orpheus.audio import write_text
from orpheus.clips import read_clips
from orpheus.codec import load_codec
from orpheus.doctor import Report
from orpheus.hub import (
    MODEL_FILES,
    TOKENIZER_FILES,
    absolute_path_or_hub_id,
    as_user_error,
    check_weights,
    fetch,
    is_hub_id,
)
from orpheus.memory import GIB, check_memory, peak_memory, print_plan, read_base, step_down
from orpheus.models import (
    LINEAR_LAYERS,
    bitsandbytes_config,
    check_machine,
    device,
    load_base,
    load_tokenizer,
)
from orpheus.runs import (
    RANK,
    RANKS,
    SAVED_CONFIG,
    SAVED_REPORT,
    check_output,
    check_resumed,
    disk_watched,
    last_checkpoint,
    output_lock,
    owned_files,
    previous_run,
    record_files,
    remove,
    save_config,
)
from orpheus.settings import (
    TRAINER_TYPES,
    Settings,
    UserError,
    check_names,
    read_command_line,
    read_json,
    run,
    validate,
)
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS, TOKEN_NAMES
from orpheus.trainer import (
    align_special_tokens,
    check_schedule,
    make_sample_evaluator,
    print_batches,
    quiet_libraries,
    run_recorder,
    save_checks,
    stopping_on_signals,
    trainer_class,
    training_monitor,
)

RESUME = "--resume goes on from the last checkpoint in output_dir"
UPLOAD = "`hf upload you/anna outputs/anna` publishes a finished run"
EVALUATION = "sample_steps says when a run is checked, held_out on what"
ROWS = "rows are tokenised, ordered and labelled by data/prepare.py"
# Keys of SFTConfig that would change nothing here, and what does instead.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": RESUME,
    "ignore_data_skip": RESUME,
    "restore_callback_states_from_checkpoint": RESUME,
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "finetune.py trains, and checks"),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"), UPLOAD),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), UPLOAD),
    **dict.fromkeys(("eval_steps", "eval_delay", "eval_on_start", "eval_packing"), EVALUATION),
    **dict.fromkeys(("eval_do_concat_batches", "eval_accumulation_steps"), EVALUATION),
    **dict.fromkeys(("eval_use_gather_object", "batch_eval_metrics"), EVALUATION),
    **dict.fromkeys(("per_device_eval_batch_size", "prediction_loss_only"), EVALUATION),
    **dict.fromkeys(("include_for_metrics", "bf16_full_eval", "fp16_full_eval"), EVALUATION),
    "load_best_model_at_end": "the best checkpoint is kept, and checks.csv names it",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc"), ROWS),
    **dict.fromkeys(("shuffle_dataset", "truncation_mode", "completion_only_loss"), ROWS),
    **dict.fromkeys(("assistant_only_loss", "chat_template_path", "eos_token"), ROWS),
    **dict.fromkeys(("pad_token", "train_sampling_strategy", "length_column_name"), ROWS),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "weights and device_map say how"),
    "parallelism_config": "device_map, torchrun and fsdp say how several GPUs share the work",
}
PIP_NAMES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_reports(report_to: list[str]) -> None:
    """`UserError` for a tracker whose package is missing: it is needed only after loading."""
    from transformers import integrations

    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in report_to:
        if name not in known:
            raise UserError(f"settings: report_to {name}: give one of none, {', '.join(known)}")
        if name not in integrations.get_available_reporting_integrations():
            package = PIP_NAMES.get(name, name)
            raise UserError(f"settings: report_to {name} needs its package: pip install {package}")


def check_optimizer(arguments) -> None:
    """`UserError` where the optimizer or schedule could not be made once the model is loaded."""
    import torch
    from transformers import Trainer

    layer = torch.nn.Linear(1, 1)
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    except (ImportError, ValueError, TypeError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"settings: optim or optim_args: {told}") from None
    check_schedule(arguments, arguments.max_steps if arguments.max_steps > 0 else 100)


def trainer_arguments(settings: Settings):
    """(SFTConfig, what it was asked for); `UserError` for a value that it does not take."""

    import torch
    from trl import SFTConfig

    hints = get_type_hints(SFTConfig)
    ours = {
        "packing": settings.batching == "pack",
        "padding_free": False,  # else Unsloth flattens batches that were to be padded
        "pad_to_multiple_of": settings.max_length if settings.batching == "pad_to_max" else None,
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "no",  # sample_steps says when
        "metric_for_best_model": "eval_score",  # the best checkpoint is never rotated away
        "greater_is_better": True,
    }
    for name, (value, source) in settings.trainer.items():
        if name in ours:
            raise UserError(f"{source}: {name} is set by finetune.py itself; leave it out")
        if name in WITHOUT_EFFECT:
            raise UserError(f"{source}: {name} has no effect, leave it out: {WITHOUT_EFFECT[name]}")
        hint = TRAINER_TYPES.get(name, hints[name])
        settings.trainer[name] = validate(name, value, hint, source), "settings"
    asked = {name: value for name, value in settings.flat().items() if name in hints} | ours
    try:
        arguments = SFTConfig(**asked)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"settings: {' '.join(str(error).split())}") from None
    check_reports(arguments.report_to)
    return arguments, asked


def print_changes(asked: dict, arguments) -> None:
    """What the backend replaced: a remedy not in force must not look as if it were."""
    for name, value in asked.items():
        used = getattr(arguments, name)
        used = getattr(used, "value", used)
        if name == "padding_free" and arguments.packing:
            continue  # packing is free of padding by itself
        if value not in (None, "none", used, *(used if isinstance(used, list) else [])):
            print(f"changed {name}: {value} is not for this machine, {used} is used")


W8 = 'weights "8bit" need a GPU; on a CPU, backend "transformers" has them'
FP8 = 'weights "fp8" need a GPU and backend "unsloth"'
FULL = 'full_finetuning needs weights "16bit"'
OFFLOAD = 'gradient_checkpointing "unsloth" needs backend "unsloth"; set it to true'
FSDP = 'fsdp needs backend "transformers"'
LIGER = "use_liger_kernel needs its package: pip install liger-kernel"
WORKERS = "dataloader_multiprocessing_context needs dataloader_num_workers above 0"
PERSISTENT = "dataloader_persistent_workers needs dataloader_num_workers above 0"
RANKED = "fit looks at one GPU: leave it out with several ranks"


def check_compatibility(settings: Settings, arguments) -> None:
    """Refuses by name what this backend or machine cannot do, before anything would replace it."""
    import torch

    gpu, unsloth = torch.cuda.is_available(), settings.backend == "unsloth"
    optimiser = getattr(arguments.optim, "value", arguments.optim)
    lean = any(word in optimiser for word in ("8bit", "paged", "bnb"))
    persistent = arguments.dataloader_persistent_workers
    in_processes = arguments.dataloader_multiprocessing_context is not None
    for refused, line in (
        (settings.weights == "8bit" and unsloth and not gpu, W8),
        (settings.weights == "fp8" and not (gpu and unsloth), FP8),
        (settings.full_finetuning and settings.weights != "16bit", FULL),
        (settings.gradient_checkpointing == "unsloth" and not unsloth, OFFLOAD),
        (arguments.fp16 and not gpu, "fp16 needs a GPU; set bf16, or neither for fp32"),
        (lean and not gpu, f"optim {optimiser} needs a GPU; adamw_torch_fused does not"),
        (bool(arguments.fsdp) and unsloth, FSDP),
        (arguments.activation_offloading and not gpu, "activation_offloading needs a GPU"),
        (arguments.use_liger_kernel and not find_spec("liger_kernel"), LIGER),
        (in_processes and not arguments.dataloader_num_workers, WORKERS),
        (persistent and not arguments.dataloader_num_workers, PERSISTENT),
        (settings.fit is not False and RANKS > 1, RANKED),
    ):
        if refused:
            raise UserError(f"settings: {line}")
    check_optimizer(arguments)


QUANTISED = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}  # bitsandbytes' classes


def resolve_dtype(settings: Settings, arguments):
    """The dtype of the weights and of the computation, for both backends.

    Never left to a library: Unsloth would take bfloat16 wherever the machine has it. Full
    fine-tuning in fp16 keeps fp32 weights, because the gradient scaler wants fp32 gradients.
    """
    import torch

    if arguments.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.fp16 and not settings.full_finetuning else torch.float32


def load_model(settings: Settings, arguments):
    """The base with its weights held as asked, and a LoRA on every linear layer."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    load = load_with_unsloth if settings.backend == "unsloth" else load_with_transformers
    dtype = resolve_dtype(settings, arguments)
    if os.path.isdir(settings.model):  # the hub's is not downloaded yet
        check_weights(Path(settings.model))
    with as_user_error(Path(settings.model)), quiet_libraries():
        model = load(settings, dtype)
    classes = {type(module).__name__ for module in model.modules()}
    wanted = QUANTISED.get(settings.weights)
    if wanted and wanted not in classes:
        raise UserError(
            f"weights {settings.weights}: {settings.backend} loaded 16-bit ones instead"
        )
    if not settings.full_finetuning:
        model.peft_config["default"].base_model_name_or_path = absolute_path_or_hub_id(
            settings.model
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    used = model.dtype if settings.weights == "16bit" else dtype
    if used != dtype:
        print(f"changed dtype: {dtype} was asked for, {settings.backend} loaded {used}")
    weights = str(used).removeprefix("torch.")
    if settings.weights != "16bit":
        weights = f"{settings.weights.replace('bit', '-bit')}, {weights}"
    method = "all weights" if settings.full_finetuning else f"LoRA r={settings.lora_r}"
    print(f"model    {settings.model}, {weights}; {method}: {trained:.3g} M parameters to train")
    return model


def load_with_unsloth(settings: Settings, dtype):
    from unsloth import FastLanguageModel

    optional = {"load_in_fp8": True} if settings.weights == "fp8" else {}  # unknown on its CPU side
    optional |= {"device_map": settings.device_map} if settings.device_map else {}
    model, _ = FastLanguageModel.from_pretrained(
        settings.model,
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


def load_with_transformers(settings: Settings, dtype):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = bitsandbytes_config(settings.weights, dtype)
    folder = fetch(settings.model, MODEL_FILES)
    model = load_base(
        folder, dtype=dtype, quantization_config=config, device_map=settings.device_map
    )
    if settings.full_finetuning:
        return model
    if config is not None:
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


def make_trainer(model, tokenizer, rows, arguments, settings: Settings, stop: dict, listen):
    """The trainer over ready rows; says how its batches are made."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback

    tokenizer.pad_token = TOKEN_NAMES["pad"]
    align_special_tokens(model, tokenizer)
    disable_progress_bars()  # nothing is downloaded from here on
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    lengths = [len(row) for row in columns["input_ids"]]
    frames = sum(int((np.asarray(row) != -100).sum()) // SLOTS for row in columns["labels"])
    seconds = frames * FRAME_SAMPLES / SAMPLE_RATE
    try:
        with quiet_libraries():
            trainer = trainer_class(lengths, seconds, listen)(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(columns),
                processing_class=tokenizer,
            )
    except ValueError as error:
        raise UserError(f"settings: {' '.join(str(error).split())}") from None
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.monitor = training_monitor(settings, stop)
    trainer.add_callback(trainer.monitor)
    print_batches(trainer, lengths)
    return trainer


def train(trainer, settings: Settings, checkpoint: Path | None, stop: dict) -> int:
    """Trains to the end and returns the tokens seen; on a signal saves, says how to go on."""
    import torch

    out, state = Path(settings.output_dir), checkpoint and checkpoint / "trainer_state.json"
    before = read_json(state) if checkpoint else {}
    trainer.add_callback(run_recorder(out, trainer))
    batches, done = trainer.get_train_dataloader(), before.get("global_step", 0)
    if done >= trainer.set_initial_training_values(trainer.args, batches)[-1]:
        print(f"{checkpoint} is at the last step already: nothing left to train")
        # Otherwise transformers would train one step more; so it only loads the checkpoint.
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    try:
        with (
            stopping_on_signals(stop),
            disk_watched(out, lambda: f"step {trainer.state.global_step}"),
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.cuda.OutOfMemoryError:
        if settings.fit is not False and trainer.state.global_step == 0:
            step_down(settings, trainer.args)
        told = f"step {trainer.state.global_step + 1}: out of GPU memory: try --plan, or --fit"
        raise UserError(f"{told}; last checkpoint: {last_checkpoint(out) or 'none yet'}") from None
    finally:
        trainer.monitor.close()
    state = trainer.state
    if stop and state.global_step < state.max_steps:
        print(f"stopped at step {state.global_step}; checkpoint in {settings.output_dir}")
        print(f"go on with: {resume_command(settings)}")
        sys.exit(130)
    return state.num_input_tokens_seen - before.get("num_input_tokens_seen", 0)


def python_command() -> str:
    """The Python in use, as a person in this folder would call it."""
    return sys.executable.removeprefix(os.getcwd() + os.sep)


def resume_command(settings: Settings) -> str:
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)] if RANKS > 1 else []
    resume = [] if settings.resume else ["--resume"]
    return shlex.join([python_command(), *ranks, *sys.argv, *resume])


def save_model(trainer, tokenizer, out: Path) -> None:
    """Adapter (or whole model) and tokenizer, written aside and renamed, its config last."""
    part, weights = out / ".adapter.part", None
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all ranks gather
    if RANK:
        return
    if os.path.lexists(part):  # of a run that was killed
        remove(part)
    try:
        trainer.model.save_pretrained(str(part), state_dict=weights)
        tokenizer.save_pretrained(str(part))
        (part / "README.md").unlink(missing_ok=True)  # PEFT's; ours follows
        record_files(out, *(path.name for path in part.iterdir()))
        last = ("adapter_config.json", "config.json")  # where these are, the rest is
        for path in sorted(part.iterdir(), key=lambda p: p.name in last):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_card(settings: Settings, report: Report) -> None:
    """README.md: a model card, unless the user has put a README.md there."""
    from huggingface_hub import ModelCard, ModelCardData

    out = Path(settings.output_dir)
    path, hub = out / "README.md", is_hub_id(settings.model)
    if os.path.lexists(path) and path not in owned_files(out):
        print(f"card     {path} was there before: kept, no model card written")
        return
    kind = "peft", "A LoRA adapter for"
    if settings.full_finetuning:
        kind = "transformers", "Fine-tuned from"
    data = ModelCardData(
        base_model=settings.model if hub else None,
        library_name=kind[0],
        pipeline_tag="text-to-speech",
        tags=["orpheus"],
    )
    base = settings.model if hub else Path(settings.model).name
    voices = ", ".join(report.voices) or "none named"
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {out.resolve().name}\n\n{kind[1]} {base}, trained with "
        f"orpheus-finetune on {len(report.measures)} clips, {report.seconds / 3600:.3f} hours.\n"
        f"Voices: {voices}.\n\n```\n"
        f'python infer.py "Hello there" --model {shlex.quote(str(out))}\n```\n'
    )
    record_files(out, path.name)
    write_text(path, str(ModelCard(text)))


def end_block(settings: Settings, trainer, tokens: float, started: float) -> None:
    """Minutes, tokens per second, peak memory, and where everything is."""
    import torch

    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    training, checks = logs[-1]["train_runtime"], logs[-1]["check_runtime"]  # seconds
    whole = time.perf_counter() - started
    where = "GPU memory" if torch.cuda.is_available() else "RAM"
    times = f"training {training / 60:.1f}, checks {checks / 60:.1f}"
    print("---")
    loss = f", loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    print(f"steps    {trainer.state.global_step}{loss}")
    print(f"minutes  {whole / 60:.1f}: {times}, setting up {(whole - training - checks) / 60:.1f}")
    if tokens:
        print(f"speed    {tokens / training:,.0f} tokens/s in training")
    print(f"memory   {peak_memory() / GIB:.2f} GiB of {where} at its peak")
    print(f"adapter  {settings.output_dir}")
    print(f'say more: {python_command()} infer.py "…" --model {shlex.quote(settings.output_dir)}')


def first_rank_first():
    """What the first rank encodes and writes, the others find."""
    from accelerate import PartialState

    return PartialState().main_process_first() if RANKS > 1 else contextlib.nullcontext()


def resolve_training_args(settings: Settings, checkpoint: Path | None):
    """(SFTConfig, what it was asked for), once machine, backend and memory allow the settings."""
    check_machine(settings.model)
    if settings.backend == "unsloth":
        with quiet_libraries():
            import unsloth  # noqa: F401  before trl, transformers and peft, which it patches
    arguments, _ = trainer_arguments(settings)
    check_compatibility(settings, arguments)
    check_memory(settings, arguments, read_base(settings), checkpoint)
    return trainer_arguments(settings)


def main() -> None:
    started = time.perf_counter()
    settings = read_command_line(__doc__)
    check_names(settings)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first rank speaks for all
    if settings.plan:
        return print_plan(settings, trainer_arguments(settings)[0], read_base(settings))
    with output_lock(settings):
        fine_tune(settings, started)


def fine_tune(settings: Settings, started: float) -> None:
    """From clips to adapter, in an output_dir that is this process's own."""
    checkpoint, out = check_output(settings), Path(settings.output_dir)
    clips = read_clips(settings)
    arguments, asked = resolve_training_args(settings, checkpoint)
    tokenizer = load_tokenizer(fetch(settings.model, TOKENIZER_FILES))
    codec = load_codec(settings.codec, device())
    with first_rank_first():
        rows, report = prepare.make_rows(clips, settings, tokenizer, codec)
    if RANK and settings.resume:  # the first rank has settled what is there by now
        checkpoint = last_checkpoint(out)
    report.tell(settings)
    if checkpoint:
        check_resumed(settings, report.digest)
    rows, held = report.split
    listen = make_sample_evaluator(tokenizer, codec, settings, report, held)
    model, stop = load_model(settings, arguments), {}
    trainer = make_trainer(model, tokenizer, rows, arguments, settings, stop, listen)
    print_changes(asked, trainer.args)
    with previous_run(settings):
        if not RANK:
            record_files(out, SAVED_CONFIG, SAVED_REPORT)
            save_config(settings)
            report.save(out)
        tokens = train(trainer, settings, checkpoint, stop)
        with disk_watched(out, lambda: "the adapter"):
            save_model(trainer, tokenizer, out)
    if not RANK:
        save_card(settings, report)
        save_checks(trainer, out)
    end_block(settings, trainer, tokens, started)


if __name__ == "__main__":
    run(main)
