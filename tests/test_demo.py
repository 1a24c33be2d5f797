"""The demo's voices, by losses, ends, lengths and codes; bench_voice.py has Whisper judge them."""

import csv
import json
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT

from data import prepare
from orpheus.checks import held_out_metrics
from orpheus.clips import read_clips
from orpheus.codec import load_codec
from orpheus.models import load_model, load_tokenizer
from orpheus.runs import SAVED_CONFIG
from orpheus.settings import read_settings
from orpheus.tokens import SAMPLE_RATE, ids_to_codes, read_speech_ids
from orpheus.voice import load_voice

sys.path.insert(0, str(ROOT / "data/demo"))
import make_demo

BASE_LOSS, TUNED_LOSS = 5.0, 0.1  # on held-out slt rows; guessing is 7.6
TEXTS = make_demo.test_texts(20, 20)


def seconds_a_word():
    """(fastest, slowest) of the recordings in data/numbers."""
    with open(ROOT / "data/numbers/metadata.csv") as file:
        paces = [
            soundfile.info(ROOT / "data/numbers" / row["file_name"]).duration
            / len(row["text"].split())
            for row in csv.DictReader(file)
        ]
    return min(paces), max(paces)


def check_texts(folder, voice):
    """Every held-out text must end by itself, at a pace near those of the recordings."""
    fastest, slowest = seconds_a_word()
    speaker = load_voice(folder, codec="data/demo/codec", voice=voice, max_seconds=6.0)
    for speech in speaker.speak(TEXTS):
        pace = len(speech.audio) / SAMPLE_RATE / len(speech.text.split())
        assert speech.ended, (voice, speech.text)
        assert fastest * 0.7 < pace < slowest * 1.4, (voice, speech.text, pace)


@pytest.mark.parametrize("voice", ["rms", "awb", "kal16"])
def test_the_base_speaks_its_voices(voice):
    check_texts(ROOT / "data/demo/base", voice)


def test_the_new_voice_speaks_and_its_loss_fell(demo_run):
    out, _ = demo_run
    settings = read_settings(out / SAVED_CONFIG)
    check_texts(out, "slt")
    tokenizer = load_tokenizer(Path(settings.model))
    codec = load_codec(settings.codec)
    ids = read_speech_ids(tokenizer, codec.codebook_size)
    _, held, _ = prepare.make_rows(read_clips(settings), settings, tokenizer)
    assert len(held) >= 4
    models = [load_model(str(folder))[0] for folder in (settings.model, out)]
    losses = [held_out_metrics(model, held, ids)["eval_loss"] for model in models]
    assert losses[0] > BASE_LOSS and losses[1] < TUNED_LOSS, losses
    texts, right = [row["text"] for row in held], 0  # it was not trained on these
    speeches = load_voice(out).speak(texts)
    for row, codes in zip(held, (speech.parts[0].codes for speech in speeches), strict=True):
        recorded = ids_to_codes(row["labels"][row["labels"] != -100][:-2], ids)
        common = min(len(codes), len(recorded))
        same = (codes[:common] == recorded[:common]).mean() > 0.9
        right += same and abs(len(codes) - len(recorded)) < 2  # the silent end may differ
    assert right >= len(held) - 1, (right, len(held))


def test_the_texts_were_in_no_training():
    with open(ROOT / "data/numbers/metadata.csv") as file:
        trained = {row["text"] for row in csv.DictReader(file)}
    assert len(trained) > 80 and not trained & set(TEXTS)
    assert all(make_demo.held_out(text) for text in TEXTS)
    assert not any(make_demo.held_out(text) for text in make_demo.training_texts(0, 500))
    assert json.loads((ROOT / "data/demo/codec/config.json").read_text()) == make_demo.CODEC
