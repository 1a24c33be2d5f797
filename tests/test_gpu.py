"""What only a GPU can prove: pytest -m gpu. The same proofs run here on the CPU where they can."""

import json
import os
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
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# The loss as the trainer's own step has it, over packed rows and over each row alone.
PACKED = """
import json, sys
overrides = json.loads(sys.argv[1])
if overrides["backend"] == "unsloth":
    import unsloth
import numpy as np, torch
from pathlib import Path
import finetune, infer
from data import prepare
settings = infer.read_settings("data/demo/config.json", overrides)
arguments, _ = finetune.trainer_arguments(settings)
tokenizer = infer.load_tokenizer(Path(settings.model))
ids = infer.read_speech_ids(tokenizer, infer.load_codec(settings.codec).codebook_size)
draw = np.random.default_rng(5)
codes = [draw.integers(0, ids.codebook_size, (n, 7)) for n in draw.integers(3, 32, 24)]
rows = [prepare.make_row([ids.soh, ids.bos, 65, ids.sos], c, ids, settings) for c in codes]
model = finetune.load_model(settings, arguments)
trainer = finetune.make_trainer(model, tokenizer, rows, arguments, settings, {}, None)
assert trainer.args.packing
def loss_of(batch):
    count = (batch["labels"][:, 1:] != -100).sum()
    batch = {name: value.to(model.device) for name, value in batch.items()}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    return float(loss) * int(count)
packed = list(trainer.get_train_dataloader())
assert len(packed) < len(rows) / 3
def alone(row):
    row = {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "labels")}
    return row | {"position_ids": torch.arange(row["input_ids"].shape[1])[None]}
told = [sum(map(loss_of, (dict(b) for b in packed))), sum(loss_of(alone(row)) for row in rows)]
mixed = [b | {"position_ids": torch.arange(b["input_ids"].shape[1])[None]} for b in packed]
print(json.dumps([*told, sum(map(loss_of, mixed))]))
"""


def packed_loss(backend, weights, tmp_path):
    overrides = {"backend": backend, "weights": weights, "batching": "pack", "max_length": "1024"}
    overrides |= {"per_device_train_batch_size": "1", "output_dir": str(tmp_path / "out")}
    return json.loads(run("-c", PACKED, json.dumps(overrides)).strip().splitlines()[-1])


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
    first, last = printed.split("loss ")[-1].split("\n")[0].split(" → ")
    assert float(last) < float(first)
    run("infer.py", "one two", "--model", tmp_path, "--out", tmp_path / "one.wav")
    shutil.rmtree(tmp_path)


GRAPH = """
import json, sys
import infer
graph, temperature, weights = sys.argv[1:]
overrides = {"cuda_graph": graph, "temperature": temperature}
settings = infer.read_settings("data/demo/config.json", overrides)
model, tokenizer = infer.load_model("data/demo/base", weights == "4bit")
if weights == "4bit":
    from peft import LoraConfig, get_peft_model
    lora = LoraConfig(r=8, target_modules="all-linear")
    model = get_peft_model(model, lora).eval()
else:
    model = model.float()
ids = infer.read_speech_ids(tokenizer, 256)
texts = "one two", "seven", "three nine nine four"
rows = [infer.begin(model, tokenizer, ids, text, settings, "rms") for text in texts]
infer.speak_rows(model, rows, ids, settings)
print(json.dumps([[row.end, row.codes.tolist()] for row in rows]))
"""


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("words", [("0", "fp32"), ("0.8", "fp32"), ("0", "4bit")])
def test_a_cuda_graph_speaks_the_same_codes(words):
    plain, graph = (
        json.loads(run("-c", GRAPH, way, *words).splitlines()[-1]) for way in ("false", "true")
    )
    assert sum(len(codes) for _, codes in plain) > 30
    assert graph == plain
