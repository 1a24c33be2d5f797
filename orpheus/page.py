"""A page to compare sounds by ear."""

import base64
import io
import json
from pathlib import Path

import numpy as np

from orpheus.audio import read_audio, to_int16, wav_header
from orpheus.codec import load_codec
from orpheus.files import atomic_file
from orpheus.generation import synthesize
from orpheus.models import device
from orpheus.runs import choose_voice, load_run, load_run_info, overrides
from orpheus.scoring import format_scores, measure
from orpheus.settings import read_text
from orpheus.tokens import SAMPLE_RATE


def draw_mel(audio: np.ndarray) -> bytes:
    """A PNG of the sound: 80 mel bands, 80 dB under the loudest, 94 columns a second."""
    from matplotlib.image import imsave
    from transformers import audio_utils

    bands = audio_utils.mel_filter_bank(513, 80, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE)
    window = audio_utils.window_function(1024, "hann")
    shape = {"frame_length": 1024, "hop_length": 256, "power": 2.0, "log_mel": "dB"}
    mel = audio_utils.spectrogram(audio, window, mel_filters=bands, **shape)
    png = io.BytesIO()
    imsave(
        png, mel, vmin=mel.max() - 80, vmax=mel.max(), cmap="magma", origin="lower", format="png"
    )
    return png.getvalue()


def data_uri(kind: str, raw: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def page_cell(audio: np.ndarray, text: str, pace: float | None, judges) -> dict[str, str]:
    """What page.html shows of one sound."""
    samples = to_int16(audio).tobytes()
    return {
        "audio": data_uri("audio/wav", wav_header(len(samples)) + samples),
        "mel": data_uri("image/png", draw_mel(audio)),
        "scores": format_scores(measure(audio, text, pace, judges)),
    }


def make_page(folder: Path, texts: list[str], recordings: list[Path], arguments, judges) -> None:
    """folder/index.html: each text as recorded and as each --model speaks it, all in one file."""
    with atomic_file(folder / "index.html") as part:  # opened first: it may not be writable
        page = page_html(texts, recordings, arguments, judges)
        part.write_text(page, encoding="utf-8")
    print(f"{folder / 'index.html'}  {len(texts)} texts")


def page_html(texts: list[str], recordings: list[Path], arguments, judges) -> str:
    """The page's text: a column for the recordings, and for each --model."""
    columns = {"recording": [read_audio(clip)[0] for clip in recordings]} if recordings else {}
    pace = None
    for model in arguments.model or [None]:
        run = load_run_info(model, overrides(arguments), config=arguments.config)
        voice, pace = choose_voice(arguments.voice, run), run.pace or pace
        codec = load_codec(run.settings.codec, device())
        loaded = load_run(run)
        lines = synthesize(texts, *loaded, codec, run.settings, voice, run.pace, judges)
        columns[model or str(run.folder)] = [np.concatenate(list(pieces)) for _, pieces in lines]
    lines = [
        {
            "text": text,
            "cells": [page_cell(sounds[n], text, pace, judges) for sounds in columns.values()],
        }
        for n, text in enumerate(texts)
    ]
    page = {"blind": arguments.blind, "columns": list(columns), "lines": lines}
    told = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    return read_text(Path(__file__).with_name("page.html")).replace("PAGE", told, 1)
