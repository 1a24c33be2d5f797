"""What settings, packages and machine allow together, and what is refused by name."""

import pytest
import torch
from conftest import DEMO, one_line
from running import PLAIN, settings_of

import finetune
from orpheus import compatibility
from orpheus.compatibility import (
    check_compatibility,
    check_optimizer,
    check_schedule,
    check_trackers,
    print_changes,
    resolve_settings,
)
from orpheus.settings import UserError, read_settings


def test_what_a_machine_cannot_do_is_refused_by_name(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine can")
    cases = [
        (["--weights", "fp8"], 'weights "fp8" need a GPU'),
        (["--weights", "4bit", "--full_finetuning"], 'full_finetuning needs weights "16bit"'),
        (["--gradient_checkpointing", "unsloth"], "set it to true"),
        (["--optim", "paged_adamw_8bit"], "optim paged_adamw_8bit needs a GPU"),
        (["--fp16", "true"], "fp16 needs a GPU"),
        (["--packing", "true"], "packing cannot be set, leave it out: it follows from batching"),
    ]
    for words, line in cases:
        words = [*DEMO, *PLAIN, "--output_dir", tmp_path / "out", *words]
        assert line in one_line(finetune.main, monkeypatch, *words)
    settings = resolve_settings(settings_of(weights="8bit"))
    with pytest.raises(UserError, match='or backend "transformers"'):
        check_compatibility(settings, finetune.make_sft_config(settings))


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("include_num_input_tokens_seen", "nonsense", "include_num_input_tokens_seen is"),
        ("accelerator_config", "none.json", "none.json"),
        ("use_liger_kernel", "true", "pip install liger-kernel"),
        ("activation_offloading", "true", "needs a GPU"),
        ("dataloader_multiprocessing_context", "fork", "dataloader_num_workers above 0"),
        ("optim", "lomo", "pip install lomo-optim"),
        ("optim_args", "nonsense", "optim_args"),
        ("lr_scheduler_kwargs", "nonsense", "lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs", '{"nonsense": 1}', "lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs", '{"num_cycles": "x"}', "lr_scheduler_kwargs"),
        ("lr_scheduler_type", "warmup_stable_decay", "num_decay_steps"),
        ("accelerator_config", '{"nonsense": 1}', "nonsense"),
        ("dataloader_persistent_workers", "true", "dataloader_num_workers above 0"),
    ],
)
def test_what_the_trainer_would_find_out_late(name, text, line, monkeypatch):
    monkeypatch.setattr(compatibility, "find_spec", lambda name: None)
    keys = {"backend": "transformers", "gradient_checkpointing": "false", name: text}
    with pytest.raises(UserError, match=line):
        settings = resolve_settings(read_settings("data/demo/config.json", keys))
        check_compatibility(settings, finetune.make_sft_config(settings))


def test_a_schedule_without_a_step_to_decay_over():
    keys = {"lr_scheduler_type": "polynomial", "max_steps": "1", "backend": "transformers"}
    settings = resolve_settings(read_settings("data/demo/config.json", keys))
    arguments = finetune.make_sft_config(settings)
    with pytest.raises(UserError, match="polynomial, over 1 steps of which 1 warm up"):
        check_optimizer(arguments)
    check_schedule(arguments, 2)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "comet_ml"])
def test_a_missing_tracker_is_told_with_its_pip_line(name, monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(UserError, match=f"report_to {name} needs its package: pip install"):
        check_trackers([name])


def test_an_unknown_tracker():
    with pytest.raises(UserError, match="report_to papertape: give one of none, "):
        check_trackers(["papertape"])


def test_packing_is_not_told_as_a_change(capsys):
    keys = {"batching": "pack", "backend": "transformers"}
    settings = resolve_settings(read_settings("data/demo/config.json", keys))
    arguments = finetune.make_sft_config(settings)
    print_changes(settings, arguments)
    assert capsys.readouterr().out == ""
    arguments.packing = False
    print_changes(settings, arguments)
    assert "changed packing: True" in capsys.readouterr().out
