"""Settings and command lines: bounds, config files, paths, and options that exclude each other."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT, one_line, script

import finetune
import orpheus.page
import orpheus.settings
from data import prepare
from orpheus import compatibility
from orpheus.compatibility import (
    check_compatibility,
    check_optimizer,
    check_schedule,
    check_trackers,
    print_changes,
    resolve_settings,
)
from orpheus.hub import fetch
from orpheus.keys import DERIVED, GROUPS, OWN_KEYS, TRAINER_TYPES, WITHOUT_EFFECT, Settings
from orpheus.settings import UserError, parse_json, read_settings, trainer_keys

BAD = {
    "temperature": ["-1", "inf", "nan", "1e-300", "1e300"],
    "repetition_penalty": ["0", "1e-300", "inf", "nan"],
    "top_p": ["0", "1e-300", "1.1", "nan"],
    "max_seconds": ["0", "inf", "nan", "1e18"],
    "best_of": ["0", "1000000000"],
    "speak_batch_size": ["0", "1000000000"],
    "keep_silence": ["-1", "inf", "1e18", "nan"],
    "silence_db": ["0", "inf", "nan", "1e9"],
    "limit": ["0", "1" + "0" * 30, "9" * 5000],
    "held_out": ["-0.1", "1", "nan"],
    "max_length": ["0", "1" + "0" * 12],
    "lora_r": ["0", "1000000"],
    "lora_alpha": ["0", "1" + "0" * 12],
    "lora_dropout": ["1", "nan"],
    "seed": ["-1", str(2**32), str(2**64)],
    "sample_steps": ["0", "1" + "0" * 12],
    "fit": ["0", "-1", "nan", "inf"],
    "learning_rate": ["nan", "-1", "0", "inf"],
    "num_train_epochs": ["0", "-3", "nan", "inf"],
    "max_steps": ["0", "-2"],
    "per_device_train_batch_size": ["0", "-1", "1000000000"],
    "gradient_accumulation_steps": ["0", "-1", "1000000000"],
    "warmup_steps": ["-1", "nan"],
    "weight_decay": ["-1", "nan", "inf"],
    "max_grad_norm": ["-1", "nan", "inf"],
    "logging_steps": ["0", "-1", "nan"],
    "save_steps": ["0", "-1", "nan"],
    "save_total_limit": ["0", "-1"],
    "adam_beta1": ["1", "-1", "nan"],
    "adam_epsilon": ["0", "nan"],
    "data_seed": ["-1", str(2**64)],
    "neftune_noise_alpha": ["-1", "inf"],
    "device_map": ["nonsense"],
    "language": ["", "English", "e"],
    "dataset": ["", " ", "a\0b", "\udcff"],
    "model": ["", "a\0b", "null"],
    "torch_compile_mode": ["nonsense"],
    "output_dir": ["", "a\0b", "\udcff"],
    "cache_dir": ["", "a\0b"],
    "voice": ["", "\udcff"],
    "sample_texts": ['[""]', '["a", " "]', '["a\\u0000"]', "[" * 100_000],
}


@pytest.mark.parametrize("name", BAD)
def test_a_value_out_of_bounds_is_named(name, tmp_path):
    """From the command line and, where JSON can say it, from a config."""
    for text in BAD[name]:
        with pytest.raises(UserError, match=f"^command line: {name}") as caught:
            read_settings(None, {name: text})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        given = parse_json(text)
        if given is None or text.startswith("[[") or len(text) > 1000:
            continue
        config = tmp_path / "mine.json"
        config.write_text(json.dumps({name: given}))
        with pytest.raises(UserError, match=rf"mine\.json: {name}"):
            read_settings(config)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0),
        ("temperature", "0.01", 0.01),
        ("fit", "1", 1.0),
        ("fit", "true", True),
        ("fit", "False", False),
        ("voice", "7", "7"),
        ("voice", "true", "true"),
        ("voice", "null", None),
        ("overwrite", "True", True),
        ("seed", str(2**32 - 1), 2**32 - 1),
    ],
)
def test_a_value_within_bounds(name, text, value):
    found = getattr(read_settings(None, {name: text}), name)
    assert found == value and isinstance(found, bool) == isinstance(value, bool)


def test_bounds_are_of_keys_that_exist():
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    assert trainer_keys() == known
    config = json.loads((ROOT / "config.json").read_text())
    refused = {*DERIVED, *WITHOUT_EFFECT}
    assert set(TRAINER_TYPES) | refused | (set(config) - set(OWN_KEYS)) <= known
    assert not refused & set(config)


def test_every_other_number_of_the_trainer_is_finite():
    settings = read_settings(None, {"router_aux_loss_coef": "nan"})
    with pytest.raises(UserError, match=r"router_aux_loss_coef is .* finite"):
        resolve_settings(settings)


@pytest.mark.parametrize("name", [*DERIVED, *WITHOUT_EFFECT])
def test_trainer_keys_that_would_not_be_used_are_refused(name):
    reason = "is set by finetune.py itself" if name in DERIVED else "has no effect, leave it out: "
    with pytest.raises(UserError, match=f"^command line: {name} {reason}"):
        read_settings("data/demo/config.json", {name: "1"})


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "comet_ml"])
def test_a_missing_tracker_is_told_with_its_pip_line(name, monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(UserError, match=f"report_to {name} needs its package: pip install"):
        check_trackers([name])


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("log_level", "nonsense", "log_level is"),
        ("packing_strategy", "nonsense", "packing_strategy is"),
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


# ---------------------------------------------------------------- config files


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"limit": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"limit": 1, "limit": 2}', "'limit' is there twice"),
        (b'{"voice": "\xff"}', "not JSON"),
        (b'{"voice": "a\x00"}', "not JSON"),
        (b'{"voice": "a\\u0000"}', "voice holds a NUL byte"),
        (b'{"voice": "\\udcff"}', "voice is"),
        (b"", "not JSON"),
        (b"3", "must be one JSON object"),
    ],
)
def test_a_config_that_cannot_be_used(content, line, tmp_path):
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.json: .*{line}|mine\.json: {line}"):
        read_settings(tmp_path / "mine.json")


def test_a_config_with_a_byte_order_mark(tmp_path):
    (tmp_path / "mine.json").write_text('{"limit": 5}', encoding="utf-8-sig")
    assert read_settings(tmp_path / "mine.json").limit == 5


def test_a_config_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_settings(path)
    for path in ("no.json", "a\0b", "x" * 300, ""):
        with pytest.raises(UserError):
            read_settings(path)


def test_paths_are_looked_for_beside_their_config(tmp_path, monkeypatch):
    (tmp_path / "there/clips").mkdir(parents=True)
    config = tmp_path / "there/mine.json"
    config.write_text('{"dataset": "clips", "output_dir": "out", "model": "you/anna"}')
    monkeypatch.chdir(tmp_path)
    settings = read_settings(config)
    assert settings.dataset == str(tmp_path / "there/clips")
    assert (settings.output_dir, settings.model) == ("out", "you/anna")
    assert read_settings().dataset == str(ROOT / "data/numbers")
    assert read_settings(config, {"dataset": "numbers"}).dataset == "numbers"
    (tmp_path / "clips").mkdir()
    assert read_settings(config).dataset == "clips"


# ---------------------------------------------------------------- command lines


def test_a_missing_package_is_one_line(capsys):
    def main():
        import no_such_package  # noqa: F401

    with pytest.raises(SystemExit, match="2"):
        orpheus.settings.run(main)
    assert capsys.readouterr().err == (
        "error: No module named 'no_such_package'; `make` installs what is needed\n"
    )


@pytest.mark.parametrize("main", [finetune.main, prepare.main])
def test_unknown_keys_are_refused(main, monkeypatch, tmp_path):
    words = [*DEMO, "--output_dir", tmp_path, "--backend", "transformers", "--datset", "x"]
    words += ["--gradient_checkpointing", "false", "--cache_dir", "null"]
    line = one_line(main, monkeypatch, *words)
    assert "no key is named 'datset'; the nearest is 'dataset'" in line


@pytest.mark.parametrize("text", ["seven " * 3000, "x" * 100_000])
def test_sample_texts_that_do_not_fit_are_refused_before_loading(text, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("a model was loaded"))
    words = ["--backend", "transformers", "--limit", "4", "--cache_dir", "null"]
    words += ["--sample_texts", json.dumps([text]), "--max_seconds", "3600"]
    words += ["--output_dir", tmp_path]
    assert "no room for a frame" in one_line(finetune.main, monkeypatch, *DEMO, *words)


def test_an_unreachable_hub_names_a_way_out(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"hub cannot be reached; check the network, .* \(no route"):
        fetch("some/model", ["*"])


def test_a_closed_pipe_ends_quietly():
    program = "from orpheus.settings import run; run(lambda: [print('x' * 999) for _ in range(99)])"
    command = f"{sys.executable} -c {json.dumps(program)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.endswith("\n141\n")


@pytest.mark.parametrize("name", ["finetune.py", "data/prepare.py"])
def test_help_and_mistakes_in_keys_need_no_heavy_imports(name):
    mistakes = {
        ("--learning_rate", "nan"): "error: command line: learning_rate is",
        ("--adam_beta_2", "0.9"): "no key is named 'adam_beta_2'; the nearest is 'adam_beta2'",
        ("--eval_steps", "5"): "error: command line: eval_steps has no effect, leave it out:",
        ("--help",): "",
    }
    for words, line in mistakes.items():
        code, _, errors = script("-X", "importtime", name, *words)
        assert code == (2 if line else 0) and line in errors
        assert not re.search(r"\| +(torch|trl|transformers|datasets|snac|peft)$", errors, re.M)


def test_help_shows_each_key_with_its_meaning_and_default():
    code, printed, _ = script("finetune.py", "--help")
    entries = dict(re.findall(r"^  --(\w+) +(\S.*(?:\n {20}.*)*)$", printed, re.M))
    config = json.loads((ROOT / "config.json").read_text())
    assert code == 0 and set(config) == set(Settings.model_fields) == set(entries) - {"config"}
    for name, value in config.items():
        words = " ".join(entries[name].split())
        assert words.endswith(f"(default: {json.dumps(value)})") and words[0].isalpha(), name
    assert re.findall(r"^(\w+):$", printed, re.M)[1:] == list(GROUPS.values())
    assert set(GROUPS) <= set(config)


def test_a_changed_copy_leaves_the_settings_alone():
    settings = read_settings(None, {"adam_beta2": "0.9"})
    changed = settings.replace(limit=5, adam_beta2=0.8, adam_beta1=0.7, learning_rate=1.0)
    assert (settings.limit, settings.trainer["adam_beta2"]) == (None, 0.9)
    assert "adam_beta1" not in settings.flat() and settings.learning_rate == 2e-4
    given = {"adam_beta2": 0.8, "adam_beta1": 0.7, "learning_rate": 1.0}
    assert changed.limit == 5 and given.items() <= changed.trainer.items()
    assert changed.flat().keys() == settings.flat().keys() | {"adam_beta1"}
    assert not set(OWN_KEYS) & set(changed.trainer)


def test_keys_of_a_saved_config_are_not_looked_up(tmp_path):
    (tmp_path / "saved.json").write_text('{"a_key_of_an_earlier_trl": 1}')
    settings = read_settings(tmp_path / "saved.json", saved=True)
    assert settings.trainer["a_key_of_an_earlier_trl"] == 1
    with pytest.raises(UserError, match=r"saved\.json: no key is named 'a_key_of_an_earlier_trl'"):
        read_settings(tmp_path / "saved.json")
