"""How fast clips become codes, and in how much memory: prepare.py against a plain loop, same run.

    python tests/bench_data.py                  # 100, 1,000 and 10,000 clips: ten minutes
    python tests/bench_data.py 100 1000

Needs flite. A thousand clips are spoken; further ones are those at other levels, so that each is
another sound. The plain loop reads, resamples and encodes one clip at a time, with all of torch's
threads, as notebooks do. Every row is a process of its own; memory is the most it held.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data/demo")]
CONFIG = ["--config", "data/demo/config.json", "--leave_out", "[]"]


def speak_clips(folder: Path, count: int) -> float:
    """Writes `count` clips and their metadata.csv; seconds of audio."""
    import make_demo
    import soundfile

    folder.mkdir(parents=True)
    make_demo.WORK.mkdir(parents=True, exist_ok=True)
    texts = make_demo.training_texts(1, min(count, 1000), (2, 8))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        spoken = list(pool.map(lambda text: make_demo.speak("kal16", text), texts))
    rows, samples = [("file_name", "text", "speaker")], 0
    for n in range(count):
        audio = spoken[n % 1000] * (1 - 0.05 * (n // 1000))
        soundfile.write(folder / f"{n}.flac", audio, 24_000)
        rows.append((f"{n}.flac", texts[n % 1000], "kal16"))
        samples += len(audio)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return samples / 24_000


def plain_loop(folder: str) -> None:
    import soundfile
    import soxr

    import infer

    codec = infer.load_codec("data/demo/codec", infer.device())
    rows = []
    with open(Path(folder, "metadata.csv")) as file:
        for row in csv.DictReader(file):
            audio, rate = soundfile.read(Path(folder, row["file_name"]), dtype="float32")
            audio = soxr.resample(audio, rate, 24_000)
            rows.append(infer.encode(codec, [np.asarray(audio, np.float32)])[0])


def measure(words: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, errors.decode()
    return time.perf_counter() - begun, usage.ru_maxrss / 1024


def main() -> None:
    if sys.argv[1:2] == ["--plain"]:
        return plain_loop(sys.argv[2])
    counts = [int(word) for word in sys.argv[1:]] or [100, 1_000, 10_000]
    print(f"{'clips':>7} {'run':<14} {'seconds':>8} {'clips/s':>8} {'× real time':>12} {'MiB':>6}")
    for count in counts:
        with tempfile.TemporaryDirectory() as home:
            length = speak_clips(Path(home, "clips"), count)
            data = ["data/prepare.py", f"{home}/clips", *CONFIG, "--cache_dir", f"{home}/cache"]
            data += ["--output_dir", f"{home}/out"]
            for name, words in (
                ("plain loop", [__file__, "--plain", f"{home}/clips"]),
                ("prepare.py", data),
                ("a second time", data),
            ):
                seconds, memory = measure(words)
                speeds = f"{count / seconds:8.1f} {length / seconds:12.0f}"
                print(f"{count:7} {name:<14} {seconds:8.1f} {speeds} {memory:6.0f}", flush=True)
            report = json.loads(Path(home, "out/data_report.json").read_text())
            assert report["cached"] == report["rows"] == count, report["cached"]


if __name__ == "__main__":
    main()
