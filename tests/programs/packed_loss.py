"""Prints the loss of packed rows, of each row alone, and of packed rows that see each other."""

import json
import sys
from pathlib import Path

import finetune
from orpheus.settings import read_settings

settings = read_settings("data/demo/config.json", json.loads(sys.argv[1]))
finetune.import_backend(settings)  # unsloth comes before transformers, which the rest imports

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

from orpheus.codec import load_codec  # noqa: E402
from orpheus.models import load_tokenizer  # noqa: E402
from orpheus.rows import make_row  # noqa: E402
from orpheus.tokens import read_speech_ids  # noqa: E402
from orpheus.trainer import resolve_settings  # noqa: E402

settings = resolve_settings(settings)
arguments = finetune.make_sft_config(settings)
tokenizer = load_tokenizer(Path(settings.model))
ids = read_speech_ids(tokenizer, load_codec(settings.codec).codebook_size)
draw = np.random.default_rng(5)
codes = [draw.integers(0, ids.codebook_size, (n, 7)) for n in draw.integers(3, 32, 24)]
rows = [make_row([ids.soh, ids.bos, 65, ids.sos], c, ids, settings) for c in codes]
dataset = Dataset.from_list(rows)
model = finetune.load_model(settings, arguments)
trainer = finetune.make_trainer(model, tokenizer, dataset, arguments, settings, None)
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


def mixed(batch):
    """The same batch without its boundaries: Unsloth's packed_seq_lengths, TRL's position_ids."""
    batch = {name: value for name, value in batch.items() if name != "packed_seq_lengths"}
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


losses = [
    [loss_of(dict(batch)) for batch in packed],
    [loss_of(alone(row)) for row in rows],
    [loss_of(mixed(batch)) for batch in packed],
]
print(json.dumps([sum(each) for each in losses]))
