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


def start(out: Path, words: list[str]) -> subprocess.Popen:
    command = [sys.executable, *RUN.split(), "--output_dir", str(out), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> None:
    told = process.communicate()[0].decode()
    if process.returncode:
        sys.exit(told)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    words = sys.argv[3:] or ["--backend", "transformers"]
    begun = time.time()
    finish(start(folder / "whole", words))
    length = time.time() - begun  # seconds
    draw, done, whole = random.Random(0), 0, 0
    while done < kills:
        torn = folder / f"torn{whole}"
        process = start(torn, [*words, "--resume"])
        try:
            process.wait(draw.uniform(0.3, 0.9) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            steps = sorted(int(p.name[11:]) for p in torn.glob("checkpoint-*"))
            print(f"kill {done}: checkpoints {steps}", flush=True)
            continue
        finish(process)  # it got to its end: begin again, kills still owed
        assert digest(torn) == digest(folder / "whole"), "a resumed run made another adapter"
        whole += 1
    torn = folder / f"torn{whole}"
    finish(start(torn, [*words, "--resume"]))
    assert digest(torn) == digest(folder / "whole"), "a resumed run made another adapter"
    print(f"{kills} kills, the same adapter: {digest(torn)[:16]}")


def digest(out: Path) -> str:
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
