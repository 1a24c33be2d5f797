"""finetune.py: settings, batches, a whole run, stopping and resuming, and a person's mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import typing

import numpy as np
import pytest
import soundfile
import torch
from conftest import DEMO, ROOT, one_line, script

import finetune
import infer

# ---------------------------------------------------------------- settings


def test_every_key_is_read_and_stands_in_the_readme():
    """config.json's keys are SFTConfig's, or ours and read in the code; the table has them all."""
    from trl import SFTConfig

    config = json.loads((ROOT / "config.json").read_text())
    source = "".join((ROOT / f).read_text() for f in ("infer.py", "finetune.py", "data/prepare.py"))
    hints = typing.get_type_hints(SFTConfig)
    for name in config:
        assert name in hints or re.search(rf"settings\.{name}\b", source), name
    assert set(infer.OWN_KEYS) <= set(config)
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(table) == sorted(config)


def arguments_of(**overrides):
    return infer.read_settings("data/demo/config.json", overrides)


def test_every_sftconfig_key_is_reachable(tmp_path):
    settings = arguments_of(output_dir=str(tmp_path), adam_beta2="0.95", neftune_noise_alpha="5")
    arguments = finetune.trainer_arguments(settings)
    assert (arguments.adam_beta2, arguments.neftune_noise_alpha) == (0.95, 5.0)
    assert settings.flat()["adam_beta2"] == 0.95


def test_unknown_and_wrong_trainer_keys():
    for overrides, line in [
        ({"learning_rat": "1"}, "no key is named 'learning_rat'; the nearest is 'learning_rate'"),
        ({"datset": "x"}, "no key is named 'datset'; the nearest is 'dataset'"),
        ({"learning_rate": "fast"}, 'learning_rate is "fast": .* valid number'),
        ({"lr_scheduler_type": "bend"}, "settings: bend is not a valid SchedulerType"),
    ]:
        with pytest.raises(infer.Mistake, match=line):
            finetune.trainer_arguments(arguments_of(**overrides))


def test_the_top_level_config_without_a_gpu(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = one_line(finetune.main, monkeypatch, "--output_dir", tmp_path / "out")
    assert "no GPU" in line and "days" in line and "make demo" in line


# ---------------------------------------------------------------- batches


def test_rows_of_1054_and_337_tokens_train_in_one_batch(tmp_path, tokenizer, ids):
    """The pair of the classic crash: input_ids, attention_mask and labels are padded alike."""
    import unsloth  # noqa: F401

    draw = np.random.default_rng(0)
    rows = [draw.integers(ids.audio, ids.audio + 7 * ids.codebook_size, n) for n in (1054, 337)]
    rows = [{"input_ids": row, "labels": row.copy()} for row in rows]
    overrides = dict(per_device_train_batch_size="2", max_steps="1", max_length="1100")
    settings = arguments_of(output_dir=str(tmp_path / "out"), **overrides)
    arguments = finetune.trainer_arguments(settings)
    model = finetune.load_model(settings)
    trainer = finetune.make_trainer(model, tokenizer, rows, arguments, {})
    batch = next(iter(trainer.get_train_dataloader()))
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 1054)
    )
    short = int(batch["attention_mask"].sum(1).argmin())
    assert batch["attention_mask"].sum(1).tolist()[short] == 337
    assert (batch["labels"][short, 337:] == -100).all()
    assert (batch["input_ids"][short, 337:] == ids.pad).all()
    assert (batch["labels"][short, :337] == batch["input_ids"][short, :337]).all()
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_adapter_config_report_and_samples(finished):
    out, printed = finished
    config = json.loads((out / infer.SAVED_CONFIG).read_text())
    assert config["model"] == str(ROOT / "data/demo/base") and config["max_steps"] == 4
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        ROOT / "data/demo/base"
    )
    assert json.loads((out / infer.SAVED_REPORT).read_text())["voices"] == {"slt": 16}
    assert (out / "adapter_model.safetensors").is_file()
    assert not list(out.glob(".*"))
    wavs = sorted((out / "samples").glob("*.wav"))
    assert len(wavs) == len(config["sample_texts"])
    assert all(soundfile.info(wav).frames % 2048 == 0 for wav in wavs)
    for word in ("padded to its longest row", "minutes", "tokens/s", "at its peak", str(out)):
        assert word in printed


RELOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
out = Path(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained("data/demo/base", dtype=torch.float32)
model = PeftModel.from_pretrained(base, out).eval()
seen = torch.load(out / "logits.pt")
logits = model(input_ids=torch.arange(300)[None]).logits
with model.disable_adapter():
    bare = model(input_ids=torch.arange(300)[None]).logits
assert "unsloth" not in sys.modules
print(float((logits - seen).abs().max()), float((bare - seen).abs().max()))
"""


def test_the_adapter_gives_the_same_logits_in_plain_transformers(finished):
    code, printed, errors = script("-c", RELOAD, finished[0])
    assert code == 0, errors
    difference, without = map(float, printed.split())
    assert difference < 1e-4 < without


def test_a_checkpoint_speaks_from_any_folder(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["infer.py", "two", "--model", str(out / "checkpoint-2")])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--max_seconds", "0.5"])
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
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 130
    step = int(re.search(r"stopped at step (\d+)", rest)[1])
    assert "--resume" in rest and (out / f"checkpoint-{step}").is_dir()
    assert not (out / "adapter_config.json").exists()

    code, _, errors = script(*words, str(step + 2))
    assert code == 2 and "--resume goes on" in errors
    torn = out / "checkpoint-9999"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    code, printed, errors = script(*words, str(step + 2), "--resume", "--overwrite")
    assert code == 0, errors
    assert "checkpoint-9999 was not written to its end" in printed
    assert f"steps    {step + 2}," in printed


def test_mistakes_before_any_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "llama").mkdir()
    cases = [
        (["--config", tmp_path / "none.json"], "cannot be read"),
        (["--config", tmp_path / "config.json"], "not JSON"),
        ([*DEMO, "--dataset", tmp_path / "none"], "no such folder of clips"),
        ([*DEMO, "--output_dir", tmp_path / "file" / "out"], "cannot be written"),
        ([*DEMO, "--model", tmp_path / "llama"], "no model that loads"),
        ([*DEMO, "--codec", tmp_path / "none"], "no such folder"),
        ([*DEMO, "--max_length", "999999"], "over the .* tokens"),
        ([*DEMO, "--max_length", "30"], "no rows left of 96 clips"),
        ([*DEMO, "learning_rate", "1"], "write keys as --key value"),
        ([*DEMO, "--output_dir"], "write keys as --key value"),
    ]
    monkeypatch.setattr(finetune, "load_model", lambda _: pytest.fail("a model was loaded"))
    for words, line in cases:
        if "--output_dir" not in words:
            words = [*words, "--output_dir", tmp_path / "out"]
        assert re.search(line, one_line(finetune.main, monkeypatch, *words)), words


def test_no_space_in_output_dir(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    line = one_line(finetune.main, monkeypatch, *DEMO, "--output_dir", tmp_path / "out")
    assert "No space left on device" in line
