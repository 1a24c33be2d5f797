"""On one GPU, at Orpheus-3B's shape: training speed, memory against --plan, rows, encoding.

python tests/benchmarks/bench_gpu.py  # every table
python tests/benchmarks/bench_gpu.py speed rows  # two of them
python tests/benchmarks/bench_gpu.py --minutes 9  # as many lines as there is time for
python tests/benchmarks/bench_gpu.py --shape demo  # at toy size, on any machine

Each line is added to --results as soon as it is measured, and the next call measures only those
that are missing; so the work can be split over several leases of a GPU. Weights are random, in the
shapes of tests/orpheus-3b and tests/snac_24khz; rows are as long as LJSpeech's clips (lognormal,
mean 6.6 s, at most 10 s), of random legal codes. Lines that share a loaded model are measured in
one process, each with a trainer of its own and two steps to warm up. Speaking has a script of its
own: bench_speak.py.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from orpheus.settings import is_out_of_memory, read_settings, run  # noqa: E402

MEASURE = "--measure"  # marks the processes that measure
if sys.argv[1:2] == [MEASURE]:  # unsloth comes before transformers, which the rest imports
    finetune.import_backend(read_settings(None, json.loads(sys.argv[2])[0]["settings"]))

import torch  # noqa: E402
from bench_batching import clip_seconds, make_rows  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from orpheus.codec import encode, load_codec  # noqa: E402
from orpheus.memory import (  # noqa: E402
    GIB,
    memory_plan,
    most_rows,
    peak_memory,
    read_base,
)
from orpheus.models import device, load_tokenizer  # noqa: E402
from orpheus.rows import encode_sounds  # noqa: E402
from orpheus.tokens import read_speech_ids  # noqa: E402
from orpheus.trainer import check_compatibility, resolve_settings  # noqa: E402

WORK = ROOT / "outputs" / "bench_gpu"
PACKED = {"batching": "pack", "gradient_checkpointing": "unsloth"}
ONE_BY_ONE = PACKED | {"batching": "pad", "gradient_accumulation_steps": "4"}
TUNED = PACKED | {"max_length": "8192", "gradient_checkpointing": "false"}
SPEED = {
    "notebook, 4-bit": ONE_BY_ONE,
    "notebook, 16-bit": ONE_BY_ONE | {"weights": "16bit"},
    "as shipped": PACKED,
    "as shipped, 4 rows a step": PACKED | {"gradient_accumulation_steps": "4"},
    "padded, 8 rows": PACKED | {"batching": "pad", "per_device_train_batch_size": "8"},
    "8,192 a row": PACKED | {"max_length": "8192"},
    "8,192, no checkpoints": TUNED,
    "8,192, no checkpoints, 16-bit": TUNED | {"weights": "16bit"},
    "16,384, no checkpoints, 16-bit": TUNED | {"weights": "16bit", "max_length": "16384"},
}
CARDS = (8, 12, 24)  # GiB
MEMORY = {
    f"{weights}, {checkpointing}, {length:,}": {
        "batching": "pack",
        "weights": weights,
        "gradient_checkpointing": checkpointing,
        "max_length": str(length),
    }
    for weights in ("4bit", "16bit")
    for checkpointing in ("unsloth", "true", "false")
    for length in (2048, 4096, 8192, 16384)
}
# Nothing but training steps: no checks, no checkpoints, no tracker.
COMMON = {"report_to": "none", "save_strategy": "no", "sample_steps": "99999", "held_out": "0"}
COMMON |= {"sample_texts": "[]", "output_dir": str(WORK / "run"), "overwrite": "true"}
TOY = {"backend": "transformers", "weights": "16bit", "max_length": "256", "bf16": "false"}
TOY |= {"optim": "adamw_torch_fused", "gradient_checkpointing": "false"}
WARMUP = 2  # steps


def make_models(shape: str) -> dict[str, str]:
    """Writes base and codec once, with random weights; {"model": folder, "codec": folder}."""
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
        config = ROOT / "tests/snac_24khz/config.json"
        (codec / "config.json").write_bytes(config.read_bytes())
        torch.save(SNAC.from_config(str(config)).state_dict(), codec / "pytorch_model.bin")
        torch.cuda.empty_cache()  # the runs have the card to themselves
    return {"model": str(base), "codec": str(codec)}


# ---------------------------------------------------------------- one process of measurements


def measure(lines: list[dict]) -> Iterator[dict]:
    """Yields the figures of each line: name, seconds, tokens, operations, bytes.

    A line has a name, the steps and windows to measure, perhaps a cap (GiB of memory that it may
    use), and settings. Those of all lines load the same model.
    """
    longest = max(lines, key=lambda line: int(line["settings"].get("max_length", 2048)))
    settings = resolve_settings(read_settings(None, longest["settings"]))
    if cap := lines[0]["cap"]:
        settings = fit_to(cap, settings)
    elif lines[0]["table"] == "memory":
        # Unsloth's loss takes half of what is free, up to 4 GiB; the plan has it take as little
        # as this, which is 256 positions
        torch.cuda.mem_get_info = lambda *_: (int(1.2 * GIB), 80 * GIB)
    arguments = finetune.make_sft_config(settings)
    check_compatibility(settings, arguments)
    tokenizer = load_tokenizer(Path(settings.model))
    ids = read_speech_ids(tokenizer, load_codec(settings.codec).codebook_size)
    model = finetune.load_model(settings, arguments)
    for line in lines:
        gc.collect()  # the trainer before is held by reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # a base is read before it is quantised
        if not cap:
            settings = resolve_settings(read_settings(None, line["settings"]))
        try:
            yield line | measure_training(model, tokenizer, ids, settings, line)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            yield line | {"error": f"out of memory: {str(error).splitlines()[0][:120]}"}


def fit_to(cap: float, settings):
    """As many rows as --plan has a card of `cap` GiB hold; this process can use no more."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * GIB / total)
        # Unsloth sizes its loss by it
        torch.cuda.mem_get_info = lambda *_: (cap * GIB - torch.cuda.memory_reserved(), total)
    rows = most_rows(dict(settings), read_base(settings), cap * GIB)
    return settings.replace(per_device_train_batch_size=rows)


def measure_training(model, tokenizer, ids, settings, line: dict) -> dict:
    """Trains WARMUP steps, then the line's windows of steps; the figures of each window."""
    steps = WARMUP + line["steps"] * line["windows"]
    settings = settings.replace(max_steps=steps)
    arguments = finetune.make_sft_config(settings)
    each = arguments.gradient_accumulation_steps  # batches a step
    rows = arguments.per_device_train_batch_size * each * steps
    rows *= settings.max_length // 200 if settings.batching == "pack" else 1  # clips
    rows = make_rows(settings, tokenizer, ids, rows)
    trainer = finetune.make_trainer(model, tokenizer, rows, arguments, settings, None)
    batches = itertools.islice(trainer.get_train_dataloader(), steps * each)
    counts = np.array([count_tokens(batch) for batch in batches]).reshape(steps, each, 3).sum(1)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    marks = range(WARMUP, steps + 1, line["steps"])  # steps done
    seconds = [clock.ends[b - 1] - clock.ends[a - 1] for a, b in itertools.pairwise(marks)]
    useful, slots, pairs = (
        [int(counts[a:b, column].sum()) for a, b in itertools.pairwise(marks)]
        for column in range(3)
    )
    base, plan = read_base(settings), dict(settings)
    by_slot, by_pair = operations(settings, base)
    parts = memory_plan(plan, base)
    parts.pop("codec, CUDA")  # no codec is here, and the peak is that of torch's own memory
    return {
        "seconds": seconds,
        "useful": useful,  # tokens
        "slots": slots,  # tokens and padding
        "operations": [by_slot * s + by_pair * p for s, p in zip(slots, pairs, strict=True)],
        "peak": peak_memory() / GIB,
        "planned": sum(parts.values()) / GIB,
        "rows": settings.per_device_train_batch_size,
    }


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def count_tokens(batch) -> tuple[int, int, float]:
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


def measure_encoding(line: dict) -> dict:
    """Seconds to encode clips one by one and in batches, and how many codes are the same."""
    from concurrent.futures import ThreadPoolExecutor

    codec, draw = load_codec(line["settings"]["codec"], device()), np.random.default_rng(0)
    seconds = clip_seconds(draw, line["clips"])
    clips = [draw.normal(0, 0.1, int(24_000 * s)).astype(np.float32) for s in seconds]
    one_by_one, batched = [], []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for _ in range(line["windows"] + 1):  # the first warms up
            started = time.perf_counter()
            alone = [encode(codec, [clip])[0] for clip in clips]
            between = time.perf_counter()
            together = list(encode_sounds(codec, clips, threads))
            one_by_one.append(between - started)
            batched.append(time.perf_counter() - between)
    return line | {
        "one_by_one": one_by_one[1:],
        "batched": batched[1:],
        "audio": float(sum(seconds)),
        "same": sum(int((a == b).sum()) for a, b in zip(alone, together, strict=True)),
        "codes": sum(codes.size for codes in alone),
    }


def measure_machine(line: dict) -> dict:
    """The card, the versions, and operations per second of a large product, in bf16 on a GPU."""
    from importlib.metadata import PackageNotFoundError, version

    gpu = torch.cuda.is_available()
    size, seconds = 8192 if gpu else 1024, []
    a, b = torch.randn(2, size, size, device=device(), dtype=torch.bfloat16 if gpu else None)
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    versions = {}
    for name in ("torch", "transformers", "trl", "unsloth", "bitsandbytes", "xformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    card = torch.cuda.get_device_name() if gpu else "CPU"
    rate = 2 * size**3 / statistics.median(seconds[5:])
    return line | {"card": card, "versions": versions, "ceiling": rate}


# ---------------------------------------------------------------- lines, and what is known of them


def make_lines(arguments, paths: dict[str, str]) -> list[dict]:
    """Every line of the tables that are wanted, in the order in which they are measured."""
    toy = TOY if arguments.shape == "demo" else {}

    def line(table: str, name: str, settings: dict, **keys) -> dict:
        keys = {"steps": arguments.steps, "windows": arguments.windows, "cap": 0} | keys
        settings = COMMON | paths | settings | toy
        return {"table": table, "name": name, "settings": settings, **keys}

    lines = [line("machine", "machine", {})]
    lines += [line("speed", name, settings) for name, settings in SPEED.items()]
    lines += [line("rows", f"{cap} GiB", PACKED, steps=1, windows=1, cap=cap) for cap in CARDS]
    lines += [line("encode", "encode", {}, clips=arguments.clips)]
    lines += [line("memory", n, s, steps=1, windows=1) for n, s in MEMORY.items()]
    wanted = {"machine", *(arguments.tables or TABLES)}
    return [line for line in lines if line["table"] in wanted]


def process_key(line: dict) -> tuple:
    """Lines of the same key are measured in one process: they load the same model."""
    settings = line["settings"]
    loaded = [settings.get(name) for name in ("backend", "weights", "gradient_checkpointing")]
    return line["table"], line["cap"], *loaded


INPUTS = ("table", "name", "cap", "settings", "steps", "windows", "clips")


def line_key(line: dict) -> str:
    """What a line measures, so that a line that was measured with other settings is another."""
    return json.dumps([line.get(name) for name in INPUTS])


def read_results(path: Path) -> dict[str, dict]:
    """What was measured so far, by line_key."""
    text = path.read_text() if path.is_file() else ""
    return {line_key(line): line for line in map(json.loads, text.splitlines())}


def add_result(path: Path, line: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_process(lines: list[dict], results: Path, deadline: float) -> bool:
    """Measures lines in a new process and adds them to `results`; False if the time is up."""
    command = [sys.executable, __file__, MEASURE, json.dumps(lines), str(results)]
    log = WORK / "log.txt"
    with log.open("a") as file:
        start = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            code = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    if code:
        said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        error = said[-1][:200] if said else f"ended with {code}"
        missing = [line for line in lines if line_key(line) not in read_results(results)]
        failed = missing if missing == lines else missing[:1]  # all if none was measured
        print(f"{', '.join(line['name'] for line in failed)}: {error} ({log})")
        for line in failed:
            add_result(results, line | {"error": error})
        rest = missing[len(failed) :]
        return run_process(rest, results, deadline) if rest else True
    return True


# ---------------------------------------------------------------- tables


def rates(line: dict, name: str) -> list[float]:
    """A figure per second, for each window."""
    return [value / seconds for value, seconds in zip(line[name], line["seconds"], strict=True)]


def print_table(header: str, lines: list[dict], figures: Callable[[dict], str]) -> None:
    """Prints a table in Markdown: of each line the name, and its figures or its error."""
    print(f"| {header} |\n|{'---|' * len(header.split(' | '))}")
    for line in lines:
        print(f"| {line['name']} | {line.get('error') or figures(line)} |")


def print_machine(lines: list[dict], machine: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['card']}; {versions}")
    print(f"a large bf16 product: {machine['ceiling'] / 1e12:.2f} TFLOP/s")


def print_speed(lines: list[dict], machine: dict) -> None:
    first = next((line for line in lines if "error" not in line), None)

    def figures(line):
        useful, slots = rates(line, "useful"), statistics.median(rates(line, "slots"))
        share = statistics.median(rates(line, "operations")) / machine["ceiling"]
        ratio = statistics.median(useful) / statistics.median(rates(first, "useful"))
        speed = f"{statistics.median(useful):,.0f} ({min(useful):,.0f}, {max(useful):,.0f})"
        return f"{speed} | {slots:,.0f} | {share:.0%} | {line['peak']:.2f} | {ratio:.2f}"

    header = "settings | useful tokens/s (least, most) | slots/s | of the product | GiB | ratio"
    print_table(header, lines, figures)


def print_memory(lines: list[dict], machine: dict) -> None:
    def figures(line):
        ratio = line["planned"] / line["peak"]
        return f"{line['planned']:.2f} | {line['peak']:.2f} | {ratio:.2f}"

    print_table("weights, checkpointing, row | planned GiB | peak GiB | ratio", lines, figures)


def print_rows(lines: list[dict], machine: dict) -> None:
    def figures(line):
        return f"{line['rows']} | {line['planned']:.2f} | {line['peak']:.2f}"

    print_table("card | rows a batch | planned GiB | peak GiB", lines, figures)


def print_encoding(lines: list[dict], machine: dict) -> None:
    for line in lines:
        if "error" in line:
            print(line["error"])
            continue
        one, batched = (statistics.median(line[name]) for name in ("one_by_one", "batched"))
        print(f"{line['audio'] / one:,.0f} × real time, in batches {line['audio'] / batched:,.0f}:")
        print(f"{one / batched:.1f} times; {line['same']:,} of {line['codes']:,} codes the same")


TABLES = {
    "machine": print_machine,
    "speed": print_speed,
    "rows": print_rows,
    "encode": print_encoding,
    "memory": print_memory,
}


def measure_here(lines: list[dict], results: Path) -> None:
    """The processes of MEASURE: measures lines, and writes each as soon as it is done."""
    single = {"machine": measure_machine, "encode": measure_encoding}.get(lines[0]["table"])
    for line in map(single, lines) if single else measure(lines):
        add_result(results, line)


def main() -> None:
    if sys.argv[1:2] == [MEASURE]:
        measure_here(json.loads(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)}; all of them if none")
    parser.add_argument("--shape", choices=["demo", "orpheus-3b"], default="orpheus-3b")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--steps", type=int, default=4, help="in a window")
    parser.add_argument("--windows", type=int, default=3, help="whose median is the result")
    parser.add_argument("--clips", type=int, default=200, help="to encode")
    parser.add_argument("--results", type=Path, default=WORK / "results.jsonl")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - TABLES.keys():
        parser.error(f"no table {min(unknown)}")
    deadline = time.monotonic() + 60 * arguments.minutes
    os.chdir(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    lines = make_lines(arguments, make_models(arguments.shape))
    missing = [line for line in lines if line_key(line) not in read_results(arguments.results)]
    groups = {}
    for line in missing:
        groups.setdefault(process_key(line), []).append(line)
    finished = all(run_process(group, arguments.results, deadline) for group in groups.values())
    results = read_results(arguments.results)
    measured = [results[line_key(line)] for line in lines if line_key(line) in results]
    machine = next((line for line in measured if line["table"] == "machine"), None)
    for table, show in TABLES.items():
        if machine and (of_table := [line for line in measured if line["table"] == table]):
            print()
            show(of_table, machine)
    if not finished:
        print(f"\n{len(lines) - len(measured)} of {len(lines)} lines are missing: the time was up")


if __name__ == "__main__":
    run(main)
