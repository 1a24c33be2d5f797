"""What only a GPU can prove: pytest -m gpu. The same proofs run here on the CPU where they can."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import DEMO, PROGRAM_PATH, ROOT

GPU = pytest.mark.skipif(
    subprocess.run("nvidia-smi >/dev/null 2>&1", shell=True).returncode != 0,
    reason="needs an NVIDIA GPU",
)


def start(*words, **keys):
    """Starts a script of the project, with the GPU in sight."""
    env = os.environ | {"PYTHONPATH": PROGRAM_PATH, "PYTHONUNBUFFERED": "1"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, **keys)


def run(*words):
    """What a script prints."""
    with start(*words, stderr=subprocess.PIPE) as process:
        printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


def packed_loss(backend, weights, tmp_path):
    overrides = {"backend": backend, "weights": weights, "batching": "pack", "max_length": "1024"}
    overrides |= {"per_device_train_batch_size": "1", "output_dir": str(tmp_path / "out")}
    printed = run("tests/programs/packed_loss.py", json.dumps(overrides))
    return json.loads(printed.strip().splitlines()[-1])


def test_the_proof_itself(tmp_path):
    packed, alone, mixed = packed_loss("transformers", "16bit", tmp_path)
    assert packed == pytest.approx(alone, rel=1e-5)
    assert mixed != pytest.approx(alone, rel=1e-5)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["4bit", "16bit"])
def test_unsloth_packs_without_contamination(weights, tmp_path):
    packed, alone, mixed = packed_loss("unsloth", weights, tmp_path)
    assert packed == pytest.approx(alone, rel=2e-3)  # kernels of bf16
    assert abs(mixed - alone) > 3 * abs(packed - alone)


REMEDIES = {
    "4bit": ["--weights", "4bit", "--gradient_checkpointing", "unsloth"],
    "8bit": ["--weights", "8bit", "--gradient_checkpointing", "true"],
    "fp16": ["--weights", "4bit", "--bf16", "false", "--fp16", "true"],
    "paged": ["--weights", "4bit", "--optim", "paged_adamw_8bit"],
    "plain": ["--weights", "4bit", "--backend", "transformers", "--gradient_checkpointing", "true"],
    "full": ["--weights", "16bit", "--full_finetuning", "true", "--optim", "adamw_8bit"],
    "rows": ["--weights", "4bit", "--auto_find_batch_size", "true"],
}


def training(out, *options):
    """The words of a short packed run of finetune.py."""
    words = [*DEMO, "--batching", "pack", "--logging_steps", "1", "--bf16", "true"]
    return [*words, "--cache_dir", "null", "--output_dir", out, *options]


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_trains_and_speaks_on_the_gpu(name, tmp_path):
    out = tmp_path / "out"
    printed = run("finetune.py", *training(out, "--max_steps", "20", *REMEDIES[name]))
    first, last = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", printed).groups())
    assert last < first
    run("infer.py", "one two", "--model", out, "--out", tmp_path / "one.wav")
    if name in ("4bit", "fp16"):
        run("-m", "orpheus.merge", out, tmp_path / "merged")  # exits with 1 if it speaks otherwise


@GPU
@pytest.mark.gpu
def test_a_killed_run_goes_on_where_it_was_on_the_gpu(tmp_path):
    def losses(printed):
        return [float(loss) for loss in re.findall(r"step +\d+/8 +loss ([\d.]+)", printed)]

    options = ["--max_steps", "8", "--save_steps", "2", "--sample_texts", "[]"]
    undisturbed = losses(run("finetune.py", *training(tmp_path / "undisturbed", *options)))
    with start("finetune.py", *training(tmp_path / "killed", *options)) as process:
        next(line for line in process.stdout if re.match("step +5/8", line))
        process.kill()
    resumed = losses(run("finetune.py", *training(tmp_path / "killed", *options), "--resume"))
    assert 3 <= len(resumed) < len(undisturbed) == 8
    assert resumed == pytest.approx(undisturbed[-len(resumed) :], rel=5e-3)  # sums of bf16


@GPU
@pytest.mark.gpu
def test_the_adapter_gives_the_same_logits_in_plain_transformers_after_the_gpu(tmp_path):
    options = ["--max_steps", "20", "--weights", "16bit"]
    run("tests/programs/train_and_keep_logits.py", *training(tmp_path / "out", *options))
    printed = run("tests/programs/reload_adapter.py", tmp_path / "out")
    difference, without = map(float, printed.split())
    assert difference < 0.1 * without  # bf16 against fp32


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("words", [("unsloth", "0.8", ""), ("plain", "0.8", "static")])
def test_unsloths_model_and_a_static_cache_speak_the_same_codes(words):
    plain, other = (
        json.loads(run("tests/programs/speak.py", *way).splitlines()[-1])
        for way in (("plain", "0.8", ""), words)
    )
    assert sum(len(codes) for _, codes in plain) > 30
    assert other == plain
