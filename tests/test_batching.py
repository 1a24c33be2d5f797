"""Rows of unequal length: packed, padded and cut, each against an independent account of it.

All on the transformers backend: importing unsloth would patch TRL for the whole process.
"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO, script
from running import settings_of

import finetune
from orpheus.batching import (
    count_packed,
    length_batches,
    make_row,
    slots_used,
    split_rows,
    steps_per_epoch,
)
from orpheus.compatibility import check_compatibility, resolve_settings
from orpheus.settings import read_settings
from orpheus.tokens import ids_to_codes

PLAIN = {"backend": "transformers", "gradient_checkpointing": "false"}


@pytest.fixture
def rows(ids):
    """Twelve rows as prepare makes them, 40 to 240 tokens, of random legal codes."""
    draw = np.random.default_rng(5)
    settings = read_settings("data/demo/config.json")
    codes = [draw.integers(0, ids.codebook_size, (n, 7)) for n in draw.integers(3, 32, 12)]
    return [make_row([ids.soh, ids.bos, 65, ids.sos], c, ids, settings) for c in codes]


@pytest.fixture
def trainer_of(tmp_path, tokenizer, rows):
    """A trainer over `rows`, and its settings, for these keys."""

    def make(**overrides):
        assert "unsloth" not in sys.modules
        overrides = {"output_dir": str(tmp_path / "out"), **PLAIN, **overrides}
        settings = resolve_settings(read_settings("data/demo/config.json", overrides))
        arguments = finetune.make_sft_config(settings)
        check_compatibility(settings, arguments)
        model = finetune.load_model(settings, arguments)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():  # else half of the gradients are zero
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        return finetune.make_trainer(model, tokenizer, rows, arguments, settings, None)

    return make


def losses_and_gradients(model, batches):
    """(summed loss, gradients end to end) over batches, in fp32."""
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        part = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        part.backward()
        loss += part.item()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss, torch.cat(grads)


def one_by_one(rows):
    return [
        {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "labels")} for row in rows
    ]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_packed_equals_row_by_row_and_a_contaminated_pack_does_not(trainer_of, rows):
    trainer = trainer_of(batching="pack", per_device_train_batch_size="1", max_length="512")
    model = trainer.model.float().eval()
    packed = list(trainer.get_train_dataloader())
    assert len(packed) < len(rows) and all("attention_mask" not in batch for batch in packed)
    assert all("position_ids" in batch for batch in packed)
    alone, alone_grads = losses_and_gradients(model, one_by_one(rows))
    again = [dict(batch) for batch in packed]
    loss, grads = losses_and_gradients(model, again)
    assert abs(loss / alone - 1) < 1e-5
    assert relative(grads, alone_grads) < 1e-5
    spoilt = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in packed]
    loss, grads = losses_and_gradients(model, spoilt)
    assert abs(loss / alone - 1) > 1e-5 and relative(grads, alone_grads) > 1e-3


@pytest.mark.parametrize("batching", ["pad", "pad_to_max"])
def test_padded_equals_row_by_row(trainer_of, rows, ids, batching):
    trainer = trainer_of(batching=batching, per_device_train_batch_size="4", max_length="256")
    model = trainer.model.float().eval()
    batches = list(trainer.get_train_dataloader())
    for batch in batches:
        shape = batch["input_ids"].shape
        assert batch["attention_mask"].shape == batch["labels"].shape == shape
        blank = batch["attention_mask"] == 0
        assert (batch["labels"][blank] == -100).all()
        assert (batch["input_ids"][blank] == ids.pad).all()
        longest = 256 if batching == "pad_to_max" else int(batch["attention_mask"].sum(1).max())
        assert shape[1] == longest
    alone, alone_grads = losses_and_gradients(model, one_by_one(rows))
    loss, grads = losses_and_gradients(model, batches)
    assert abs(loss / alone - 1) < 1e-5
    assert relative(grads, alone_grads) < 1e-5


@pytest.mark.parametrize("batching", ["pack", "pad", "pad_to_max"])
def test_the_doctor_tells_of_batches_what_the_trainer_does(trainer_of, rows, capsys, batching):
    keys = {"batching": batching, "per_device_train_batch_size": "2", "max_length": "256"}
    trainer_of(**keys)
    lengths = [len(row["input_ids"]) for row in rows]
    used = slots_used(lengths, read_settings("data/demo/config.json", keys))
    assert f"{100 * used[batching]:.1f} % used; 2 rows a step; " in capsys.readouterr().out


@pytest.mark.parametrize("batching", ["pack", "pad", "pad_to_max"])
@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_the_doctor_counts_steps_as_the_trainer_does(trainer_of, rows, batching, accumulation):
    keys = {"batching": batching, "per_device_train_batch_size": "2", "max_length": "256"}
    keys |= {"gradient_accumulation_steps": accumulation, "max_steps": "-1"}
    trainer = trainer_of(**keys, num_train_epochs="1")
    settings = read_settings("data/demo/config.json", keys)
    lengths = [len(row["input_ids"]) for row in rows]
    assert trainer.total_steps == steps_per_epoch(lengths, settings) > 1


def test_packed_rows_are_counted_as_trl_packs_them():
    from datasets import Dataset
    from trl import pack_dataset

    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(20, 1024, 300).tolist()
        table = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        assert count_packed(lengths, 1024) == len(pack_dataset(table, 1024, "bfd"))


def test_length_batches_are_alike_whole_and_repeatable():
    lengths = np.random.default_rng(0).integers(50, 2000, 1003).tolist()
    order = length_batches(lengths, 8, seed=1)
    assert sorted(order) == list(range(1003))
    assert order == length_batches(lengths, 8, seed=1)
    assert order != length_batches(lengths, 8, seed=2)
    batches = [[lengths[row] for row in order[n : n + 8]] for n in range(0, 1003, 8)]
    slots = sum(len(batch) * max(batch) for batch in batches)
    assert sum(lengths) / slots > 0.95
    assert len(batches[-1]) == 3


def test_length_sampler_changes_with_the_epoch(trainer_of):
    sampler = trainer_of(batching="pad", per_device_train_batch_size="2")._get_train_sampler()
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == sorted(first)


def test_truncated_rows_end_at_a_frames_edge_without_an_end(ids):
    settings = read_settings("data/demo/config.json", {"too_long": "truncate"})
    settings.max_length = 40
    prompt = [ids.soh, ids.bos, 65, 66, ids.sos]
    codes = np.random.default_rng(0).integers(0, ids.codebook_size, (10, 7))
    row = make_row(prompt, codes, ids, settings)
    assert len(row["input_ids"]) == 5 + 35  # five frames fit, and no end
    assert (ids_to_codes(row["input_ids"][5:], ids) == codes[:5]).all()
    short = make_row(prompt, codes[:4], ids, settings)
    assert short["input_ids"][-2:].tolist() == [ids.eos, ids.eoa] and len(short["input_ids"]) == 35
    settings.max_length = 41  # 5 + 35 + 2 would be over by one: cut, though the frames fit
    assert ids.eos not in make_row(prompt, codes[:5], ids, settings)["input_ids"]


def losses(out):
    state = max(out.glob("checkpoint-*"), key=lambda p: int(p.name[11:])) / "trainer_state.json"
    return [log["loss"] for log in json.loads(state.read_text())["log_history"] if "loss" in log]


@pytest.mark.parametrize("native", ["0", "1"])
def test_both_backends_give_the_same_losses(native, tmp_path, monkeypatch):
    """In fp32, as the demo's config says, whether or not Unsloth finds bfloat16 instructions."""
    monkeypatch.setenv("UNSLOTH_CPU_BF16", native)
    words = [*DEMO, "--limit", "16", "--max_steps", "4", "--logging_steps", "1"]
    words += ["--lr_scheduler_type", "constant", "--sample_texts", "[]"]
    words += ["--per_device_train_batch_size", "4"]
    printed = {}
    for backend in ("unsloth", "transformers"):
        out = tmp_path / backend
        code, printed[backend], errors = script(
            "finetune.py", *words, "--backend", backend, "--output_dir", out
        )
        assert code == 0, errors
    first, second = losses(tmp_path / "unsloth"), losses(tmp_path / "transformers")
    assert len(first) == 4 and first[-1] < first[0]
    assert np.allclose(first, second, rtol=1e-4), (first, second)
    batches = [text.split("batches")[1][:80] for text in printed.values()]
    assert batches[0] == batches[1]


def test_no_text_stands_on_both_sides():
    rows = [{"text": f"text {n % 40}", "n": n} for n in range(100)]
    settings = settings_of(held_out="0.25")
    train, held = split_rows(rows, settings)
    assert len(train) + len(held) == 100
    assert len({row["text"] for row in held}) == 10
    assert not {row["text"] for row in held} & {row["text"] for row in train}
    assert split_rows(rows, settings) == (train, held)
