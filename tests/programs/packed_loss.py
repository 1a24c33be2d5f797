"""Prints the loss of packed rows, of each row alone, and of packed rows that see each other."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import finetune
from orpheus.batching import make_row
from orpheus.codec import load_codec
from orpheus.models import load_tokenizer
from orpheus.settings import read_settings
from orpheus.tokens import read_speech_ids

overrides = json.loads(sys.argv[1])
if overrides["backend"] == "unsloth":
    import unsloth  # noqa: F401 (before transformers, which it patches)

settings = read_settings("data/demo/config.json", overrides)
arguments, _ = finetune.trainer_arguments(settings)
tokenizer = load_tokenizer(Path(settings.model))
ids = read_speech_ids(tokenizer, load_codec(settings.codec).codebook_size)
draw = np.random.default_rng(5)
codes = [draw.integers(0, ids.codebook_size, (n, 7)) for n in draw.integers(3, 32, 24)]
rows = [make_row([ids.soh, ids.bos, 65, ids.sos], c, ids, settings) for c in codes]
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
