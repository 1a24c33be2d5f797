"""finetune.py: settings, batches, a whole run, stopping and resuming, and a person's mistakes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import DEMO, ROOT, one_line, program, script

import finetune
import infer
import orpheus.checks
from data import prepare
from orpheus.audio import Sound
from orpheus.batching import split_rows
from orpheus.callbacks import loss_warnings
from orpheus.checks import SampleEvaluator, held_out_metrics, speech_metrics
from orpheus.clips import read_clips
from orpheus.compatibility import check_compatibility, resolve_settings
from orpheus.doctor import Measures, Report
from orpheus.hub import is_adapter
from orpheus.models import load_model, load_tokenizer
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import Settings, UserError, read_settings

# In this process without unsloth, which would patch TRL for all tests that follow.
PLAIN = ["--backend", "transformers", "--gradient_checkpointing", "false"]

# ---------------------------------------------------------------- settings


def test_every_key_is_read():
    """config.json's keys are SFTConfig's, or ours and read in the code."""
    from trl import SFTConfig

    config = json.loads((ROOT / "config.json").read_text())
    files = [ROOT / "infer.py", ROOT / "finetune.py", *ROOT.glob("orpheus/*.py")]
    source = "".join(file.read_text() for file in files)
    hints = typing.get_type_hints(SFTConfig)
    for name in config:
        assert name in hints or re.search(rf"settings\.{name}\b", source), name
    assert set(Settings.model_fields) == set(config)


def settings_of(**overrides):
    return read_settings("data/demo/config.json", overrides)


def test_every_sftconfig_key_is_reachable(tmp_path):
    settings = settings_of(output_dir=str(tmp_path), adam_beta2="0.95", neftune_noise_alpha="5")
    arguments = finetune.make_sft_config(resolve_settings(settings))
    assert (arguments.adam_beta2, arguments.neftune_noise_alpha) == (0.95, 5.0)
    assert settings.flat()["adam_beta2"] == 0.95


def test_unknown_and_wrong_trainer_keys():
    for overrides, line in [
        ({"learning_rat": "1"}, "no key is named 'learning_rat'; the nearest is 'learning_rate'"),
        ({"datset": "x"}, "no key is named 'datset'; the nearest is 'dataset'"),
        ({"learning_rate": "fast"}, 'learning_rate is "fast": .* valid number'),
        ({"lr_scheduler_type": "bend"}, "settings: bend is not a valid SchedulerType"),
    ]:
        with pytest.raises(UserError, match=line):
            finetune.make_sft_config(resolve_settings(settings_of(**overrides)))


def test_the_top_level_config_without_a_gpu(tmp_path):
    code, _, errors = script("finetune.py", "--output_dir", tmp_path / "out")
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


def run_here(monkeypatch, out, **overrides):
    """finetune.main in this process, on the transformers backend and eight of the clips."""
    overrides = {
        "output_dir": out, "backend": "transformers", "gradient_checkpointing": "false",
        "limit": "8", "max_steps": "3", "held_out": "0", "logging_steps": "1", "sample_texts": "[]",
        "per_device_train_batch_size": "2", "lr_scheduler_type": "constant", **overrides,
    }  # fmt: skip
    words = [str(word) for name, value in overrides.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *DEMO, *words])
    finetune.main()
    assert "unsloth" not in sys.modules


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


def test_what_a_machine_cannot_do_is_refused_by_name(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine can")
    cases = [
        (["--weights", "fp8"], 'weights "fp8" need a GPU'),
        (["--weights", "4bit", "--full_finetuning"], 'full_finetuning needs weights "16bit"'),
        (["--gradient_checkpointing", "unsloth"], "set it to true"),
        (["--optim", "paged_adamw_8bit"], "optim paged_adamw_8bit needs a GPU"),
        (["--fp16", "true"], "fp16 needs a GPU"),
        (["--packing", "true"], "packing is set by finetune.py itself"),
    ]
    for words, line in cases:
        words = [*DEMO, *PLAIN, "--output_dir", tmp_path / "out", *words]
        assert line in one_line(finetune.main, monkeypatch, *words)
    settings = resolve_settings(settings_of(weights="8bit"))
    with pytest.raises(UserError, match='or backend "transformers"'):
        check_compatibility(settings, finetune.make_sft_config(settings))


# ---------------------------------------------------------------- nothing lost


def same_file(a, b):
    return a.read_bytes() == b.read_bytes()


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


def test_a_changed_run_is_not_resumed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_here(monkeypatch, out, save_steps="2")
    (out / "adapter_config.json").unlink()  # as if the end had not been reached
    with pytest.raises(UserError, match=r"lora_r was \d+ and is 4; .* --overwrite") as told:
        run_here(monkeypatch, out, resume="true", lora_r="4", limit="7", max_steps="4")
    assert "limit was 8 and is 7" in str(told.value) and "data has changed" in str(told.value)
    assert "max_steps" not in str(told.value)


# ---------------------------------------------------------------- watching and hearing


def test_listening_changes_nothing(tmp_path, monkeypatch):
    """Checks at every step, with dropout drawing from the same generator: the same adapter."""
    keys = {"lora_dropout": "0.1", "sample_texts": '["two"]', "max_seconds": "0.3"}
    run_here(monkeypatch, tmp_path / "often", sample_steps="1", **keys)
    run_here(monkeypatch, tmp_path / "once", sample_steps="3", **keys)
    name = "adapter_model.safetensors"
    assert same_file(tmp_path / "often" / name, tmp_path / "once" / name)
    folders = sorted(p.name for p in (tmp_path / "often/samples").iterdir())
    assert folders == ["step-000001", "step-000002", "step-000003"]


def test_a_check_leaves_4_bit_weights_as_they_are_on_any_cpu(tmp_path, monkeypatch):
    """bitsandbytes repacks them in eval mode where it finds avx512_bf16, and training stops."""
    import bitsandbytes

    keys = {"weights": "4bit", "held_out": "0.3", "sample_steps": "1"}
    for found in (False, True):
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda found=found: found)
        run_here(monkeypatch, tmp_path / str(found), **keys)
    name = "adapter_model.safetensors"
    assert same_file(tmp_path / "True" / name, tmp_path / "False" / name)


def test_checks_are_logged_and_the_best_is_told(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = {"sample_texts": '["two", "six"]', "max_seconds": "0.3", "held_out": "0.3"}
    keys |= {"report_to": "tensorboard", "sample_steps": "1", "save_steps": "1"}
    run_here(monkeypatch, tmp_path, **keys, save_total_limit="2")
    with open(tmp_path / "checks.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {"eval_loss_slot3", "eval_pace", "eval_ended"} <= set(rows[0])
    best = max(rows, key=lambda row: float(row["eval_score"]))["step"]
    assert f"best     step {best} of 3 checks" in capsys.readouterr().out
    assert (tmp_path / f"checkpoint-{best}").is_dir()
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent), {"audio": 0}).Reload()
    assert sorted(events.Tags()["audio"]) == ["sample/01", "sample/02"]
    assert len(events.Audio("sample/01")) == 3
    told = {"loss", "audio_hours", "useful_share", "peak_gib", "num_input_tokens_seen"}
    told = {f"train/{name}" for name in told | {"train_tokens_per_second"}}
    assert told | {"eval/loss_slot6"} <= set(events.Tags()["scalars"])
    share = [event.value for event in events.Scalars("train/useful_share")]
    assert all(0.5 < value <= 1 for value in share), share


def test_judges_choose_the_best_check_and_the_lowest_loss_does_not(tmp_path, monkeypatch, capsys):
    """The judge hears more word errors, and another likeness, at every check; the loss falls."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard, recordings = [], []

    def judge(audio, text):
        heard.append((len(audio), text))
        return {"wer": (len(heard) - 1) // 2 / 4, "likeness": 0.5} if text == "two" else {}

    def judges(whisper, sounds):
        recordings.append((whisper, sounds))
        return [judge]

    monkeypatch.setattr(orpheus.checks, "load_judges", judges)
    keys = {"sample_texts": '["two", "six"]', "max_seconds": "0.3", "held_out": "0.3"}
    keys |= {"report_to": "tensorboard", "sample_steps": "1", "save_steps": "1"}
    run_here(
        monkeypatch, tmp_path, **keys, save_total_limit="2", max_steps="4", judge_samples="a.en"
    )
    ((whisper, sounds),) = recordings
    assert whisper == "a.en" and all(len(sound) % 2048 == 0 for sound in sounds) and sounds
    assert [text for _, text in heard] == ["two", "six"] * 4
    with open(tmp_path / "checks.csv") as file:
        rows = [{n: float(value) for n, value in row.items()} for row in csv.DictReader(file)]
    assert [row["eval_wer"] for row in rows] == [0, 0.25, 0.5, 0.75]
    assert min(rows, key=lambda row: row["eval_loss"])["step"] != 1
    printed = capsys.readouterr().out
    assert "best     step 1 of 4 checks" in printed and "wer 0.75   likeness 0.50" in printed
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert [e.value for e in events.Scalars("eval/wer")] == [0, 0.25, 0.5, 0.75]


def test_scores_weigh_what_ended_then_words_then_likeness_then_pace_then_loss():
    report = Report("x", measures=[Measures("a", "", "x" * 24_000, Sound(seconds=1.0))])

    def score(ended=1, pace=1.0, loss=1.0, **scores):
        samples = [(np.zeros(round(pace * 24_000)), n < ended) for n in range(2)]
        scores = {"wer": 0.1, "likeness": 0.7} | scores
        texts = ["x" * 24_000, "x" * 24_000]
        return speech_metrics(texts, samples, report, loss, scores)["eval_score"]

    best_first = [
        score(ended=2, wer=0.9, likeness=0.2, pace=2.0, loss=9.0),
        score(wer=0.0, likeness=0.2, pace=2.0, loss=9.0),
        score(likeness=0.9, pace=2.0, loss=9.0),
        score(pace=1.1, loss=1.5),
        score(pace=1.3, loss=1.4),
        score(pace=1.3, loss=1.5),
    ]
    assert best_first == sorted(best_first, reverse=True) and len(set(best_first)) == 6


def test_held_out_metrics_equal_a_plain_account(tokenizer, ids):
    """Against one log-softmax over all positions and a loop in Python."""
    rows, *_ = prepare_rows(limit="3", train_on="all")
    model, _ = load_model("data/demo/base")
    metrics = held_out_metrics(model, rows, ids)
    seen = {}
    for row in rows:
        inputs = torch.from_numpy(row["input_ids"])
        scores = model(input_ids=inputs[None]).logits[0].log_softmax(-1)
        for at in range(len(inputs) - 1):
            wanted = int(inputs[at + 1])
            slot = (wanted - ids.audio) // ids.codebook_size
            name = f"slot{slot}" if slot >= 0 else "end" if wanted in (ids.eos, ids.eoa) else "text"
            hit = float(scores[at].argmax() == wanted)
            seen.setdefault(name, []).append((-float(scores[at, wanted]), hit))
    assert set(seen) == {*(f"slot{n}" for n in range(7)), "end", "text"}
    for name, pairs in seen.items():
        loss, hits = np.mean(pairs, axis=0)
        assert np.isclose(metrics[f"eval_loss_{name}"], loss, rtol=1e-4), name
        assert np.isclose(metrics[f"eval_accuracy_{name}"], hits), name
    everything = [loss for pairs in seen.values() for loss, _ in pairs]
    assert np.isclose(metrics["eval_loss"], np.mean(everything), rtol=1e-4)


def prepare_rows(**overrides):
    settings = settings_of(**overrides)
    tokenizer = load_tokenizer(ROOT / settings.model)
    return prepare.make_rows(read_clips(settings), settings, tokenizer)


def test_no_text_stands_on_both_sides():
    rows = [{"text": f"text {n % 40}", "n": n} for n in range(100)]
    settings = settings_of(held_out="0.25")
    train, held = split_rows(rows, settings)
    assert len(train) + len(held) == 100
    assert len({row["text"] for row in held}) == 10
    assert not {row["text"] for row in held} & {row["text"] for row in train}
    assert split_rows(rows, settings) == (train, held)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    load = finetune.load_model

    def spoilt(settings, arguments):
        model = load(settings, arguments)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(finetune, "load_model", spoilt)
    with pytest.raises(UserError, match=r"loss is nan at step 1; .* in the batch: slt:"):
        run_here(monkeypatch, tmp_path)


def test_a_loss_that_rises_is_a_warning(tmp_path, monkeypatch, capsys):
    from trl import SFTTrainer

    step = SFTTrainer.training_step

    def spoil(self, model, *words, **more):
        if self.state.global_step == 2:
            for name, weight in model.named_parameters():
                if name.endswith("model.norm.weight"):
                    weight.data.mul_(20)
        return step(self, model, *words, **more)

    monkeypatch.setattr(SFTTrainer, "training_step", spoil)
    run_here(monkeypatch, tmp_path, max_steps="4")
    printed = capsys.readouterr().out
    assert re.findall(r"warning  step 3: loss rose from [\d.]+ to .* learning_rate", printed)
    assert printed.count("warning") == 1
    assert is_adapter(tmp_path)


def state_of(*losses, every=10):
    history = [{"loss": loss, "step": every * n} for n, loss in enumerate(losses, 1)]
    return SimpleNamespace(log_history=history, global_step=every * len(losses))


def warnings_of(*losses, **logs):
    state = state_of(*losses)
    return loss_warnings({"loss": losses[-1], **logs}, state, 156_940)


def test_signs_of_wrong_tokens_are_named_and_only_those():
    (message,) = warnings_of(11.9, *[11.5] * 6)
    assert message.startswith("loss 11.5 is no better than guessing (12.0) and has not fallen")
    assert warnings_of(11.9, 11.5, 11.4) == []  # too early to tell
    assert warnings_of(12.9, 12.4, 12.0, 11.7, 11.4, 11.2) == []  # it falls
    assert warnings_of(*[4.5] * 7) == []
    assert len(warnings_of(2.0, 1.5, 3.9)) == 1  # it rose by over 2 nats
    assert warnings_of(2.0, 1.5, 3.9, 4.0) == []  # said once
    slots = {f"eval_loss_slot{n}": 4.0 + 0.1 * n for n in range(7)}
    assert warnings_of(4.5, **slots) == []
    (message,) = warnings_of(4.5, **(slots | {"eval_loss_slot3": 8.2}))
    assert message.startswith("slot 3's loss 8.2 is far above the others' 4.4")


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
    assert re.fullmatch(pattern + rf"{number} h heard   {number} GiB   0 s left", step), step
    samples = re.escape(f"samples: {out}/samples/step-000004/")
    pattern = rf"check    step 4   held-out {number}   slots 0–6:( {number}){{7}}   "
    assert re.fullmatch(pattern + rf"ended \d/2   pace {number}   {samples}", check), check


def test_the_time_of_checks_is_told_apart(tmp_path, monkeypatch, capsys):
    """The speed is that of training alone, however long a check takes."""
    evaluate = SampleEvaluator.__call__
    slow = lambda *words: time.sleep(3) or evaluate(*words)  # noqa: E731
    monkeypatch.setattr(SampleEvaluator, "__call__", slow)
    run_here(monkeypatch, tmp_path, sample_steps="1", save_steps="3", sample_texts='["two"]')
    printed = capsys.readouterr().out
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    tokens = state["num_input_tokens_seen"]
    speed = float(re.search(r"speed    ([\d,]+) tokens/s", printed)[1].replace(",", ""))
    training, checks = map(float, re.search(r"training (.*), checks (.*),", printed).groups())
    assert checks >= 0.1 and speed > tokens / 9  # three checks took nine seconds at least
    assert "3/3   loss" in printed and training < checks


@pytest.mark.parametrize("largest", [100_000, 8_000_000])  # bytes: fails in adapter, in optimiser
def test_a_full_disk_leaves_the_last_checkpoint(largest, tmp_path, monkeypatch):
    """The system itself refuses to write on, in the second checkpoint; then --resume goes on."""
    import resource

    from trl import SFTTrainer

    save, (soft, hard) = SFTTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_and_fill(self, *words):
        try:
            save(self, *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))

    keys = {"save_steps": "1", "save_total_limit": "1", "report_to": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "_save_checkpoint", save_and_fill)
        with pytest.raises(UserError) as caught:
            run_here(patch, tmp_path, **keys)
    told = f"{tmp_path} cannot be written, its disk is full: free some of it, then --resume; "
    assert str(caught.value) == f"step 2: {told}last checkpoint: {tmp_path}/checkpoint-1"
    run_here(monkeypatch, tmp_path, **keys, resume="true")
    assert is_adapter(tmp_path)


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


def test_a_checkpoint_speaks_from_any_folder(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.chdir(tmp_path)
    words = ["two", "--model", str(out / "checkpoint-2"), "--max_seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *words])
    infer.main()
    assert soundfile.info(tmp_path / "out.wav").frames >= 2048


def test_a_finished_run_is_kept(finished, monkeypatch, capsys):
    out, _ = finished
    words = [*DEMO, "--output_dir", out, "--overwrite", "false"]
    assert "finished run: --overwrite" in one_line(finetune.main, monkeypatch, *words)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words), "--resume"])
    with pytest.raises(SystemExit) as done:
        finetune.main()
    assert done.value.code == 0 and "nothing to resume" in capsys.readouterr().out


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
    assert code == 2 and "--resume continues it" in errors
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
        ([*DEMO, "--model", "some/model"], "no GPU found"),
        ([*DEMO, "--sample_texts", '["one", " "]'], "the text is empty"),
        ([*DEMO, "--eval_strategy", "steps"], "eval_strategy is set by finetune.py itself"),
        ([*DEMO, "--dataset", "data/demo"], "no metadata.csv"),
        ([*DEMO, "--output_dir", "data/demo/base", "--overwrite"], "is the model"),
        ([*DEMO, "--codec", tmp_path / "none"], "no such folder"),
        ([*DEMO, "--max_length", "999999"], "over the .* tokens"),
        ([*DEMO, "--max_length", "30"], "no rows left of 96 clips"),
        ([*DEMO, "learning_rate", "1"], "write keys as --key value"),
        ([*DEMO, "--output_dir"], "write keys as --key value"),
    ]
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for words, line in cases:
        words = [*PLAIN, *words]
        if "--output_dir" not in words:
            words = [*words, "--output_dir", tmp_path / "out"]
        assert re.search(line, one_line(finetune.main, monkeypatch, *words)), words


def test_no_space_in_output_dir(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    line = one_line(finetune.main, monkeypatch, *DEMO, "--output_dir", tmp_path / "out")
    assert "No space left on device" in line
