"""Useful tokens a second with pack, pad and pad_to_max, on the tiny base and a real mix of lengths.

    python tests/benchmarks/bench_batching.py  # five minutes on two cores
    python tests/benchmarks/bench_batching.py --steps 40

Rows are as long as LJSpeech's clips (lognormal, mean 6.6 s, at most 10 s), of random legal codes;
every mode sees the same rows, in turns, on the transformers backend. Useful tokens are those of
rows; a slot is a place in a batch, be it used or padded.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from orpheus.audio import Sound  # noqa: E402
from orpheus.codec import load_codec  # noqa: E402
from orpheus.models import load_tokenizer  # noqa: E402
from orpheus.rows import make_row  # noqa: E402
from orpheus.settings import read_settings  # noqa: E402
from orpheus.tokens import SLOTS, prompt_ids, read_speech_ids  # noqa: E402
from orpheus.trainer import resolve_settings  # noqa: E402

MODES = {  # 4 × 1,024 slots or so to a step; packed rows go one by one, as attention wants it
    "pack": {"batching": "pack", "gradient_accumulation_steps": "4"},
    "pad": {"batching": "pad", "per_device_train_batch_size": "6"},
    "pad_to_max": {"batching": "pad_to_max", "per_device_train_batch_size": "4"},
}


def clip_seconds(draw, count: int) -> np.ndarray:
    return np.clip(draw.lognormal(np.log(6.2), 0.4, count), 1, 10)


def make_rows(settings, tokenizer, ids, count: int) -> Dataset:
    draw, rows = np.random.default_rng(0), []
    for n, length in enumerate(clip_seconds(draw, count)):
        codes = draw.integers(0, ids.codebook_size, (Sound(seconds=length).frames, SLOTS))
        prompt = prompt_ids(tokenizer, ids, f"a text of the usual length, number {n}" * 2)
        rows.append(make_row(prompt, codes, ids, settings))
    return Dataset.from_list(rows)


def one_run(mode: dict, steps: int, tokenizer, ids) -> tuple[float, float]:
    """(useful tokens a second, share of slots used) of a few steps."""
    with tempfile.TemporaryDirectory() as out:
        keys = {"output_dir": out, "backend": "transformers", "max_steps": str(steps)}
        keys |= {"per_device_train_batch_size": "1", **mode}
        keys |= {"report_to": "none", "save_steps": "9999", "sample_steps": "9999"}
        settings = resolve_settings(read_settings(ROOT / "data/demo/config.json", keys))
        arguments = finetune.make_sft_config(settings)
        rows = make_rows(settings, tokenizer, ids, 8 * steps)
        model = finetune.load_model(settings, arguments)
        trainer = finetune.make_trainer(model, tokenizer, rows, arguments, settings, None)
        used = slots = 0
        batches = steps * arguments.gradient_accumulation_steps
        for batch in list(trainer.get_train_dataloader())[:batches]:
            slots += batch["input_ids"].numel()
            used += int(batch.get("attention_mask", batch["input_ids"] * 0 + 1).sum())
        begun = time.perf_counter()
        trainer.train()
        return used / (time.perf_counter() - begun), used / slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(ROOT / "data/demo/base")
    ids = read_speech_ids(tokenizer, load_codec(str(ROOT / "data/demo/codec")).codebook_size)
    speeds, shares = {name: [] for name in MODES}, {}
    for _ in range(arguments.repeats):
        for name, mode in MODES.items():
            with contextlib.redirect_stdout(io.StringIO()):
                speed, shares[name] = one_run(mode, arguments.steps, tokenizer, ids)
            speeds[name].append(speed)
    base = np.median(speeds["pad_to_max"])
    print(f"{'':12} {'useful tokens/s':>16} {'(least, most)':>16} {'ratio':>6} {'slots used':>11}")
    for name, values in speeds.items():
        spread = f"({min(values):,.0f}, {max(values):,.0f})"
        middle = np.median(values)
        print(f"{name:12} {middle:16,.0f} {spread:>16} {middle / base:6.2f} {shares[name]:11.1%}")


if __name__ == "__main__":
    main()
