"""The demo's voices, judged without ears: losses, ends, lengths. bench_voice.py listens."""

import csv
import json
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT

from data import prepare
from orpheus.clips import read_clips
from orpheus.codec import load_codec
from orpheus.generation import generate
from orpheus.models import load_model, load_tokenizer
from orpheus.runs import SAVED_CONFIG
from orpheus.settings import read_settings
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, ids_to_codes, read_speech_ids
from orpheus.trainer import held_out_metrics

sys.path.insert(0, str(ROOT / "data/demo"))
import make_demo

BASE_LOSS, TUNED_LOSS = 5.0, 0.1  # on held-out slt rows; guessing is 7.6
TEXTS = make_demo.test_texts(20, 20)


def seconds_a_word():
    """(least, most) of the recordings in data/numbers."""
    with open(ROOT / "data/numbers/metadata.csv") as file:
        paces = [
            soundfile.info(ROOT / "data/numbers" / row["file_name"]).duration
            / len(row["text"].split())
            for row in csv.DictReader(file)
        ]
    return min(paces), max(paces)


def says_all(folder, voice, settings):
    """Every held-out string ends by itself, at a pace within the corpus's."""
    model, tokenizer = load_model(str(folder))
    ids = read_speech_ids(tokenizer, load_codec(settings.codec).codebook_size)
    least, most = seconds_a_word()
    for text in TEXTS:
        codes, ended = generate(model, tokenizer, ids, text, settings, voice)
        pace = len(codes) * FRAME_SAMPLES / SAMPLE_RATE / len(text.split())
        assert ended and least * 0.7 < pace < most * 1.4, (voice, text, ended, pace)


@pytest.mark.parametrize("voice", ["rms", "awb", "kal16"])
def test_the_base_speaks_its_voices(voice):
    says_all(ROOT / "data/demo/base", voice, read_settings("data/demo/config.json"))


@pytest.mark.xdist_group("demo")  # one run of it for both
def test_the_new_voice_speaks_and_its_loss_fell(demo_run):
    out, _ = demo_run
    settings = read_settings(out / SAVED_CONFIG)
    says_all(out, "slt", settings)
    tokenizer = load_tokenizer(Path(settings.model))
    codec = load_codec(settings.codec)
    ids = read_speech_ids(tokenizer, codec.codebook_size)
    _, held, _ = prepare.make_rows(read_clips(settings), settings, tokenizer)
    assert len(held) >= 4
    models = [load_model(str(folder))[0] for folder in (settings.model, out)]
    losses = [held_out_metrics(model, held, ids)["eval_loss"] for model in models]
    assert losses[0] > BASE_LOSS and losses[1] < TUNED_LOSS, losses
    right = 0
    for row in held:  # strings it never heard: as the recordings have them, code for code
        codes, _ = generate(models[1], tokenizer, ids, row["text"], settings, "slt")
        told = ids_to_codes(row["labels"][row["labels"] != -100][:-2], ids)
        common = min(len(codes), len(told))  # the silence at a clip's end may be a frame shorter
        right += (codes[:common] == told[:common]).mean() > 0.9 and abs(len(codes) - len(told)) < 2
    assert right >= len(held) - 1, (right, len(held))


def test_the_strings_were_in_no_training():
    with open(ROOT / "data/numbers/metadata.csv") as file:
        spoken = {row["text"] for row in csv.DictReader(file)}
    assert len(spoken) > 80 and not spoken & set(TEXTS)
    assert all(make_demo.held_out(text) for text in TEXTS)
    assert not any(make_demo.held_out(text) for text in make_demo.training_texts(0, 500))
    assert json.loads((ROOT / "data/demo/codec/config.json").read_text()) == make_demo.CODEC
