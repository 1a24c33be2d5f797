"""On one GPU, at Orpheus-3B's shape: training speed, memory against --plan, encoding. Tables.

python tests/benchmarks/bench_gpu.py speed  # the notebooks' recipe, padding, ours: tokens/s
python tests/benchmarks/bench_gpu.py memory  # what --plan says against what a run takes
python tests/benchmarks/bench_gpu.py fit  # --fit on cards of 8, 12, 24 GB, by a cap
python tests/benchmarks/bench_gpu.py encode  # SNAC in batches against one clip at a time
python tests/benchmarks/bench_gpu.py speed --shape demo  # all of it at toy size, on any machine

Weights are random, in the shapes of tests/orpheus-3b and tests/snac_24khz; rows are as long as
LJSpeech's clips (lognormal, mean 6.6 s, at most 10 s), of random legal codes. Every line is a
process of its own, warmed up for two steps. Speaking has a script of its own: bench_speak.py.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
import orpheus.settings  # noqa: E402
from orpheus.settings import read_settings  # noqa: E402

if sys.argv[1:2] == ["one"]:  # unsloth comes before transformers, which the rest imports
    keys = json.loads(sys.argv[2]).items()
    finetune.import_backend(read_settings(None, {k: v for k, v in keys if k[:6] != "bench_"}))

import torch  # noqa: E402
from bench_batching import clip_seconds, make_rows  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from orpheus.codec import encode, load_codec  # noqa: E402
from orpheus.compatibility import check_compatibility, resolve_settings  # noqa: E402
from orpheus.encoding import encode_sounds  # noqa: E402
from orpheus.memory import (  # noqa: E402
    FIT_KEYS,
    GIB,
    choose_fit,
    memory_plan,
    peak_memory,
    read_base,
)
from orpheus.models import device, load_tokenizer  # noqa: E402
from orpheus.tokens import read_speech_ids  # noqa: E402

WORK = ROOT / "outputs" / "bench_gpu"
OURS = {"batching": "pack", "gradient_checkpointing": "unsloth"}
ONE_BY_ONE = OURS | {"batching": "pad", "gradient_accumulation_steps": "4"}
TUNED = OURS | {"max_length": "8192", "gradient_checkpointing": "false"}
SPEED = {
    "notebook, 16-bit": ONE_BY_ONE | {"weights": "16bit"},
    "notebook, 4-bit": ONE_BY_ONE,
    "padded, 8 rows": OURS | {"batching": "pad", "per_device_train_batch_size": "8"},
    "ours as shipped": OURS | {"gradient_accumulation_steps": "4"},
    "ours, 8,192 a row": OURS | {"max_length": "8192"},
    "8,192, no checkpoints": TUNED,
    "the same, 16-bit": TUNED | {"weights": "16bit"},
    "16-bit, 16,384": TUNED | {"weights": "16bit", "max_length": "16384"},
}
TOY = {"backend": "transformers", "weights": "16bit", "max_length": "1024", "bf16": "false"}
TOY |= {"optim": "adamw_torch_fused", "gradient_checkpointing": "false"}


def make_models(shape: str) -> dict[str, str]:
    """Writes base and codec once, with random weights; {"model": …, "codec": …}."""
    import torch
    from snac import SNAC
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if shape == "demo":
        return {"model": "data/demo/base", "codec": "data/demo/codec"}
    base, codec = WORK / "base", WORK / "codec"
    if not (codec / "pytorch_model.bin").is_file():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device()):
            LlamaForCausalLM(LlamaConfig.from_pretrained("tests/orpheus-3b")).save_pretrained(base)
        torch.set_default_dtype(torch.float32)
        names = {128_000: "<|begin_of_text|>", 128_009: "<|eot_id|>"}
        names |= {128_256 + n: f"<custom_token_{n}>" for n in range(28_684)}
        words = {names.get(n, f"word{n}"): n for n in range(156_940)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="word1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|begin_of_text|>",
            eos_token="<custom_token_2>",
            pad_token="<custom_token_7>",
        )
        tokenizer.save_pretrained(base)
        codec.mkdir(exist_ok=True)
        shape = ROOT / "tests/snac_24khz/config.json"
        (codec / "config.json").write_bytes(shape.read_bytes())
        torch.save(SNAC.from_config(str(shape)).state_dict(), codec / "pytorch_model.bin")
        torch.cuda.empty_cache()  # the runs have the card to themselves
    return {"model": str(base), "codec": str(codec)}


# ---------------------------------------------------------------- one run, a process of its own


def one_run(keys: dict) -> dict:
    """Trains `bench_steps` steps after two to warm up; seconds, tokens, slots, bytes."""
    steps, cap = int(keys.pop("bench_steps")), float(keys.pop("bench_cap", 0))  # GiB
    keys |= {"output_dir": str(WORK / "run"), "overwrite": "true", "max_steps": str(steps + 2)}
    keys |= {"report_to": "none", "save_strategy": "no", "sample_steps": "9999", "held_out": "0"}
    keys |= {"fit": str(cap)} if cap else {}
    settings, gpu = resolve_settings(read_settings(None, keys)), torch.cuda.is_available()
    if cap and gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
        free = lambda *_: (cap * GIB - torch.cuda.memory_reserved(), total)  # noqa: E731
        torch.cuda.mem_get_info = free  # Unsloth sizes its loss by it
    settings = choose_fit(settings, read_base(settings), None)
    arguments = finetune.make_sft_config(settings)
    check_compatibility(settings, arguments)
    tokenizer = load_tokenizer(Path(settings.model))
    size = json.loads(Path(settings.codec, "config.json").read_text())["codebook_size"]
    ids = read_speech_ids(tokenizer, size)
    at_once = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    most = at_once * (settings.max_length // 200 if settings.batching == "pack" else 1)
    rows = make_rows(settings, tokenizer, ids, (steps + 2) * most)
    model, moments = finetune.load_model(settings, arguments), []
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # a 16-bit base is read before it is quantised
    trainer = finetune.make_trainer(model, tokenizer, rows, arguments, settings, None)
    each = arguments.gradient_accumulation_steps  # batches a step
    batches = itertools.islice(trainer.get_train_dataloader(), 2 * each, (2 + steps) * each)
    used, slots, pairs = map(sum, zip(*map(tell, batches), strict=True))

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if gpu:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    base, plan = read_base(settings), settings.flat()
    by_slot, by_pair = operations(settings, base)
    parts = memory_plan(plan, base)
    parts.pop("codec, CUDA")  # no codec is here, and the peak is that of torch's own memory
    return {
        "seconds": (seconds := moments[-1] - moments[1]),
        "useful": used / seconds,  # tokens a second
        "slots": slots / seconds,
        "operations": (by_slot * slots + by_pair * pairs) / seconds,
        "peak": peak_memory() / GIB,
        "planned": sum(parts.values()) / GIB,
        "took": [plan[name] for name in FIT_KEYS],
    }


def tell(batch) -> tuple[int, int, float]:
    """(tokens of rows, slots, pairs of a token and one that it looks back at) of a batch."""
    slots = batch["input_ids"].numel()
    if "position_ids" in batch:  # packed: every slot is a row's, and sees that row alone
        return slots, slots, float((batch["position_ids"] + 1).sum())
    mask = batch["attention_mask"]
    return int(mask.sum()), slots, float(mask.cumsum(1).sum())


def operations(settings, base) -> tuple[float, float]:
    """Floating-point operations executed for each slot, and for each pair of tokens.

    A multiplication and an addition are two. Forward and the gradient of the inputs, and, where
    checkpoints are on, forward again; of frozen weights no gradient is made, of a LoRA's it is.
    """
    again = 1 if settings.gradient_checkpointing else 0
    config, rank = base.config, settings.lora_r
    head = config.hidden_size * config.vocab_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    slot = 2 * (base.linear * (2 + again) + base.lora * rank * (3 + again) + head * 2)
    return slot, 4 * attention * (1 + again + 2.5)  # backward: five products to forward's two


def run(keys: dict) -> dict | str:
    """What one_run makes of `keys` in a new process, or the last line it said."""
    command = [sys.executable, __file__, "one", json.dumps(keys)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "over four minutes"
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().split("\n")[-1]
    print(f"    {last[:300]}", file=sys.stderr, flush=True)
    return json.loads(last) if done.returncode == 0 else last[:100]


# ---------------------------------------------------------------- tables


def matmul_ceiling() -> float:
    """Operations a second of a large product of random numbers, in bf16 on a GPU; the median."""
    import torch

    gpu = torch.cuda.is_available()
    size = 8192 if gpu else 1024
    a, b = torch.randn(2, size, size, device=device(), dtype=torch.bfloat16 if gpu else None)
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    if gpu:
        torch.cuda.empty_cache()
    return 2 * size**3 / statistics.median(times[5:])


MEDIANS = ("useful", "slots", "operations", "peak")


def tell_speed(keys: dict, arguments) -> None:
    ceiling = matmul_ceiling()
    print(f"matmul ceiling {ceiling / 1e12:.2f} TFLOP/s\n")
    print("| way | useful tokens/s (least, most) | slots/s | of the ceiling | GiB | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    ways = {name: way for name, way in SPEED.items() if arguments.only in (None, name)}
    found = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            found[name].append(run(way | keys))
    first = None
    for name, runs in found.items():
        good = [one for one in runs if isinstance(one, dict)]
        if not good:
            print(f"| {name} | {runs[0]} |", flush=True)
            continue
        middle = {key: statistics.median(one[key] for one in good) for key in MEDIANS}
        speeds, first = [one["useful"] for one in good], first or middle["useful"]
        told = f"{middle['useful']:,.0f} ({min(speeds):,.0f}, {max(speeds):,.0f})"
        told += f" | {middle['slots']:,.0f} | {middle['operations'] / ceiling:.0%}"
        told += f" | {middle['peak']:.2f} | {middle['useful'] / first:.2f}"
        print(f"| {name} | {told} |", flush=True)


def tell_memory(keys: dict, arguments) -> None:
    print("| weights | checkpointing | row | planned GiB | peak GiB | planned / peak |")
    print("|---|---|---|---|---|---|", flush=True)
    for weights, checkpointing, length in itertools.product(
        ("4bit", "16bit"), ("false", "true", "unsloth"), (2048, 4096, 8192, 16384)
    ):
        way = {"weights": weights, "gradient_checkpointing": checkpointing, "batching": "pack"}
        way |= {"max_length": str(length), "gradient_accumulation_steps": "1"}
        one = run(way | keys)
        told = one
        if isinstance(one, dict):
            ratio = one["planned"] / one["peak"]
            told = f"{one['planned']:.2f} | {one['peak']:.2f} | {ratio:.2f}"
        print(f"| {weights} | {checkpointing} | {length} | {told} |", flush=True)


def tell_fit(keys: dict, arguments) -> None:
    print("| card GiB | checkpointing, rows, accumulation | planned GiB | peak GiB |")
    print("|---|---|---|---|", flush=True)
    for cap in (8, 12, 24):
        rows = {"gradient_accumulation_steps": "16", "bench_cap": str(cap)}
        one = run(OURS | rows | keys)
        told = one
        if isinstance(one, dict):
            told = f"{one['took']} | {one['planned']:.2f} | {one['peak']:.2f}"
        print(f"| {cap} | {told} |", flush=True)


def tell_encoding(keys: dict, arguments) -> None:
    from concurrent.futures import ThreadPoolExecutor

    codec = load_codec(keys["codec"], device())
    draw = np.random.default_rng(0)
    seconds = clip_seconds(draw, arguments.clips)
    clips = [draw.normal(0, 0.1, int(24_000 * s)).astype(np.float32) for s in seconds]
    spent = {"one": [], "batches": []}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for _ in range(arguments.repeats + 1):  # the first warms up
            begun = time.perf_counter()
            alone = [encode(codec, [clip])[0] for clip in clips]
            between = time.perf_counter()
            together = list(encode_sounds(codec, clips, threads))
            spent["one"].append(between - begun)
            spent["batches"].append(time.perf_counter() - between)
    same = sum(int((a == b).sum()) for a, b in zip(alone, together, strict=True))
    one, batches = (statistics.median(times[1:]) for times in spent.values())
    audio, codes = sum(seconds), sum(a.size for a in alone)
    print(f"one clip at a time {audio / one:,.0f}, batches {audio / batches:,.0f} × real time")
    print(f"ratio {one / batches:.1f}; {same:,} of {codes:,} codes the same")


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one_run(json.loads(sys.argv[2]))))
        return
    tables = {"speed": tell_speed, "memory": tell_memory}
    tables |= {"fit": tell_fit, "encode": tell_encoding}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=tables)
    parser.add_argument("--shape", choices=["demo", "orpheus-3b"], default="orpheus-3b")
    parser.add_argument("--only", choices=SPEED, help="one line of the speed table")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--clips", type=int, default=200)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    keys = make_models(arguments.shape) | {"bench_steps": str(arguments.steps)}
    if arguments.shape == "demo":
        print("toy size: one setting under every name, which shows that it runs, no more\n")
    tables[arguments.table](keys | (TOY if arguments.shape == "demo" else {}), arguments)


if __name__ == "__main__":
    orpheus.settings.run(main)
