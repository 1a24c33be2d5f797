"""What only a GPU can prove: pytest -m gpu. The same proofs run here on the CPU where they can."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT

GPU = pytest.mark.skipif(
    subprocess.run("nvidia-smi >/dev/null 2>&1", shell=True).returncode != 0,
    reason="needs an NVIDIA GPU",
)


def run(*words):
    """A script of the project, with the GPU in sight."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env["PYTHONPATH"] = str(ROOT)  # for tests/programs
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
    "fit": ["--weights", "4bit", "--fit", "true"],
}


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_trains_and_speaks_on_the_gpu(name, tmp_path):
    words = [*DEMO, "--batching", "pack", "--max_steps", "20", "--logging_steps", "1"]
    words += ["--bf16", "true", *REMEDIES[name], "--output_dir", tmp_path, "--cache_dir", "null"]
    printed = run("finetune.py", *words)
    first, last = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", printed).groups())
    assert last < first
    run("infer.py", "one two", "--model", tmp_path, "--out", tmp_path / "one.wav")
    shutil.rmtree(tmp_path)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("words", [("0", "fp32"), ("0.8", "fp32"), ("0", "4bit")])
def test_a_cuda_graph_speaks_the_same_codes(words):
    program = "tests/programs/speak_with_cuda_graph.py"
    plain, graph = (
        json.loads(run(program, way, *words).splitlines()[-1]) for way in ("false", "true")
    )
    assert sum(len(codes) for _, codes in plain) > 30
    assert graph == plain
