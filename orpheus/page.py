"""Makes a page to compare voices by ear: each text as recorded and as each model speaks it.

python -m orpheus.page lines.txt --model outputs/a --model outputs/b --blind --out page

The page is one file, page/index.html, with the sounds in it. With a metadata.csv in place of
lines.txt, its recordings are the first column.
"""

import argparse
import base64
import io
import json
from pathlib import Path

import numpy as np

from orpheus.audio import read_audio, to_int16, wav_header
from orpheus.files import atomic_file
from orpheus.options import Parser, overrides, read_texts
from orpheus.settings import read_text, run
from orpheus.tokens import SAMPLE_RATE


def draw_mel(audio: np.ndarray) -> bytes:
    """A PNG of (samples,) audio: 80 mel bands, 80 dB under the loudest, 94 columns a second."""
    from matplotlib.image import imsave
    from transformers import audio_utils

    bands = audio_utils.mel_filter_bank(513, 80, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE)
    window = audio_utils.window_function(1024, "hann")
    shape = {"frame_length": 1024, "hop_length": 256, "power": 2.0, "log_mel": "dB"}
    mel = audio_utils.spectrogram(audio, window, mel_filters=bands, **shape)
    png, colours = io.BytesIO(), {"cmap": "magma", "origin": "lower", "format": "png"}
    imsave(png, mel, vmin=mel.max() - 80, vmax=mel.max(), **colours)
    return png.getvalue()


def data_uri(kind: str, raw: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def page_cell(audio: np.ndarray, text: str, pace: float | None, judges) -> dict[str, str]:
    """What page.html shows of one sound: a player, a mel spectrogram and scores."""
    from orpheus.scoring import format_scores, measure

    samples = to_int16(audio).tobytes()
    return {
        "audio": data_uri("audio/wav", wav_header(len(samples)) + samples),
        "mel": data_uri("image/png", draw_mel(audio)),
        "scores": format_scores(measure(audio, text, pace, judges)),
    }


def speak_column(
    model: str | None, texts: list[str], arguments, judges
) -> tuple[str, list[np.ndarray], float | None]:
    """(name of the column, the samples of each text, the voice's pace) of one --model."""
    from orpheus.codec import load_codec
    from orpheus.generation import synthesize
    from orpheus.models import device
    from orpheus.run_info import choose_voice, load_run, load_run_info

    info = load_run_info(model, overrides(arguments), config=arguments.config)
    voice = choose_voice(arguments.voice, info)
    codec = load_codec(info.settings.codec, device())
    speaker = load_run(info)
    lines = synthesize(texts, *speaker, codec, info.settings, voice, info.pace, judges)
    sounds = [np.concatenate(list(pieces)) for _, pieces in lines]
    return model or str(info.folder), sounds, info.pace


def make_page(texts: list[str], recordings: list[Path], arguments, judges) -> str:
    """page.html with a column for the recordings, if there are any, and for each --model."""
    columns, pace = {}, None
    if recordings:
        columns["recording"] = [read_audio(path)[0] for path in recordings]
    for model in arguments.model or [None]:
        name, columns[name], own_pace = speak_column(model, texts, arguments, judges)
        pace = own_pace or pace
    lines = [
        {
            "text": text,
            "cells": [page_cell(sounds[n], text, pace, judges) for sounds in columns.values()],
        }
        for n, text in enumerate(texts)
    ]
    page = {"blind": arguments.blind, "columns": list(columns), "lines": lines}
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    return read_text(Path(__file__).with_name("page.html")).replace("PAGE", data, 1)


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="texts, one a line; or a metadata.csv")
    words = "adapter, checkpoint, merged folder or hub id; may be given several times"
    parser.add_argument("--model", metavar="…", action="append", help=words)
    parser.add_argument("--out", metavar="FOLDER", default="page", help="folder (page)")
    words = "shuffle the columns of each line and hide their names until a click"
    parser.add_argument("--blind", action="store_true", help=words)
    parser.add_scoring_options()
    parser.add_run_options()
    return parser.parse_options()


def main() -> None:
    arguments = read_arguments()
    texts, recordings = read_texts([], arguments.file)
    path = Path(arguments.out) / "index.html"
    with atomic_file(path) as part:  # opened first: it may not be writable
        from orpheus.scoring import load_judges

        judges = load_judges(arguments.whisper or "base", recordings) if arguments.score else None
        part.write_text(make_page(texts, recordings, arguments, judges), encoding="utf-8")
    print(f"{path}  {len(texts)} texts")


if __name__ == "__main__":
    run(main)
