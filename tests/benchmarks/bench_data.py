"""How fast clips become rows, and in how much memory: prepare.py against a plain loop, same run.

    python tests/benchmarks/bench_data.py  # 100, 1,000 and 10,000 clips: half an hour
    python tests/benchmarks/bench_data.py 100 1000

Needs flite. 300 clips of five seconds are spoken; further ones repeat these at other levels, so
that every file is different. The plain loop reads, resamples and encodes one clip at a time, as
notebooks do, once with torch's default number of threads and once with one thread. It stops after
a minute. Every line is a process of its own. Start-up (Python, imports, tokenizer, codec) is
counted separately, CPU is processor time, and memory is the peak.
"""

import csv
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MAX_SPOKEN = 300  # clips; the others repeat them
MAX_PLAIN = 60  # seconds of the plain loop


def speak_clips(folder: Path, count: int) -> None:
    """Writes `count` different clips of flite's kal16, at its own 16 kHz, and metadata.csv."""
    import soundfile

    folder.mkdir(parents=True)
    spoken, rows = [], [("file_name", "text", "speaker")]
    for words in itertools.islice(itertools.product(DIGITS, repeat=4), 7, 9999, 9999 // MAX_SPOKEN):
        text = " ".join(4 * words)
        command = ["flite", "-voice", "kal16", "-t", text, "-o", str(folder / "part")]
        subprocess.run(command, check=True)
        spoken.append((text, *soundfile.read(folder / "part")))
        if len(spoken) == count:
            break
    for n in range(count):
        text, audio, rate = spoken[n % len(spoken)]
        soundfile.write(folder / f"{n}.wav", audio * (1 - 0.02 * (n // len(spoken))), rate)
        rows.append((f"{n}.wav", text, "kal16"))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def plain_loop(folder: str, threads: str) -> tuple[int, float, float, float]:
    """(clips, seconds of audio, seconds spent, CPU seconds) of a loop as notebooks have it."""
    import soundfile
    import soxr
    import torch
    from snac import SNAC

    if threads != "own":
        torch.set_num_threads(int(threads))
    codec, codes, length = SNAC.from_pretrained("data/demo/codec"), [], 0.0
    started, cpu = time.perf_counter(), time.process_time()
    with open(Path(folder, "metadata.csv")) as file:
        for row in csv.DictReader(file):
            audio, rate = soundfile.read(Path(folder, row["file_name"]), dtype="float32")
            audio = soxr.resample(audio, rate, 24_000)
            with torch.inference_mode():
                codes.append(codec.encode(torch.from_numpy(audio)[None, None]))
            length += len(audio) / 24_000
            if time.perf_counter() - started > MAX_PLAIN:
                break
    return len(codes), length, time.perf_counter() - started, time.process_time() - cpu


def prepare_all(folder: str, cache: str) -> tuple[int, float, float, float]:
    """(clips, seconds of audio, seconds spent, CPU seconds): rows and report by prepare.py."""
    from data import prepare
    from orpheus.clips import read_clips
    from orpheus.codec import load_codec
    from orpheus.models import load_tokenizer
    from orpheus.settings import read_settings

    keys = {"dataset": folder, "cache_dir": cache, "leave_out": "[]"}
    settings = read_settings("data/demo/config.json", keys)
    tokenizer = load_tokenizer(Path(settings.model))
    load_codec(settings.codec)  # torch and snac are start-up, as they are in the loop
    started, cpu = time.perf_counter(), time.process_time()
    *_, report = prepare.make_rows(read_clips(settings), settings, tokenizer)
    spent = time.perf_counter() - started, time.process_time() - cpu
    return report.clips, report.seconds, *spent


def measure(*words: str) -> list[str]:
    """A line of the table."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    whole = time.perf_counter() - started
    clips, length, spent, cpu = map(float, line.split())
    memory = usage.ru_maxrss / 1024  # MiB
    cells = (clips, whole - spent, spent, clips / spent, length / spent, 1000 * cpu / clips, memory)
    return [f"{cell:.{digits}f}" for cell, digits in zip(cells, (0, 1, 1, 1, 0, 1, 0), strict=True)]


def main() -> None:
    modes = {"--plain": plain_loop, "--prepare": prepare_all}
    if sys.argv[1:2] and sys.argv[1] in modes:
        print(*modes[sys.argv[1]](*sys.argv[2:]))
        return
    counts = [int(word) for word in sys.argv[1:]] or [100, 1_000, 10_000]
    heads = [
        "clips",
        "",
        "start-up s",
        "s",
        "clips/s",
        "× real time",
        "CPU ms a clip",
        "MiB at most",
    ]
    print("|", " | ".join(heads), "|\n" + "|---" * len(heads) + "|")
    for count in counts:
        with tempfile.TemporaryDirectory() as home:
            speak_clips(Path(home, "set"), count)
            os.symlink(f"{home}/set", f"{home}/other set")
            for name, *words in (
                ("plain loop, torch's threads", "--plain", f"{home}/set", "own"),
                ("plain loop, one thread", "--plain", f"{home}/set", "1"),
                ("prepare.py", "--prepare", f"{home}/set", f"{home}/cache"),
                ("prepare.py, a second time", "--prepare", f"{home}/set", f"{home}/cache"),
                ("prepare.py, in another set", "--prepare", f"{home}/other set", f"{home}/cache"),
            ):
                clips, *cells = measure(*words)
                print("|", " | ".join([clips, name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
