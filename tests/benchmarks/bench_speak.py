"""Our loop against model.generate: tokens/s, real-time factor, time to the first audio.

python tests/benchmarks/bench_speak.py  # the demo's base, on any machine
python tests/benchmarks/bench_speak.py --shape orpheus-3b  # random bf16 weights, on a GPU
python tests/benchmarks/bench_speak.py --shape orpheus-3b --weights 4bit  # with a LoRA, as infer.py
python tests/benchmarks/bench_speak.py --shape orpheus-3b --seconds 10 --batch 1 4 16

A token that models hardly ever generate stands in for the end token, so that all rows are about
equally long. The ways take turns in every round.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from bench_gpu import make_models
from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from orpheus.codec import decode, decode_stream, load_codec  # noqa: E402
from orpheus.generation import generate_with_transformers  # noqa: E402
from orpheus.models import LINEAR_LAYERS, device, load_model  # noqa: E402
from orpheus.sampling import speak_frames  # noqa: E402
from orpheus.scoring import Utterance  # noqa: E402
from orpheus.settings import read_settings, run  # noqa: E402
from orpheus.tokens import (  # noqa: E402
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
    read_speech_ids,
)


def load(shape: str, weights: str):
    """(model, codec, ids whose end is a token that no model generates)."""
    paths = make_models(shape)
    model, tokenizer = load_model(paths["model"], weights)
    if weights != "16bit":  # an adapter is not merged into them
        lora = LoraConfig(r=64, target_modules=LINEAR_LAYERS)
        model = get_peft_model(model, lora).eval()
    codec = load_codec(paths["codec"], device())
    ids = read_speech_ids(tokenizer, codec.codebook_size)
    return model, codec, ids._replace(eos=ids.pad)


def utterances(ids, count: int, frames: int) -> list:
    """Utterances of equal length with prompts of 20 to 40 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 41, count)
    prompts = [[*rng.integers(0, 250, n).tolist(), ids.sos] for n in lengths]
    return [Utterance("", prompt, frames) for prompt in prompts]


def generate(model, codec, ids, rows, settings, static) -> float:
    """model.generate, then the codec over each whole row; seconds to the first audio."""
    started = time.perf_counter()
    generate_with_transformers(model, rows, ids, settings)
    decode(codec, rows[0].codes)
    first = time.perf_counter() - started
    for row in rows[1:]:
        decode(codec, row.codes)
    return first


def ours(model, codec, ids, rows, settings, static) -> float:
    """Our loop, with the first row streamed; seconds to the first audio."""
    started, first = time.perf_counter(), None
    frames = speak_frames(model, rows, ids, settings, static)
    for _ in decode_stream(codec, (rows[0].frames[-1] for _ in frames if not rows[0].end)):
        first = first or time.perf_counter() - started
    for row in rows[1:]:
        list(decode_stream(codec, row.frames))
    return first


def graphed(model, codec, ids, rows, settings, static) -> float:
    """Our loop with `cuda_graph` on; the capture is included."""
    return ours(model, codec, ids, rows, settings.replace(cuda_graph=True), static)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["demo", "orpheus-3b"], default="demo")
    parser.add_argument("--weights", choices=["4bit", "8bit", "16bit"], default="16bit")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="of speech in every row")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, codec, ids = load(arguments.shape, arguments.weights)
    settings = read_settings(ROOT / "data/demo/config.json", {"temperature": "0.6"})
    frames = int(arguments.seconds * SAMPLE_RATE / FRAME_SAMPLES)
    ways = {"generate": (generate, None), "ours": (ours, False), "ours, static": (ours, True)}
    if torch.cuda.is_available():
        ways["ours, graph"] = graphed, True
    for speak, static in ways.values():  # warm
        speak(model, codec, ids, utterances(ids, 1, 3), settings, static)
    what = f"{arguments.shape}, {arguments.weights}, on {device()}, {frames} frames a row"
    print(f"{what}; median (lowest to highest)")
    print(f"{'batch':>5} {'way':14} {'tokens/s':>24} {'real-time factor':>18} {'first audio':>12}")
    for count in arguments.batch:
        runs = {name: [] for name in ways}  # (tokens/s, real-time factor, first audio)
        for _ in range(arguments.rounds):
            for name, (speak, static) in ways.items():
                rows = utterances(ids, count, frames)
                started = time.perf_counter()
                first = speak(model, codec, ids, rows, settings, static)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent, frame_count = time.perf_counter() - started, sum(len(r.frames) for r in rows)
                seconds = frame_count * FRAME_SAMPLES / SAMPLE_RATE
                runs[name].append((frame_count * SLOTS / spent, spent / seconds, first))
        for name, figures in runs.items():
            rates, factors, firsts = map(sorted, zip(*figures, strict=True))
            rate = f"{statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"
            factor, first = statistics.median(factors), statistics.median(firsts)
            print(f"{count:5} {name:14} {rate:>24} {factor:18.3f} {first:10.2f} s", flush=True)


if __name__ == "__main__":
    run(main)
