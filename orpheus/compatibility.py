"""What SFTConfig, the backend and the machine allow, checked before a model is loaded."""

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import torch
from transformers import Trainer, get_scheduler, integrations
from trl import SFTConfig

from orpheus.runs import WORLD_SIZE
from orpheus.settings import Settings, UserError, parse_trainer_keys


def resolve_settings(settings: Settings) -> Settings:
    """Return the settings with SFTConfig's keys in its types, and the precision decided.

    Raises: UserError for a value that SFTConfig does not take.
    """
    hints = get_type_hints(SFTConfig) | {"fsdp": bool | str | None}  # it takes true, which says str
    return resolve_precision(parse_trainer_keys(settings, hints))


def resolve_precision(settings: Settings) -> Settings:
    """The settings with `bf16` and `fp16` decided: null takes bf16 where the GPU has it, else fp16.

    A CPU computes in bf16 with or without instructions for it.
    """
    gpu = torch.cuda.is_available()
    has_bf16 = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    bf16, fp16 = settings.bf16, settings.fp16
    if bf16 and not has_bf16:
        raise UserError("settings: bf16 needs an Ampere or newer GPU; set bf16 false, fp16 true")
    if bf16 is None:
        bf16, fp16 = has_bf16 and not fp16, fp16 or not has_bf16
    return settings.replace(bf16=bf16, fp16=fp16)


def check_compatibility(settings: Settings, arguments: SFTConfig) -> None:
    """`UserError` for what this backend or machine cannot do, before anything would replace it."""
    gpu, unsloth = torch.cuda.is_available(), settings.backend == "unsloth"
    optimizer = getattr(arguments.optim, "value", arguments.optim)
    lean = any(word in optimizer for word in ("8bit", "paged", "bnb"))
    workers = arguments.dataloader_num_workers
    refused = {
        'weights "8bit" need a GPU, or backend "transformers"': (
            settings.weights == "8bit" and unsloth and not gpu
        ),
        'weights "fp8" need a GPU and backend "unsloth"': (
            settings.weights == "fp8" and not (gpu and unsloth)
        ),
        'weights "fp8" need compute capability 9.0 or newer, as an H100 or RTX 50 has': (
            settings.weights == "fp8" and gpu and torch.cuda.get_device_capability() < (9, 0)
        ),
        'full_finetuning needs weights "16bit"': (
            settings.full_finetuning and settings.weights != "16bit"
        ),
        'gradient_checkpointing "unsloth" needs backend "unsloth"; set it to true': (
            settings.gradient_checkpointing == "unsloth" and not unsloth
        ),
        "fp16 needs a GPU; set bf16, or neither for fp32": arguments.fp16 and not gpu,
        f"optim {optimizer} needs a GPU; adamw_torch_fused does not": lean and not gpu,
        'fsdp needs backend "transformers"': bool(arguments.fsdp) and unsloth,
        "activation_offloading needs a GPU": arguments.activation_offloading and not gpu,
        "use_liger_kernel needs its package: pip install liger-kernel": (
            arguments.use_liger_kernel and not find_spec("liger_kernel")
        ),
        "dataloader_multiprocessing_context needs dataloader_num_workers above 0": (
            arguments.dataloader_multiprocessing_context is not None and not workers
        ),
        "dataloader_persistent_workers needs dataloader_num_workers above 0": (
            arguments.dataloader_persistent_workers and not workers
        ),
        "fit plans for a single GPU: leave it out with several ranks, device_map or fsdp": (
            settings.fit and (WORLD_SIZE > 1 or settings.device_map or arguments.fsdp)
        ),
    }
    for message in (message for message, condition in refused.items() if condition):
        raise UserError(f"settings: {message}")
    if gpu and unsloth:
        check_compiler()
    check_trackers(arguments.report_to)
    check_optimizer(arguments)


def check_compiler() -> None:
    """`UserError` where Triton could not build its launcher at the first of Unsloth's kernels."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    compiler = any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))
    if not compiler or not header.is_file():
        missing = "a C compiler" if not compiler else f"Python's C headers ({header})"
        packages = f"build-essential python3.{sys.version_info.minor}-dev"
        remedy = f"`sudo apt install {packages}`, or --backend transformers"
        raise UserError(f"Unsloth's kernels need {missing}: {remedy}")


PIP_NAMES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_trackers(report_to: list[str]) -> None:
    """`UserError` for a tracker whose package is missing: it is needed only after loading."""
    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in report_to:
        if name not in known:
            raise UserError(f"settings: report_to {name}: give one of none, {', '.join(known)}")
        if name not in integrations.get_available_reporting_integrations():
            package = PIP_NAMES.get(name, name)
            raise UserError(f"settings: report_to {name} needs its package: pip install {package}")


def check_optimizer(arguments: SFTConfig) -> None:
    """`UserError` where the optimizer or schedule could not be made once the model is loaded."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"settings: optim or optim_args: {error}") from None
    check_schedule(arguments, arguments.max_steps if arguments.max_steps > 0 else 100)


def check_schedule(arguments: SFTConfig, steps: int) -> None:
    """`UserError` where there is no learning rate for the first, last or any warmup step."""
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=arguments.learning_rate)
    warmup, kwargs = arguments.get_warmup_steps(steps), arguments.lr_scheduler_kwargs
    try:
        schedule = get_scheduler(
            arguments.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs
        )
        optimizer.step()  # torch warns if the schedule steps before its optimizer
        for schedule.last_epoch in (0, warmup - 1, steps - 1):
            schedule.step()
    except (ImportError, ValueError, TypeError, ArithmeticError) as error:
        name = f"lr_scheduler_type {arguments.lr_scheduler_type.value}"
        raise UserError(
            f"settings: {name}, over {steps} steps of which {warmup} warm up: {error}; change it, "
            "lr_scheduler_kwargs or warmup_steps"
        ) from None


QUANTISED = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}  # bitsandbytes' classes


def check_loaded(model, settings: Settings, dtype: torch.dtype) -> None:
    """Prints what was loaded; `UserError` where the weights are not held as was asked."""
    classes = {type(module).__name__ for module in model.modules()}
    if settings.weights in QUANTISED and QUANTISED[settings.weights] not in classes:
        raise UserError(
            f"weights {settings.weights}: {settings.backend} loaded 16-bit ones instead; "
            "`python -m bitsandbytes` says what is wrong with it"
        )
    used = model.dtype if settings.weights == "16bit" else dtype
    if used != dtype:
        print(f"changed dtype: {dtype} was asked for, {settings.backend} loaded {used}")
    weights = str(used).removeprefix("torch.")
    if settings.weights != "16bit":
        weights = f"{settings.weights.replace('bit', '-bit')}, {weights}"
    method = "all weights" if settings.full_finetuning else f"LoRA r={settings.lora_r}"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"model    {settings.model}, {weights}; {method}: {trained:.3g} M parameters to train")
    attention, slow = attention_backend(model, settings)
    if torch.cuda.is_available():
        print(f"         attention: {attention}")
    if slow:
        print("warning  packed rows take one attention call per clip, since xformers does not work")
        print("         here and torch is older than 2.12: install either (requirements/gpu.txt)")


def attention_backend(model, settings: Settings) -> tuple[str, bool]:
    """The implementation of attention, and whether it is the slow one for packed rows."""
    if settings.backend != "unsloth" or not torch.cuda.is_available():
        return model.config._attn_implementation, False
    from unsloth.utils import attention_dispatch

    packed = settings.batching == "pack"
    name = attention_dispatch.select_attention_backend(use_varlen=packed)
    if name != attention_dispatch.SDPA or not packed:
        return name, False
    # torch's own kernel for rows of several clips; without it Unsloth calls SDPA for each clip
    varlen = attention_dispatch._NATIVE_BEATS_XFORMERS
    return ("torch varlen", False) if varlen else (name, True)


def print_changes(settings: Settings, arguments: SFTConfig) -> None:
    """Prints the settings that the backend replaced while it made its trainer."""
    requested = settings.trainer | {"packing": settings.batching == "pack"}
    requested["gradient_checkpointing"] = bool(settings.gradient_checkpointing)
    for name, value in requested.items():
        used = getattr(arguments, name)
        used = getattr(used, "value", used)
        if value not in (None, "none", used, *(used if isinstance(used, list) else [])):
            print(f"changed {name}: {value} → {used} (by the backend, for this machine)")
