"""Fine-tunes Orpheus-TTS on a folder of clips: 4-bit LoRA with Unsloth and TRL, on one GPU.

    python finetune.py --dataset my_voice --output_dir outputs/my_voice
    python finetune.py --config data/demo/config.json     # the demo, on any machine
    python finetune.py --plan                             # will it fit? where the memory goes
    python finetune.py --resume                           # go on after a stop
    torchrun --nproc-per-node 2 finetune.py               # two GPUs; accelerate launch does as well

Every key of config.json can be given as --key value, and so can every key of TRL's SFTConfig.
"""

import argparse
import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import infer
from data import prepare
from infer import Mistake, Settings

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun

# ---------------------------------------------------------------- before anything is loaded


MANIFEST = "finetune_files.json"  # lists what a run made in output_dir
PREVIOUS, MOVING = infer.PREVIOUS, ".previous_run.part"  # a replaced run, and one being moved
# Everything that a run may write into output_dir, for runs from before there was a manifest.
RUN_FILES = re.compile(
    r"checkpoint-[0-9]+|samples/step-[0-9]{6,}|runs/[A-Z][a-z]{2}[0-9]{2}_[0-9-]{8}_.+|checks\.csv"
    r"|finetune_(config|files)\.json|data_report\.json|adapter_(config\.json|model\.safetensors)"
    r"|(generation_)?config\.json|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|chat_template\.jinja"
)


@contextlib.contextmanager
def output_lock(settings: Settings):
    """Keeps output_dir to this process. `Mistake` where it is in use, or cannot be written to.

    The kernel gives the lock back when the process ends, however it ends.
    """
    if RANK:  # the first rank holds it for all
        yield
        return
    out = check_place(settings)
    path = out / ".finetune.lock"
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            lock_file(file)
            stack.callback(path.unlink, missing_ok=True)
            path.write_bytes(b"%-4096d" % os.getpid())  # fails where the disk is full
        except BlockingIOError:
            file.seek(0)
            told = f"another run (process {file.read().strip()}) is writing to {out}"
            raise Mistake(f"{told}: wait for it, or choose another --output_dir") from None
        except OSError as error:
            reason = error.strerror or error
            raise Mistake(f"{out}: cannot be written: {reason}; try --output_dir") from None
        yield


def lock_file(file) -> None:
    """Locks an open file, without waiting. BlockingIOError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems
        print(f"{file.name}: no locks here ({error.strerror}): start no second run in this folder")


def check_place(settings: Settings) -> Path:
    """output_dir. `Mistake` where it is, or holds, what the run reads."""
    out = Path(os.path.realpath(settings.output_dir))
    for name in ("dataset", "model", "codec"):
        given = getattr(settings, name)
        source = Path(os.path.realpath(given)) if os.path.exists(given) else None
        if source and out in (source, *source.parents):
            holds = "is" if out == source else "holds"
            told = f"output_dir {settings.output_dir} {holds} the {name} {given}"
            raise Mistake(f"{told}: choose another --output_dir")
    return Path(settings.output_dir)


def run_files(out: Path) -> list[Path]:
    """What stands in `out` under a name that a run would give."""
    paths = [path for folder in (out, out / "samples", out / "runs") for path in folder.glob("*")]
    return [path for path in paths if RUN_FILES.fullmatch(str(path.relative_to(out)))]


def owned_files(out: Path) -> list[Path]:
    """The files and folders in `out` that runs made, by the manifest."""
    path = out / MANIFEST
    if not path.is_file():
        return run_files(out) if (out / infer.SAVED_CONFIG).is_file() else []
    names = infer.read_json(path).get("files")
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    parts = [Path(name).parts for name in names] if listed else [()]
    if not all(part and part[0] != "/" and ".." not in part for part in parts):
        raise Mistake(f"{path}: must list files of this folder; choose another --output_dir")
    return [out / name for name in names if os.path.lexists(out / name)]


def record_files(out: Path, *names: str) -> None:
    """Adds to the manifest, before they are made, what a run is about to make."""
    known = {str(path.relative_to(out)) for path in owned_files(out)}
    text = json.dumps({"files": sorted(known | {MANIFEST, *names})}, indent=2) + "\n"
    infer.write_text(out / MANIFEST, text)


def set_aside(out: Path) -> None:
    """Moves the run in `out` to a hidden folder there."""
    for path in owned_files(out):
        target = out / MOVING / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        with contextlib.suppress(OSError):  # samples, runs: where they are empty now
            path.parent.rmdir()
    if (out / MOVING).is_dir():
        os.replace(out / MOVING, out / PREVIOUS)


def settle_previous(out: Path) -> None:
    """Puts a run that was set aside back, unless the one that replaces it has saved something.

    At the end of a run, and at the start of the next one, in case this one was killed.
    """
    if (out / PREVIOUS).is_dir():
        if infer.is_model(out) or last_checkpoint(out):
            shutil.rmtree(out / PREVIOUS)
            return
        for path in owned_files(out):
            remove(path)
        os.replace(out / PREVIOUS, out / MOVING)
    if (out / MOVING).is_dir():
        move_into(out / MOVING, out)
        print(f"{out} holds the earlier run again: the new one ended before it had saved anything")


def move_into(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_dir() and (target / path.name).is_dir():
            move_into(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def previous_run(settings: Settings):
    """With `overwrite`, sets the run in output_dir aside until the new one has saved something."""
    out = Path(settings.output_dir)
    if RANK or settings.resume or not settings.overwrite:
        yield
        return
    try:
        with writing(out):
            set_aside(out)
        yield
    finally:
        with writing(out):
            settle_previous(out)


@contextlib.contextmanager
def writing(out: Path):
    """A file of `out` that cannot be moved or removed becomes one line."""
    try:
        yield
    except OSError as error:
        raise Mistake(f"{error.filename or out}: {error.strerror or error}") from None


def check_output(settings: Settings) -> Path | None:
    """The checkpoint to go on from. `Mistake` where a run or the user's files would be lost."""
    out = Path(settings.output_dir)
    if RANK:  # the first rank looks for all
        if settings.resume and infer.is_model(out):  # it ends, too
            sys.exit(0)
        return None
    with writing(out):
        settle_previous(out)
    made = owned_files(out)
    for path in run_files(out):
        # The doctor writes a report before there is a run, TensorBoard's folders are always new.
        harmless = path.name == infer.SAVED_REPORT or path.parent.name == "runs"
        resumed = settings.resume and path.name.startswith("checkpoint-")
        if path not in made and not harmless and not resumed:
            told = f"{path}: finetune.py did not make it, and a run would replace it"
            raise Mistake(f"{told}: choose another --output_dir")
    for path in (out / "samples", out / "runs"):
        if path.exists() and not path.is_dir():
            raise Mistake(f"{path} is a file; a run needs a folder there: try --output_dir")
    finished, checkpoint = infer.is_model(out), last_checkpoint(out)
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
    """The newest checkpoint that is whole."""
    checkpoints = [p for p in out.glob("checkpoint-*") if p.name[11:].isdecimal()]
    for path in sorted(checkpoints, key=lambda p: int(p.name[11:]), reverse=True):
        if is_whole(path):
            return path
        print(f"{path} is incomplete or damaged: passed over")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read: its state, which is written last, weights and tensors."""
    try:
        step = infer.read_json(checkpoint / "trainer_state.json").get("global_step")
        if not any(checkpoint.glob("pytorch_model*")):  # as FSDP writes them
            infer.check_weights(checkpoint)
    except Mistake:
        return False
    return isinstance(step, int) and all(map(zipfile.is_zipfile, checkpoint.glob("*.pt*")))


# On resuming, the length of the run and what is told and kept may change; what is learnt may not.
FREE_KEYS = ("max_steps", "num_train_epochs", "output_dir", "overwrite", "resume", "report_to")
FREE_KEYS += ("cache_dir", "sample_steps", "sample_texts", "plan", "fit", *infer.SPEAKING)
FREE_PARTS = ("logging_", "save_", "eval_")


def check_resumed(settings: Settings, digest: str) -> None:
    """`Mistake` where the run to go on with had other settings or other rows."""
    out = Path(settings.output_dir)
    then, now = infer.read_json(out / infer.SAVED_CONFIG), resolved(settings)
    changed = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
        and name not in FREE_KEYS
        and not name.startswith(FREE_PARTS)
    ]
    if infer.read_json(out / infer.SAVED_REPORT).get("digest") != digest:
        changed.append("the rows are others")
    if changed:
        raise Mistake(f"{out}: cannot resume: {'; '.join(changed)}; --overwrite starts anew")


# ---------------------------------------------------------------- settings for the trainer


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
    """`Mistake` for a tracker whose package is missing: it is needed only after loading."""
    from transformers import integrations

    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in report_to:
        if name not in known:
            raise Mistake(f"settings: report_to {name}: give one of none, {', '.join(known)}")
        if name not in integrations.get_available_reporting_integrations():
            package = PIP_NAMES.get(name, name)
            raise Mistake(f"settings: report_to {name} needs its package: pip install {package}")


def check_optimizer(arguments) -> None:
    """`Mistake` where the optimizer or schedule could not be made once the model is loaded."""
    import torch
    from transformers import Trainer

    layer = torch.nn.Linear(1, 1)
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    except (ImportError, ValueError, TypeError) as error:
        told = " ".join(str(error).split())
        raise Mistake(f"settings: optim or optim_args: {told}") from None
    check_schedule(arguments, arguments.max_steps if arguments.max_steps > 0 else 100)


def check_schedule(arguments, steps: int) -> None:
    """`Mistake` where there is no learning rate for the first, last or any warm-up step."""
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
        raise Mistake(f"{names} of which {warmup} warm up: {told}") from None


def trainer_arguments(settings: Settings):
    """(SFTConfig, what it was asked for); `Mistake` for a value that it does not take."""
    from typing import get_type_hints

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
            raise Mistake(f"{source}: {name} is set by finetune.py itself; leave it out")
        if name in WITHOUT_EFFECT:
            raise Mistake(f"{source}: {name} has no effect, leave it out: {WITHOUT_EFFECT[name]}")
        hint = infer.TRAINER_TYPES.get(name, hints[name])
        settings.trainer[name] = infer.checked(name, value, hint, source), "settings"
    asked = {name: value for name, value in settings.flat().items() if name in hints} | ours
    try:
        arguments = SFTConfig(**asked)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise Mistake(f"settings: {' '.join(str(error).split())}") from None
    check_reports(arguments.report_to)
    return arguments, asked


def tell_changes(asked: dict, arguments) -> None:
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


def check_remedies(settings: Settings, arguments) -> None:
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
            raise Mistake(f"settings: {line}")
    check_optimizer(arguments)


# ---------------------------------------------------------------- model

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    if os.path.isdir(settings.model):  # of the hub's, Unsloth may take a 4-bit copy
        infer.check_weights(Path(settings.model))
    with infer.loads(Path(settings.model)), quiet_libraries():
        model = load(settings, dtype)
    classes = {type(module).__name__ for module in model.modules()}
    wanted = QUANTISED.get(settings.weights)
    if wanted and wanted not in classes:
        raise Mistake(f"weights {settings.weights}: {settings.backend} loaded 16-bit ones instead")
    if not settings.full_finetuning:
        # Unsloth may have loaded another repository's 4-bit copy; the adapter names what was asked.
        model.peft_config["default"].base_model_name_or_path = infer.local(settings.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert settings.weights != "16bit" or model.dtype == dtype, (model.dtype, dtype)
    weights = str(dtype).removeprefix("torch.")
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
    from transformers import BitsAndBytesConfig

    config = infer.nf4(dtype) if settings.weights == "4bit" else None
    if settings.weights == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    folder = infer.fetch(settings.model, infer.MODEL_FILES)
    model = infer.load_base(
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


# ---------------------------------------------------------------- memory

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
# bytes a weight; NF4 with its scales, one per 64 weights and themselves quantised
HELD = {"4bit": 0.516, "8bit": 1, "fp8": 1}
FIT_KEYS = ("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")
# A model's config; weights of its linear layers, of all else, of a LoRA of rank 1
Base = namedtuple("Base", "config linear others lora")


def count_weights(config) -> Base:
    """Counted on the meta device: nothing is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [m for n, m in model.named_modules() if n.rpartition(".")[2] in LINEAR_LAYERS]
    held = sum(layer.weight.numel() for layer in linear)
    lora = sum(sum(layer.weight.shape) for layer in linear)
    return Base(config, held, sum(w.numel() for w in model.parameters()) - held, lora)


def read_config(settings: Settings):
    """The base's config.json; `Mistake` where max_length is more than it sees."""
    folder = infer.fetch(settings.model, ["*config.json"])
    if infer.is_adapter(folder):
        raise Mistake(f"model {folder} is an adapter; give the base that it was trained on")
    config = infer.read_model_config(folder)
    context = config.max_position_embeddings
    if settings.max_length > context:
        over = f"max_length {settings.max_length} is over"
        raise Mistake(f"{over} the {context} tokens that {settings.model} sees")
    return config


def read_base(settings: Settings) -> Base:
    """The base's shape."""
    config = read_config(settings)
    with infer.loads(Path(settings.model, "config.json")):
        return count_weights(config)


def state_bytes(optimiser: str) -> float:
    """Bytes of optimiser state on the GPU for each weight that is trained."""
    if any(word in optimiser for word in ("paged", "adafactor", "sgd")):
        return 0  # in RAM when the GPU is full; a row and a column; none
    moments = 1 if any(word in optimiser for word in ("lion", "rmsprop", "adagrad")) else 2
    return moments * (1 if "8bit" in optimiser else 4)


def layer_bytes(keys: dict, config, wide: int) -> int:
    """What one layer keeps of a token for its backward pass.

    Counted with autograd's saved-tensor hooks on PEFT's LoRA in transformers' Llama (a test counts
    again); Unsloth's own kernels keep less.
    """
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, cached = heads * head, 2 * config.num_key_value_heads * head  # elements
    inner, rank = 4 * config.intermediate_size, 0 if keys["full_finetuning"] else 7 * keys["lora_r"]
    casts = 2 * (config.hidden_size + queries) if wide == 2 else 0  # to 16 bit, by autocast
    return wide * (inner + 2 * queries + cached + rank) + 16 * config.hidden_size + casts


def memory_plan(keys: dict, base) -> dict[str, float]:
    """Bytes on the GPU at the worst moment of a step, by what they hold. `keys`: a flat config."""
    config, linear, others, lora = *base[:3], base.lora * keys["lora_r"]
    full, quantised = keys["full_finetuning"], keys["weights"] in HELD
    wide = 2 if keys["bf16"] or keys["fp16"] else 4
    plain = 4 if quantised and keys["backend"] == "transformers" else wide  # PEFT casts to fp32
    trained, each = (linear + others, wide) if full else (lora, 4)
    tokens = keys["per_device_train_batch_size"] * keys["max_length"]
    layer, layers = layer_bytes(keys, config, wide), config.num_hidden_layers
    checkpointing, inputs = keys["gradient_checkpointing"], wide * config.hidden_size
    kept = layers * layer if not checkpointing else layer + inputs * layers
    if checkpointing == "unsloth":  # the layers' inputs wait in RAM, but for two
        kept = layer + 2 * inputs
    largest = config.hidden_size * config.intermediate_size
    return {
        "weights": linear * HELD.get(keys["weights"], wide) + others * plain,
        "LoRA": 0 if full else lora * 4,
        "gradients": trained * each,
        "optimiser": trained * state_bytes(keys["optim"]),
        "activations": tokens * (kept + 3 * wide * config.intermediate_size)  # and their gradients
        + (wide * largest if quantised else 0),  # one matrix at a time in full
        # TRL's loss and our checks take 256 positions at a time, Unsloth's what memory is left
        "logits and loss": 256 * config.vocab_size * 16,
        "codec, CUDA": 0.7 * GIB,  # a guess: the context, cuBLAS's workspace, fragments
    }


def needed(keys: dict, base) -> float:
    return sum(memory_plan(keys, base).values())


def smallest_change(keys: dict, base, free: float) -> dict | None:
    """The fewest keys to change for a run within `free` bytes, those that cost least first."""
    rows, steps = keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]
    offload = "unsloth" if keys["backend"] == "unsloth" else True
    changes = [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * steps},
        {"gradient_checkpointing": offload},
        {"optim": "paged_adamw_8bit"},
        {"full_finetuning": False, "weights": "4bit"},
        {"max_length": min(1024, keys["max_length"])},
        {"lora_r": min(16, keys["lora_r"])},
    ]
    changes = [change for change in changes if not change.items() <= keys.items()]
    for count in range(len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            change = {name: value for part in chosen for name, value in part.items()}
            if needed(keys | change, base) <= free:
                return {name: value for name, value in change.items() if keys[name] != value}
    return None


def best_fit(keys: dict, base, free: float) -> dict | None:
    """The quickest of the ways that `free` bytes allow, at the same rows for an optimiser step.

    No checkpointing before any, since that does a third of the work twice; then as many rows at
    once as will go.
    """
    rows = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    for checkpointing in (False, True, "unsloth")[: 3 if keys["backend"] == "unsloth" else 2]:
        for once in (n for n in range(rows, 0, -1) if rows % n == 0):
            change = dict(zip(FIT_KEYS, (checkpointing, once, rows // once), strict=True))
            if needed(keys | change, base) <= free:
                return change
    return None


def fit_of(keys: dict) -> dict:
    return {name: keys[name] for name in FIT_KEYS}


def plan_keys(settings: Settings, arguments) -> dict:
    """The flat config with what the trainer made of its nulls."""
    optimiser = getattr(arguments.optim, "value", arguments.optim)
    resolved = {"bf16": arguments.bf16, "fp16": arguments.fp16, "optim": optimiser}
    return settings.flat() | resolved


def in_words(change: dict | None) -> str:
    if change is None:
        return "no change of settings makes it fit: a smaller base, or a larger card"
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in change.items())


def tell_plan(settings: Settings, arguments, base) -> None:
    """--plan: where the memory goes, and what this and other cards hold."""
    import torch

    keys = plan_keys(settings, arguments)
    print(f"{settings.model}: {settings.max_length} tokens a row, {in_words(fit_of(keys))}")
    for name, size in memory_plan(keys, base).items():
        print(f"  {name:16}{size / GIB:8.2f} GiB")
    print(f"  {'in all':16}{needed(keys, base) / GIB:8.2f} GiB, an estimate")
    here = torch.cuda.mem_get_info()[0] / GIB if torch.cuda.is_available() else None
    for card in [here] if here else CARDS if isinstance(settings.fit, bool) else [settings.fit]:
        change = smallest_change(keys, base, card * GIB)
        told = "fits" if change == {} else f"too small: {in_words(change)}"
        fit = best_fit(keys, base, card * GIB)
        print(f"{card:4.4g} GiB: {told}" + (f"; --fit takes {in_words(fit)}" if fit else ""))


def check_memory(settings: Settings, arguments, base, checkpoint: Path | None) -> None:
    """Tells what the run will need, and with `fit` sets rows at once and checkpointing to suit.

    `Mistake` with the smallest change where even what no setting of those spares is too much. (Of
    activations the plan is the least sure: where they alone are too much, it only says so.)
    """
    import torch

    keys, gpu = plan_keys(settings, arguments), torch.cuda.is_available()
    if not gpu and settings.fit is True:
        raise Mistake("settings: fit true asks a GPU for its memory; without, say --fit 12 (GiB)")
    if not gpu and settings.fit is False:
        return
    free = torch.cuda.mem_get_info()[0] if isinstance(settings.fit, bool) else settings.fit * GIB
    change, plan = fit_of(keys), memory_plan(keys, base)
    if settings.fit is not False:
        change = best_fit(keys, base, free)
        if checkpoint:  # a resumed run goes on with what it had
            change = fit_of(infer.read_json(Path(settings.output_dir) / infer.SAVED_CONFIG))
    if change is None or sum(plan.values()) - plan["activations"] > free:
        told = f"{needed(keys, base) / GIB:.1f} GiB needed, {free / GIB:.1f} GiB to be had"
        raise Mistake(f"out of memory: {told}; {in_words(smallest_change(keys, base, free))}")
    total = needed(keys | change, base)
    print(f"memory   {total / GIB:.1f} GiB planned of {free / GIB:.1f}: {in_words(change)}")
    if total > free:
        print(f"         it may not fit; {in_words(smallest_change(keys, base, free))} would")
    settings.gradient_checkpointing = change[FIT_KEYS[0]]
    for name in FIT_KEYS[1:]:
        settings.trainer[name] = change[name], "fit"


def step_down(settings: Settings, arguments) -> None:
    """After running out of memory in the first step: starts anew, planning for a tenth less.

    In a new process, which has all of the GPU's memory again. The clips are in the cache.
    """
    less = 0.9 * needed(plan_keys(settings, arguments), read_base(settings)) / GIB
    print(f"out of memory in the first step: starting anew with --fit {less:.2f}", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--fit", f"{less:.2f}"])


# ---------------------------------------------------------------- hearing


def held_out_metrics(model, rows: list[dict], ids: infer.SpeechIds, dtype=None) -> dict:
    """Loss and accuracy over held-out rows: in all, and for text, slots 0 to 6 and the end.

    Row by row and 256 positions at a time, since the logits of a long row would fill a small card.
    """
    import torch

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = [*(f"slot{n}" for n in range(infer.SLOTS)), "end", "text"]
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
                kind[(kind < 0) | (kind >= infer.SLOTS)] = kinds.index("text")
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


def make_listener(tokenizer, codec, settings: Settings, report: prepare.Report, held: list[dict]):
    """listen(model, step): speaks sample_texts, looks at the held-out rows; (metrics, spoken)."""
    import torch

    ids = infer.read_speech_ids(tokenizer, codec.codebook_size)
    texts, voice = settings.sample_texts, next(iter(report.voices), None)
    base = argparse.Namespace(config=read_config(settings))
    for part in (part for text in texts for part in infer.parts_of(text, settings)):
        infer.begin(base, tokenizer, ids, part, settings, voice)  # a Mistake now, not at the end

    def listen(model, step: int, dtype=None) -> tuple[dict, list]:
        folder = sample_folder(settings, step)
        paths = [folder / f"{n:02}.wav" for n in range(1, len(texts) + 1)]
        for_inference, for_training = model.eval, model.train
        if settings.backend == "unsloth":
            for_inference, for_training = model.for_inference, model.for_training
        for_inference()
        with torch.random.fork_rng():  # training goes on as if nobody had listened
            more = {"quiet": True}
            spoken = infer.speak(texts, paths, model, tokenizer, codec, settings, voice, **more)
        metrics = held_out_metrics(model, held, ids, dtype)
        for_training()
        return metrics | ear_metrics(texts, spoken, report, metrics.get("eval_loss", 0)), spoken

    return listen


def sample_folder(settings: Settings, step: int) -> Path:
    return Path(settings.output_dir) / f"samples/step-{step:06}"


def ear_metrics(texts: list[str], spoken: list, report: prepare.Report, loss: float) -> dict:
    """What can be told of a voice without ears: does it end, and at the corpus's pace?

    The score orders checkpoints: the share that ended, then the pace, the held-out loss last.
    """
    if not spoken:
        return {"eval_score": -loss / 10}
    ended = sum(end for _, end in spoken) / len(spoken)
    seconds = sum(len(audio) for audio, _ in spoken) / infer.SAMPLE_RATE
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
    infer.write_text(out / "checks.csv", "\n".join(lines) + "\n")
    best = max(checks, key=lambda log: log["eval_score"])
    told = [f"{name[5:]} {best[name]:.3g}" for name in EAR if name in best]
    told += ["kept"] if (out / f"checkpoint-{best['step']}").is_dir() else []
    print(f"best     step {best['step']} of {len(checks)} checks: {', '.join(told)}")


# ---------------------------------------------------------------- training


def clips_in(rows, tokenizer) -> str:
    """What a batch says, be its rows a clip each or packed: the start of every prompt in it."""
    flat = rows.flatten().tolist()
    bos, eot = (tokenizer.convert_tokens_to_ids(infer.TOKEN_NAMES[n]) for n in ("bos", "eot"))
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
            return iter(prepare.length_batches(lengths, size, seed + self.epoch))

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
        losses = [logs.get(f"eval_loss_slot{n}", math.nan) for n in range(infer.SLOTS)]
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
    slots = {n: logs.get(f"eval_loss_slot{n}") for n in range(infer.SLOTS)}
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
                raise Mistake(f"{told}; last checkpoint: {good}; in the batch: {said}")
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
                writer.add_audio(name, audio[None], step, sample_rate=infer.SAMPLE_RATE)


def make_trainer(model, tokenizer, rows, arguments, settings: Settings, stop: dict, listen):
    """The trainer over ready rows; says how its batches are made."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback

    tokenizer.pad_token = infer.TOKEN_NAMES["pad"]
    align_special_tokens(model, tokenizer)
    disable_progress_bars()  # nothing is downloaded from here on
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    lengths = [len(row) for row in columns["input_ids"]]
    frames = sum(int((np.asarray(row) != -100).sum()) // infer.SLOTS for row in columns["labels"])
    seconds = frames * infer.FRAME_SAMPLES / infer.SAMPLE_RATE
    try:
        with quiet_libraries():
            trainer = trainer_class(lengths, seconds, listen)(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(columns),
                processing_class=tokenizer,
            )
    except ValueError as error:
        raise Mistake(f"settings: {' '.join(str(error).split())}") from None
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.monitor = training_monitor(settings, stop)
    trainer.add_callback(trainer.monitor)
    tell_batches(trainer, lengths)
    return trainer


def align_special_tokens(model, tokenizer) -> None:
    """Sets the model's special tokens to the tokenizer's, as transformers' Trainer wants them."""
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
        config.eos_token_id = [tokenizer.eos_token_id, *ends] if ends else tokenizer.eos_token_id


def tell_batches(trainer, lengths: list[int]) -> None:
    """How the batches are made, and the share of their slots that hold a token of a row."""
    args, size = trainer.args, trainer.args.per_device_train_batch_size
    if args.packing:
        how, slots = "packed", len(trainer.train_dataset) * args.max_length
        how += f", {args.max_length:,} tokens a row"
    elif args.pad_to_multiple_of:
        how, slots = f"padded to {args.max_length:,} tokens", len(lengths) * args.max_length
    else:
        how, slots = "padded to their longest row", prepare.count_padded(lengths, size, args.seed)
    rows = size * args.gradient_accumulation_steps * RANKS
    batches = math.ceil(len(trainer.train_dataset) / (size * RANKS))
    epoch = math.ceil(batches / args.gradient_accumulation_steps)  # optimiser steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    check_schedule(args, steps)
    used = f"{100 * sum(lengths) / slots:.1f} % used"
    print(f"batches  {how}, {used}; {rows} rows a step; {steps} steps")


DISK_FULL = ("No space left", "File too large", "quota exceeded", "inline_container")


@contextlib.contextmanager
def disk_watched(out: Path, where):
    """A full disk while something is saved becomes one line that says what is left, and what to do.

    torch, safetensors and the system each have an exception of their own for it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not any(word in str(error) for word in DISK_FULL):
            raise
        left = f"last checkpoint: {last_checkpoint(out) or 'none yet'}"
        told = f"{where()}: {out} cannot be written, its disk is full: free some, then --resume"
        raise Mistake(f"{told}; {left}") from None


def train(trainer, settings: Settings, checkpoint: Path | None, stop: dict) -> int:
    """Trains to the end and returns the tokens seen; on a signal saves, says how to go on."""
    import torch

    out, state = Path(settings.output_dir), checkpoint and checkpoint / "trainer_state.json"
    before = infer.read_json(state) if checkpoint else {}
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
        raise Mistake(f"{told}; last checkpoint: {last_checkpoint(out) or 'none yet'}") from None
    finally:
        trainer.monitor.close()
    state = trainer.state
    if stop and state.global_step < state.max_steps:
        print(f"stopped at step {state.global_step}; checkpoint in {settings.output_dir}")
        print(f"go on with: {resume_command(settings)}")
        sys.exit(130)
    return state.num_input_tokens_seen - before.get("num_input_tokens_seen", 0)


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


def python_command() -> str:
    """The Python in use, as a person in this folder would call it."""
    return sys.executable.removeprefix(os.getcwd() + os.sep)


def resume_command(settings: Settings) -> str:
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)] if RANKS > 1 else []
    resume = [] if settings.resume else ["--resume"]
    return shlex.join([python_command(), *ranks, *sys.argv, *resume])


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


# ---------------------------------------------------------------- what a run leaves


def resolved(settings: Settings) -> dict:
    """The settings as they are saved: with paths that hold from any folder."""
    paths = {name: infer.local(getattr(settings, name)) for name in ("model", "codec", "dataset")}
    return settings.flat() | paths | {"overwrite": False, "resume": False}


def save_config(settings: Settings) -> None:
    """Before the first step, since a checkpoint needs them as much as the adapter does."""
    path = Path(settings.output_dir) / infer.SAVED_CONFIG
    infer.write_text(path, json.dumps(resolved(settings), indent=2, ensure_ascii=False) + "\n")


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


def save_card(settings: Settings, report: prepare.Report) -> None:
    """README.md: a model card, unless the user has put a README.md there."""
    from huggingface_hub import ModelCard, ModelCardData

    out = Path(settings.output_dir)
    path, hub = out / "README.md", infer.on_hub(settings.model)
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
    infer.write_text(path, str(ModelCard(text)))


def peak_memory() -> int:
    """Bytes held at most so far: of the GPU where there is one, else of RAM."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


# ---------------------------------------------------------------- command line


def first_rank_first():
    """What the first rank encodes and writes, the others find."""
    from accelerate import PartialState

    return PartialState().main_process_first() if RANKS > 1 else contextlib.nullcontext()


def settle(settings: Settings, checkpoint: Path | None):
    """(SFTConfig, what it was asked for), once machine, backend and memory allow the settings."""
    infer.check_machine(settings.model)
    if settings.backend == "unsloth":
        with quiet_libraries():
            import unsloth  # noqa: F401  before trl, transformers and peft, which it patches
    arguments, _ = trainer_arguments(settings)
    check_remedies(settings, arguments)
    check_memory(settings, arguments, read_base(settings), checkpoint)
    return trainer_arguments(settings)


def main() -> None:
    started = time.perf_counter()
    settings = infer.read_command_line(__doc__)
    infer.check_names(settings)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first rank speaks for all
    if settings.plan:
        return tell_plan(settings, trainer_arguments(settings)[0], read_base(settings))
    with output_lock(settings):
        fine_tune(settings, started)


def fine_tune(settings: Settings, started: float) -> None:
    """From clips to adapter, in an output_dir that is this process's own."""
    checkpoint, out = check_output(settings), Path(settings.output_dir)
    clips = prepare.read_clips(settings)
    arguments, asked = settle(settings, checkpoint)
    tokenizer = infer.load_tokenizer(infer.fetch(settings.model, infer.TOKENIZER_FILES))
    codec = infer.load_codec(settings.codec, infer.device())
    with first_rank_first():
        rows, report = prepare.make_rows(clips, settings, tokenizer, codec)
    if RANK and settings.resume:  # the first rank has settled what is there by now
        checkpoint = last_checkpoint(out)
    report.tell(settings)
    if checkpoint:
        check_resumed(settings, report.digest)
    rows, held = report.split
    listen = make_listener(tokenizer, codec, settings, report, held)
    model, stop = load_model(settings, arguments), {}
    trainer = make_trainer(model, tokenizer, rows, arguments, settings, stop, listen)
    tell_changes(asked, trainer.args)
    with previous_run(settings):
        if not RANK:
            record_files(out, infer.SAVED_CONFIG, infer.SAVED_REPORT)
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
    infer.run(main)
