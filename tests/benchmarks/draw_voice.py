"""Draws a recording, its codec round trip and the fine-tuned voice side by side, for the README.

python tests/benchmarks/draw_voice.py  # data/demo/voice.png, from what `make demo` left
"""

import csv
import sys
from pathlib import Path

from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from orpheus.audio import read_audio  # noqa: E402
from orpheus.codec import decode, encode  # noqa: E402
from orpheus.voice import load_voice  # noqa: E402

MODEL, CLIP = ROOT / "outputs/demo", 0


def main() -> None:
    with open(ROOT / "data/numbers/metadata.csv") as file:
        row = list(csv.DictReader(file))[CLIP]
    voice = load_voice(MODEL, voice=row["speaker"])
    recording = read_audio(ROOT / "data/numbers" / row["file_name"])[0]
    sounds = {
        "recording": recording,
        "through the codec": decode(voice.codec, encode(voice.codec, [recording])[0]),
        "spoken by the fine-tuned model": voice.say(row["text"]),
    }
    figure, plots = pyplot.subplots(1, 3, figsize=(12, 2.6), sharey=True, layout="constrained")
    for plot, (name, audio) in zip(plots, sounds.items(), strict=True):
        plot.specgram(audio + 1e-7, NFFT=512, noverlap=384, Fs=24_000, vmin=-120, vmax=-30)
        plot.set(title=name, xlabel="seconds", ylim=(0, 8000), xlim=(0, len(audio) / 24_000))
    plots[0].set_ylabel("Hz")
    figure.savefig(ROOT / "data/demo/voice.png", dpi=70)
    print(f"data/demo/voice.png: {row['text']!r}")


if __name__ == "__main__":
    main()
