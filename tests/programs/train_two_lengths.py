"""Trains one step on a batch of 1054 and 337 tokens and checks how it was padded."""

import json
import sys
from pathlib import Path

import numpy as np
import unsloth  # noqa: F401 (before transformers, which it patches)
from datasets import Dataset

import finetune
from orpheus.codec import load_codec
from orpheus.models import load_tokenizer
from orpheus.settings import read_settings
from orpheus.tokens import read_speech_ids
from orpheus.trainer import resolve_settings

settings = resolve_settings(read_settings("data/demo/config.json", json.loads(sys.argv[1])))
arguments = finetune.make_sft_config(settings)
tokenizer = load_tokenizer(Path(settings.model))
ids = read_speech_ids(tokenizer, load_codec(settings.codec).codebook_size)
draw = np.random.default_rng(0)
rows = [draw.integers(ids.audio, ids.audio + 7 * ids.codebook_size, n) for n in (1054, 337)]
dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
model = finetune.load_model(settings, arguments)


trainer = finetune.make_trainer(model, tokenizer, dataset, arguments, settings, None)
batch = next(iter(trainer.get_train_dataloader()))
assert set(batch) == {"input_ids", "attention_mask", "labels"}, set(batch)
assert all(tensor.shape == (2, 1054) for tensor in batch.values())
short = int(batch["attention_mask"].sum(1).argmin())
assert batch["attention_mask"].sum(1).tolist()[short] == 337
assert (batch["labels"][short, 337:] == -100).all()
assert (batch["input_ids"][short, 337:] == ids.pad).all()
assert (batch["labels"][short, :337] == batch["input_ids"][short, :337]).all()
trainer.train()
assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
