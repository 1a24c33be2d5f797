"""finetune.py: settings, batches, a whole run, stopping and resuming, and a person's mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import DEMO, ROOT, one_line, program, script
from running import KEYS, PLAIN, run_here, same_file, settings_of

import finetune
from orpheus.files import is_adapter
from orpheus.models import load_model
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT, reporting_full_disk
from orpheus.settings import Settings, UserError
from orpheus.trainer import resolve_settings

# ---------------------------------------------------------------- settings


def test_every_sftconfig_key_is_reachable(tmp_path):
    keys = {"adam_beta2": "0.95", "neftune_noise_alpha": "5"}
    settings = resolve_settings(settings_of(output_dir=str(tmp_path), **keys))
    arguments = finetune.make_sft_config(settings)
    assert (arguments.adam_beta2, arguments.neftune_noise_alpha) == (0.95, 5.0)
    assert dict(settings)["adam_beta2"] == 0.95


def test_the_main_job_without_a_gpu(tmp_path):
    model = Settings.model_fields["model"].default
    code, _, errors = script("finetune.py", "--model", model, "--output_dir", tmp_path / "out")
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and "no GPU" in line and "days" in line and "make demo" in line


# ---------------------------------------------------------------- remedies


REMEDIES = {
    "4-bit": ({"weights": "4bit"}, ", 4-bit, float32; LoRA r=64: "),
    "8-bit": ({"weights": "8bit"}, ", 8-bit, float32;"),
    "16-bit": ({"weights": "16bit"}, "data/demo/base, float32; LoRA"),
    "full": ({"full_finetuning": "true", "learning_rate": "1e-4"}, "; all weights: 3.95 M"),
    "checkpointing": ({"gradient_checkpointing": "true"}, "base, float32; LoRA"),
    "bf16": ({"bf16": "true"}, "base, bfloat16; LoRA"),
    "adafactor": ({"optim": "adafactor"}, "base, float32; LoRA"),
    "sgd": ({"optim": "sgd", "learning_rate": "1"}, "base, float32; LoRA"),
    "accumulation": ({"gradient_accumulation_steps": "3"}, "6 rows a step"),
    "packed": ({"batching": "pack", "per_device_train_batch_size": "1"}, "batches  packed, 1,024"),
    "fixed": ({"batching": "pad_to_max"}, "padded to 1,024 tokens"),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_trains_and_reloads(name, tmp_path, monkeypatch, capsys):
    """Real steps on one batch with each remedy: the loss falls, and what was saved loads again."""
    overrides, sign = REMEDIES[name]
    run_here(monkeypatch, tmp_path, limit="2", max_steps="4", **overrides)
    printed = capsys.readouterr().out
    assert sign in printed
    first, last = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", printed).groups())
    assert last < first
    assert is_adapter(tmp_path) == (name != "full")
    model, _ = load_model(str(tmp_path))
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()


# ---------------------------------------------------------------- nothing lost


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_resume_past_the_first_epoch_is_bit_identical(batching, tmp_path, monkeypatch):
    keys = {"batching": batching, "max_length": "256", "save_steps": "1", "save_total_limit": "9"}
    keys |= {"max_steps": "9", "lr_scheduler_type": "cosine", "lora_dropout": "0.1"}
    run_here(monkeypatch, tmp_path / "whole", **keys)
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in (SAVED_CONFIG, SAVED_REPORT):
        (torn / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    state = json.loads((tmp_path / "whole/checkpoint-7/trainer_state.json").read_text())
    assert state["epoch"] > 1
    shutil.copytree(tmp_path / "whole/checkpoint-7", torn / "checkpoint-7")
    run_here(monkeypatch, torn, **keys, resume="true")
    name = "adapter_model.safetensors"
    assert same_file(tmp_path / "whole" / name, torn / name)


def test_three_kills_change_nothing(tmp_path):
    """kill −9 at any moment, data preparation and saving included; stress_resume.py does twenty."""
    code, printed, errors = script("tests/stress_resume.py", "3", tmp_path, timeout=900)
    assert code == 0, printed + errors
    assert "3 kills, the same adapter" in printed


# ---------------------------------------------------------------- the console


def test_the_console_has_one_line_for_each_step_and_each_check(finished):
    """What libraries print is in a file; one line a logging step, one a check, nothing else."""
    out, printed = finished
    lines = printed[: printed.index("---")].splitlines()
    lines = lines[next(n for n, line in enumerate(lines) if line.startswith("model")) :]
    words = [line.split()[0] for line in lines]
    assert words == ["model", "batches", "step", "check", "best"], printed
    step, check = lines[2:4]
    number = r"[\d,.]+"
    pattern = rf"step     4/4   loss {number}   lr {number}e-\d   {number} tok/s   "
    assert re.fullmatch(pattern + rf"{number} h of audio   {number} GiB   0:00:00 left", step), step
    samples = re.escape(f"samples: {out}/samples/step-000004/")
    pattern = rf"check    step 4   held-out {number}   slots 0–6:( {number}){{7}}   "
    assert re.fullmatch(pattern + rf"ended \d/2   pace {number}   {samples}", check), check


def test_too_few_clips_of_a_voice_are_warned_of_with_the_data(finished):
    lines = finished[1].splitlines()
    data = next(n for n, line in enumerate(lines) if line.startswith("data "))
    assert lines[data + 1].startswith("warning  slt has 16 clips (Orpheus's README: ")


# ---------------------------------------------------------------- batches


def test_rows_of_1054_and_337_tokens_train_in_one_batch(tmp_path):
    """The pair of the classic crash, through Unsloth: all three tensors are padded alike."""
    overrides = {"per_device_train_batch_size": "2", "max_steps": "1", "max_length": "1100"}
    overrides["output_dir"] = str(tmp_path)
    code, _, errors = program("train_two_lengths", json.dumps(overrides))
    assert code == 0, errors


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_adapter_config_report_and_samples(finished):
    out, printed = finished
    config = json.loads((out / SAVED_CONFIG).read_text())
    assert config["model"] == str(ROOT / "data/demo/base") and config["max_steps"] == 4
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        ROOT / "data/demo/base"
    )
    assert json.loads((out / SAVED_REPORT).read_text())["voices"] == {"slt": 16}
    assert (out / "adapter_model.safetensors").is_file()
    assert not list(out.glob(".*"))
    wavs = sorted((out / "samples/step-000004").glob("*.wav"))
    assert len(wavs) == len(config["sample_texts"])
    frames = [soundfile.info(wav).frames for wav in wavs]
    assert min(frames) > 0 and not any(count % 2048 for count in frames)
    for word in ("padded to their longest row", "minutes", "tokens/s", "at its peak", str(out)):
        assert word in printed


def test_the_adapter_gives_the_same_logits_in_plain_transformers(finished):
    code, printed, errors = program("reload_adapter", finished[0])
    assert code == 0, errors
    difference, without = map(float, printed.split())
    assert difference < 1e-4 < without


def test_training_and_speaking_quantise_the_same_layers():
    """Otherwise an adapter would speak over weights that it was not trained over."""
    layers = {}
    for purpose in ("training", "speaking"):
        code, printed, errors = program("quantised_layers", purpose)
        assert code == 0, errors
        layers[purpose] = [line for line in printed.splitlines() if line.startswith("layer ")]
    assert layers["training"] == layers["speaking"]
    assert len(layers["training"]) == 4 * 7  # the demo's base has four blocks


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("bf16", ["false", "true"])
def test_the_dtype_is_the_setting_s_on_any_cpu(bf16, native, tmp_path, monkeypatch):
    """Unsloth's detection of bfloat16, forced on and off: what the settings say is what is used.

    Where Unsloth turns bf16 off, for want of the instructions, the run says so.
    """
    monkeypatch.setenv("UNSLOTH_CPU_BF16", native)
    words = [*DEMO, "--limit", "4", "--max_steps", "1", "--held_out", "0", "--sample_texts", "[]"]
    code, printed, errors = script("finetune.py", *words, "--bf16", bf16, "--output_dir", tmp_path)
    assert code == 0, errors
    used = "bfloat16" if (bf16, native) == ("true", "1") else "float32"
    assert f"model    data/demo/base, {used}; " in printed
    overruled = "changed bf16: True → False" in printed
    assert overruled == (bf16 == "true" and used == "float32")


def test_stop_and_resume(tmp_path):
    out = tmp_path / "out"
    words = ["finetune.py", *DEMO, "--output_dir", out, "--overwrite", "false", "--limit", "8"]
    words = [*map(str, words), "--max_seconds", "0.5", "--max_steps"]
    process = subprocess.Popen(
        [sys.executable, *words, "2000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 130
    step = int(re.search(r"stopped at step (\d+)", rest)[1])
    assert "--resume" in rest and (out / f"checkpoint-{step}").is_dir()
    assert not (out / "adapter_config.json").exists()

    code, _, errors = script(*words, str(step + 2))
    assert code == 2 and "--resume` continues it" in errors
    torn = out / "checkpoint-9999"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    code, printed, errors = script(*words, str(step + 2), "--resume", "--overwrite")
    assert code == 0, errors
    assert "checkpoint-9999 is incomplete or damaged" in printed
    state = json.loads((out / f"checkpoint-{step + 2}/trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert state["log_history"][-1]["step"] == step + 2 and len(losses) >= 2  # of both processes
    assert f"steps    {step + 2}, loss {losses[0]:.3f} → {losses[-1]:.3f}\n" in printed


def test_mistakes_before_any_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "llama").mkdir()
    cases = [
        (["--config", tmp_path / "none.json"], "cannot be read"),
        (["--config", tmp_path / "config.json"], "not JSON"),
        ([*DEMO, "--dataset", tmp_path / "none"], "no such folder; give one of clips"),
        ([*DEMO, "--output_dir", tmp_path / "file" / "out"], "cannot be written"),
        ([*DEMO, "--model", tmp_path / "llama"], "config.json: cannot be read"),
        ([*DEMO, "--model", "data/demo/bas"], "no such folder"),
        ([*DEMO, "--model", "some/model"], "the hub cannot be reached"),
        ([*DEMO, "--sample_texts", '["one", " "]'], "nothing to speak"),
        ([*DEMO, "--eval_strategy", "steps"], "eval_strategy cannot be set, leave it out"),
        ([*DEMO, "--dataset", "data/demo"], "no column is known|no metadata.csv"),
        ([*DEMO, "--output_dir", "data/demo/base", "--overwrite"], "holds config.json, and no run"),
        ([*DEMO, "--codec", tmp_path / "none"], "no such folder"),
        ([*DEMO, "--max_length", "999999"], "over the .* tokens"),
        ([*DEMO, "--max_length", "30"], "no rows left of 96 clips"),
        ([*DEMO, "learning_rate", "1"], "'learning_rate'; write --key value"),
        ([*DEMO, "--output_dir"], "--output_dir: expected one argument"),
    ]
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for words, line in cases:
        words = [*PLAIN, *words]
        if "--output_dir" not in words:
            words = [*words, "--output_dir", tmp_path / "out"]
        assert re.search(line, one_line(finetune.main, monkeypatch, *words)), words


@pytest.mark.parametrize("text", ["seven " * 3000, "x" * 100_000])
def test_sample_texts_that_do_not_fit_are_refused_before_loading(text, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("a model was loaded"))
    words = ["--backend", "transformers", "--limit", "4", "--cache_dir", "null"]
    words += ["--sample_texts", json.dumps([text]), "--max_seconds", "3600"]
    words += ["--output_dir", tmp_path]
    assert "no room for a frame" in one_line(finetune.main, monkeypatch, *DEMO, *words)


@pytest.mark.parametrize("steps", ["3", "2"])
def test_a_run_that_was_at_its_end_is_only_saved(steps, run_copy, monkeypatch, capsys):
    """As after a kill between the last checkpoint and the adapter."""
    weights = (run_copy / "adapter_model.safetensors").read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run_copy / name).unlink()
    keys = KEYS | {"sample_texts": '["two"]', "max_seconds": "0.3", "report_to": "tensorboard"}
    run_here(monkeypatch, run_copy, resume="true", **keys | {"max_steps": steps})
    assert "nothing left to train" in capsys.readouterr().out
    assert (run_copy / "adapter_model.safetensors").read_bytes() == weights


def test_a_full_disk_while_the_adapter_is_saved(tmp_path, monkeypatch):
    def full(path, *_, **__):
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(finetune.os, "replace", full)

    class Trainer:
        is_fsdp_enabled, model = False, None

    class Saver:
        def save_pretrained(self, path, **_):
            Path(path).mkdir(exist_ok=True)
            (Path(path) / "adapter_config.json").write_text("{}")

    Trainer.model = Saver()
    with (
        pytest.raises(UserError, match="disk is full"),
        reporting_full_disk(tmp_path, lambda: "the adapter"),
    ):
        finetune.save_model(Trainer, Saver(), tmp_path)
    assert not is_adapter(tmp_path)
