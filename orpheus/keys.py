"""Every key of a run's settings: its type, its bounds and its meaning. Defaults: config.json."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=10**6)]
Steps = Annotated[float, Field(gt=0, le=10**9)]  # under 1: a share of all steps
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Temperature = Annotated[float, Field(ge=0, le=0)] | Annotated[float, Field(ge=0.01, le=100)]


def setting(description: str, **bounds):
    """One of this project's own keys; `bounds` are pydantic's (gt, ge, lt, le, pattern)."""
    return Field(description=description, **bounds)


def trainer_setting(description: str, **bounds):
    """A key of TRL's SFTConfig for which config.json has a default."""
    return Field(description=description, json_schema_extra={"trainer": True}, **bounds)


class Settings(BaseModel):
    """All settings of a run, as attributes. Keys that are not listed here are SFTConfig's.

    Functions do not change the settings they are given: `replace` makes changed copies.
    """

    model_config = ConfigDict(extra="allow", defer_build=True)

    # data
    dataset: str = setting("Folder of clips (data/README.md), or the hub id of a dataset")
    dataset_config: str | None = setting("Configuration of a hub dataset")
    dataset_split: str = setting("Split of a hub dataset")
    dataset_revision: str | None = setting("Branch, tag or commit of a hub dataset")
    text_column: str | None = setting("Column of the texts; null: by convention (data/README.md)")
    audio_column: str | None = setting("Column of the recordings; null: by convention")
    voice_column: str | None = setting("Column of the voices; null: by convention")
    absolute_paths: bool = setting("Let rows name recordings outside the dataset's folder")
    voice: str | None = setting("Voice name for clips that name no speaker")
    limit: int | None = setting("Use the first N clips only, for a quick trial", gt=0, le=10**9)
    keep_silence: float | None = setting(
        "Seconds of silence kept at both ends of a clip; null: all of it", ge=0, le=600
    )
    silence_db: float = setting(
        "Silence is this many dB below the loudest moment of a clip", gt=0, le=200
    )
    leave_out: list[str] = setting("Findings of data/prepare.py whose clips are not trained on")
    cache_dir: str | None = setting("Folder that keeps encoded clips for later runs; null: none")

    # rows
    train_on: Literal["audio", "all"] = setting(
        "audio: loss on the audio tokens alone; all: on the prompt too, as in Orpheus's own trainer"
    )
    max_length: int = setting(
        "Longest row, and the length of a packed row, in tokens (82 a second)", gt=0, le=10**6
    )
    too_long: Literal["drop", "truncate"] = setting(
        "drop: rows over max_length are left out; truncate: they are cut after a whole frame, "
        "without an end token"
    )
    batching: Literal["pack", "pad", "pad_to_max"] = setting(
        "pack: whole clips fill rows of max_length; pad: each batch is padded to its longest row, "
        "with rows of similar length together; pad_to_max: every row is padded to max_length"
    )

    # model
    model: str = setting("Base model: hub id or folder")
    codec: str = setting("SNAC 24 kHz codec: hub id or folder")
    backend: Literal["unsloth", "transformers"] = setting(
        "unsloth; or transformers: plain TRL and PEFT, the only backend that packs on a CPU"
    )
    full_finetuning: bool = setting('Train all weights (needs weights "16bit") instead of a LoRA')
    lora_r: int = setting("Rank of the LoRA, which is on every linear layer", gt=0, le=4096)
    lora_alpha: int = setting("The LoRA is scaled by lora_alpha / lora_r", gt=0, le=10**5)
    lora_dropout: float = setting("Dropout in the LoRA", ge=0, lt=1)

    # memory
    weights: Literal["4bit", "8bit", "fp8", "16bit"] = setting(
        "Precision of the base's weights: 4bit (QLoRA), 8bit, fp8 (Unsloth, on Hopper) or 16bit"
    )
    gradient_checkpointing: bool | Literal["unsloth"] = setting(
        "true: recompute activations to save memory; unsloth: also offload them to RAM; false: off"
    )
    per_device_train_batch_size: Count = trainer_setting("Rows per batch on each GPU")
    gradient_accumulation_steps: Count = trainer_setting("Batches per optimiser step")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = setting(
        "auto or balanced: split one model over several GPUs; null: no"
    )
    plan: bool = setting("Print where the memory would go, and stop")
    fit: bool | Annotated[float, Field(gt=0, le=10_000)] = setting(
        "true: choose rows per batch and checkpointing by the GPU's free memory; a number: GiB to "
        "stay within"
    )

    # training
    num_train_epochs: float = trainer_setting("Passes over the data", gt=0, le=10**6)
    max_steps: Literal[-1] | Annotated[int, Field(ge=1, le=10**9)] = trainer_setting(
        "Optimiser steps, in place of num_train_epochs; -1: as many as those take"
    )
    learning_rate: float = trainer_setting("Peak learning rate", gt=0, le=1)
    lr_scheduler_type: str = trainer_setting("Learning rate schedule, any of transformers'")
    warmup_steps: float = trainer_setting(
        "Steps of warmup; under 1: a share of all steps", ge=0, le=10**9
    )
    optim: str = trainer_setting(
        "Optimiser: adafactor, paged_adamw_8bit or any other of transformers'"
    )
    weight_decay: float = trainer_setting("Weight decay", ge=0, le=100)
    max_grad_norm: float = trainer_setting(
        "Gradients are clipped to this norm; 0: not at all", ge=0, le=10**6
    )
    bf16: bool | None = trainer_setting("Mixed precision in bfloat16; null: unless fp16 is on")
    fp16: bool = trainer_setting(
        "Mixed precision in float16, for GPUs before Ampere; without either it is float32"
    )
    seed: Seed = setting("Seed of training and of speaking")

    # saving
    output_dir: str = setting("Folder for the adapter, checkpoints and samples")
    overwrite: bool = setting(
        "Replace the run in output_dir, once this one has saved a checkpoint or adapter"
    )
    resume: bool = setting("Continue from the last complete checkpoint in output_dir")
    save_steps: Steps = trainer_setting("Steps between checkpoints")
    save_total_limit: Count | None = trainer_setting("How many checkpoints to keep; null: all")

    # checks
    held_out: float = setting("Share of the texts that is not trained on but evaluated", ge=0, lt=1)
    sample_steps: int = setting(
        "Steps between checks, which compute held-out loss and speak sample_texts", gt=0, le=10**9
    )
    sample_texts: list[str] = setting(
        "Texts that are spoken to output_dir/samples at every check and at the end"
    )
    judge_samples: bool | str = setting(
        "true: score the samples of each check by the judges that are installed, and choose the "
        "best checkpoint by them; a size or folder: the same with this model of faster-whisper"
    )
    logging_steps: Steps = trainer_setting("Steps between lines of the log")
    include_num_input_tokens_seen: bool | Literal["all", "non_padding", "no"] = trainer_setting(
        "Tokens counted for tokens/s and hours of audio: non_padding, all or no"
    )
    logging_nan_inf_filter: bool = trainer_setting(
        "Hide losses that are not finite from the log; they stop the run either way"
    )
    report_to: str | list[str] | None = trainer_setting(
        "Trackers: tensorboard (in output_dir/runs, with the samples), wandb, trackio, … or none"
    )

    # speaking
    temperature: Temperature = setting("Sampling temperature; 0: greedy")
    top_p: float = setting("Nucleus sampling", ge=0.01, le=1)
    repetition_penalty: float = setting(
        "Penalty on tokens of the prompt and the audio so far; 1: off", ge=0.1, le=10
    )
    max_seconds: float = setting("Longer speech is cut off, and reported", gt=0, le=3600)
    speak_batch_size: int = setting(
        "Texts, or candidates of one text, generated in one batch", gt=0, le=1024
    )
    best_of: int = setting(
        "Candidates generated for every text, of which the best is kept", gt=0, le=256
    )
    # sentencex takes any code; for a language it does not know it uses rules that many share
    language: str = setting(
        "ISO code of the language whose rules split a text into sentences", pattern="^[a-z]{2,3}$"
    )
    cuda_graph: bool = setting("Run each frame as one CUDA graph when speaking on a GPU")

    def flat(self) -> dict[str, Any]:
        """All keys and values in one dict, as config.json has them."""
        return dict(self)

    @property
    def trainer(self) -> dict[str, Any]:
        """The keys that only SFTConfig has: those of config.json, and all that were given."""
        return {name: value for name, value in self if name not in OWN_KEYS}

    def replace(self, **changes) -> Self:
        """A copy with some keys changed, which may be any of SFTConfig's. They are not checked."""
        return self.model_copy(update=changes)


OWN_KEYS = {name: f for name, f in Settings.model_fields.items() if not f.json_schema_extra}
# The key with which each group of --help begins.
GROUPS = {
    "dataset": "data",
    "train_on": "rows",
    "model": "model",
    "weights": "memory",
    "num_train_epochs": "training",
    "output_dir": "saving",
    "held_out": "checks",
    "temperature": "speaking",
}

# Bounds of SFTConfig's other keys, whose own types have none: beyond them a run would end in a
# traceback, or train on something else.
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
TRAINER_TYPES = {
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Annotated[float, Field(gt=0, le=1)],
    "data_seed": Seed | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0, le=1024)],
    "dataloader_prefetch_factor": Count | None,
    "fsdp": bool | str | None,
    "label_smoothing_factor": Share,
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "neftune_noise_alpha": Annotated[float, Field(ge=0, le=1000)] | None,
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "torch_compile_mode": CompileMode | None,
}

# Names that other tools have for keys.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "load_in_4bit": 'weights "4bit"',
}
# Why keys of SFTConfig cannot be set: finetune.py sets them itself, or they would have no effect.
REASONS = {
    "it follows from batching": "packing padding_free pad_to_multiple_of",
    "a GPU is used if there is one": "use_cpu",
    "--resume continues from the last checkpoint in output_dir": "resume_from_checkpoint "
    "ignore_data_skip restore_callback_states_from_checkpoint",
    "finetune.py always trains and evaluates": "do_train do_eval do_predict",
    "`hf upload you/anna outputs/anna` publishes a finished run": "push_to_hub hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "sample_steps sets when a run is evaluated, held_out on what": "eval_strategy eval_steps "
    "eval_delay eval_on_start eval_packing eval_do_concat_batches eval_accumulation_steps "
    "eval_use_gather_object batch_eval_metrics per_device_eval_batch_size prediction_loss_only "
    "include_for_metrics bf16_full_eval fp16_full_eval",
    "the best checkpoint is always kept, and checks.csv names it": "load_best_model_at_end "
    "metric_for_best_model greater_is_better",
    "data/prepare.py tokenises, orders and labels the rows": "dataset_text_field dataset_kwargs "
    "dataset_num_proc shuffle_dataset truncation_mode completion_only_loss assistant_only_loss "
    "chat_template_path eos_token pad_token train_sampling_strategy length_column_name",
    "weights and device_map set how the base is loaded": "model_init_kwargs trust_remote_code",
    "device_map, torchrun and fsdp use several GPUs": "parallelism_config",
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}
