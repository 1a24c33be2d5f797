"""Speaking: tokens/s and real-time factor of batches, time to the first audio of a stream.

python tests/benchmarks/bench_speak.py  # the demo's base, on any machine
python tests/benchmarks/bench_speak.py --shape orpheus-3b  # random bf16 weights, on a GPU
python tests/benchmarks/bench_speak.py --shape orpheus-3b --weights 4bit  # with a LoRA, as infer.py
python tests/benchmarks/bench_speak.py --shape orpheus-3b --cache static --batch 1 4 16

A token that models hardly ever generate stands in for the end token, so that all rows are about
equally long.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from bench_gpu import make_models
from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from orpheus.codec import load_codec  # noqa: E402
from orpheus.models import LINEAR_LAYERS, device, load_model  # noqa: E402
from orpheus.settings import read_settings, run  # noqa: E402
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS  # noqa: E402
from orpheus.voice import Utterance, Voice  # noqa: E402


def load(shape: str, weights: str, cache: str | None) -> Voice:
    """A Voice whose end is a token that no model generates."""
    paths = make_models(shape)
    model, tokenizer = load_model(paths["model"], weights)
    if weights != "16bit":  # an adapter is not merged into them
        lora = LoraConfig(r=64, target_modules=LINEAR_LAYERS)
        model = get_peft_model(model, lora).eval()
    settings = read_settings(ROOT / "data/demo/config.json", {"temperature": "0.6"})
    settings = settings.replace(cache_implementation=cache)
    voice = Voice(model, tokenizer, load_codec(paths["codec"], device()), settings)
    voice.ids = voice.ids._replace(eos=voice.ids.pad)
    return voice


def make_parts(voice: Voice, count: int, frames: int) -> list[Utterance]:
    """Parts of equal length with prompts of 20 to 40 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 41, count)
    prompts = [[*rng.integers(0, 250, n).tolist(), voice.ids.sos] for n in lengths]
    return [Utterance("", prompt, frames) for prompt in prompts]


def speak(voice: Voice, count: int, frames: int) -> tuple[float, float, float]:
    """Of a batch, decoded: tokens/s, real-time factor; of a stream: seconds to its first audio."""
    parts = make_parts(voice, count, frames)
    started = time.perf_counter()
    voice.generate(parts)
    for part in parts:
        list(voice.decode(part))
    spent, frames = time.perf_counter() - started, sum(len(part.codes) for part in parts)
    started = time.perf_counter()
    pieces = voice.decode(make_parts(voice, 1, frames)[0], stream=True)
    next(pieces)
    first = time.perf_counter() - started
    pieces.close()
    return frames * SLOTS / spent, spent * SAMPLE_RATE / FRAME_SAMPLES / frames, first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["demo", "orpheus-3b"], default="demo")
    parser.add_argument("--weights", choices=["4bit", "8bit", "16bit"], default="16bit")
    parser.add_argument("--cache", help="generate's cache_implementation")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="of speech in every row")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    voice = load(arguments.shape, arguments.weights, arguments.cache)
    frames = int(arguments.seconds * SAMPLE_RATE / FRAME_SAMPLES)
    what = f"{arguments.shape}, {arguments.weights}, on {device()}, {frames} frames a row"
    print(f"{what}; median (lowest to highest)")
    print(f"{'batch':>5} {'tokens/s':>24} {'real-time factor':>18} {'first audio':>12}")
    for count in arguments.batch:
        speak(voice, count, 8)  # warm
        runs = [speak(voice, count, frames) for _ in range(arguments.rounds)]
        rates, factors, firsts = map(sorted, zip(*runs, strict=True))
        rate = f"{statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"
        factor, first = statistics.median(factors), statistics.median(firsts)
        print(f"{count:5} {rate:>24} {factor:18.3f} {first:10.3f} s", flush=True)


if __name__ == "__main__":
    run(main)
