"""The whole path at Orpheus-3B's size on a CPU, with random weights: minutes and memory. A table.

    python tests/benchmarks/true_size.py  # some twenty minutes on two cores, 10 GB of disk

Trains three steps over 4-bit weights, is killed after the second and resumed, speaks, and merges.
Random weights say nothing about a voice: this shows that every stage works at this size, in how
much memory.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench_gpu import make_models  # noqa: E402

WORK = ROOT / "outputs" / "true_size"
TRAINING = {
    "backend": "transformers",
    "weights": "4bit",
    "bf16": "false",  # many CPUs have no instructions for it, and take ten times as long
    "gradient_checkpointing": "true",
    "optim": "adamw_torch_fused",
    "dataset": "data/numbers",
    "limit": "4",
    "held_out": "0",
    "max_length": "512",
    "max_steps": "3",
    "save_steps": "1",
    "sample_texts": '["one"]',
    "max_seconds": "0.3",
    "report_to": "none",
}


def run(stage: str, *words: str, kill_at: str | None = None) -> None:
    """Runs a command, prints its minutes and peak memory, and ends with its error if it fails.

    It is killed as soon as it prints a line that begins with `kill_at`.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        print(f"    {line.rstrip()}", file=sys.stderr, flush=True)
        if kill_at and re.match(kill_at, line):
            process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    print_stage(stage, started, usage)
    if os.waitstatus_to_exitcode(status) != (-signal.SIGKILL if kill_at else 0):
        sys.exit(f"{stage} failed: {' '.join(words)}")


def print_stage(stage: str, started: float, usage) -> None:
    minutes, peak = (time.perf_counter() - started) / 60, usage.ru_maxrss / 2**20
    print(f"| {stage} | {minutes:.1f} | {peak:.1f} |", flush=True)


def main() -> None:
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    started = time.perf_counter()
    paths = make_models("orpheus-3b")
    print("| stage | minutes | peak RSS, GiB |\n|---|---|---|")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"| random weights | {(time.perf_counter() - started) / 60:.1f} | {peak:.1f} |", flush=True
    )
    out = str(WORK / "run")
    keys = TRAINING | paths | {"output_dir": out}
    words = [
        "finetune.py",
        *(word for name, value in keys.items() for word in (f"--{name}", value)),
    ]
    run("train, killed in step 3", *words, kill_at=r"step +2/3")
    run("resume", *words, "--resume")
    run(
        "speak",
        "infer.py",
        "one",
        "--model",
        out,
        "--max_seconds",
        "0.3",
        "--out",
        f"{out}/one.wav",
    )
    run("merge", "-m", "orpheus.merge", out, str(WORK / "merged"))


if __name__ == "__main__":
    main()
