"""Kills a run with SIGKILL at random, resumes it, and compares its adapter with an undisturbed one.

python tests/stress_resume.py 20            # kills, by default 20; about 20 s each on two cores
python tests/stress_resume.py 20 /tmp/work --backend unsloth
"""

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = "finetune.py --config data/demo/config.json --overwrite false --limit 24 --max_steps 12"
RUN += " --batching pad --per_device_train_batch_size 4 --save_steps 1 --save_total_limit 3"
RUN += " --sample_steps 6 --sample_texts [] --gradient_checkpointing false --report_to none"


def start(out: Path, options: list[str]) -> subprocess.Popen:
    command = [sys.executable, *RUN.split(), "--output_dir", str(out), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> None:
    """Waits for a run; where it fails, prints what it said and exits."""
    output = process.communicate()[0].decode()
    if process.returncode:
        sys.exit(output)


def hash_adapter(out: Path) -> str:
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    options = sys.argv[3:] or ["--backend", "transformers"]
    started = time.monotonic()
    finish(start(folder / "undisturbed", options))
    seconds = time.monotonic() - started
    expected = hash_adapter(folder / "undisturbed")
    rng, killed, finished = random.Random(0), 0, 0
    while killed < kills or not finished:
        out = folder / f"killed{finished}"
        process = start(out, [*options, "--resume"])
        try:
            process.wait(rng.uniform(0.3, 0.9) * seconds if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            steps = sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))
            print(f"kill {killed}: checkpoints {steps}", flush=True)
            continue
        finish(process)  # it came to its end: the next kills are those of a new run
        assert hash_adapter(out) == expected, "a resumed run made another adapter"
        finished += 1
    print(f"{killed} kills, the same adapter: {expected[:16]}")


if __name__ == "__main__":
    main()
