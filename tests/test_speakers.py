"""orpheus/speakers.py: texts, recordings of a run's dataset, and models that speak once."""

import json

import numpy as np
import pytest
import soundfile
from clip_folders import folder_of, noise
from conftest import change

import orpheus.run_info
from orpheus.audio import read_audio
from orpheus.run_info import load_run_info
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.speakers import (
    Line,
    decoded,
    read_corpus,
    read_general,
    read_wavs,
    recorded,
    spoken,
    spread,
)

SHORT = {"max_seconds": "0.3", "temperature": "5"}  # so that seeds differ


def test_general_texts_have_every_kind_and_every_tag_of_the_corpus():
    lines = read_general({"<laugh>", "<hum>"})
    kinds = list(dict.fromkeys(line.kind for line in lines))
    assert kinds == ["sentences", "short words", "numbers", "questions", "tags"]
    assert len({line.text for line in lines}) == len(lines)
    assert [line.text for line in lines if "<hum>" in line.text] == [lines[-1].text]
    assert sum("<laugh>" in line.text for line in lines) == 1
    assert all("<" in line.text for line in lines if line.kind == "tags")
    assert not any(digit in line.text for line in lines for digit in "0123456789")


def test_a_selection_is_spread():
    assert spread([1, 2], 3) == [1, 2]
    assert spread(list(range(10)), 3) == [0, 3, 6]


@pytest.fixture
def corpus_run(adapter, tmp_path):
    """A RunInfo of a dataset with two voices, a held-out text and clips that are left out."""
    texts = ["seven", "two <hum> four", "nine", "one", "four", "six"]
    voices = ["slt", "slt", "rms", "slt", "slt", "slt"]
    for n in range(5):
        noise(tmp_path / f"{n}.wav", seed=n)
    names = [f"{n}.wav" for n in range(6)]  # the last does not exist, and was left out for it
    folder_of(tmp_path, zip(names, texts, voices, strict=True))
    change(adapter / SAVED_CONFIG, dataset=str(tmp_path))
    left_out = {"left_out": ["metadata.csv row 7: 5.wav does not exist"]}
    left_out |= {"dropped": ["metadata.csv row 5: 9,999 tokens, 99.0 s"]}
    change(adapter / SAVED_REPORT, held_out_texts=["two <hum> four", "six"], **left_out)
    return load_run_info(str(adapter), SHORT)


def test_the_corpus_of_a_run(corpus_run, tmp_path):
    corpus = read_corpus(corpus_run, "slt")
    assert corpus.held_out == [Line("two <hum> four", "held-out", tmp_path / "1.wav")]
    assert corpus.references == [tmp_path / "0.wav", tmp_path / "4.wav"]
    assert corpus.others == {"rms": [Line("nine", "held-out", tmp_path / "2.wav")]}
    assert corpus.tags == {"<hum>"}
    assert read_corpus(corpus_run, "rms").others.keys() == {"slt"}


def test_recordings_are_trimmed_and_go_through_the_codec(tmp_path, codec, corpus_run):
    audio = np.concatenate([np.zeros(24_000), np.random.default_rng(0).normal(0, 0.1, 9_000)])
    soundfile.write(tmp_path / "a.wav", audio, 24_000, subtype="FLOAT")
    lines = [Line("seven", "held-out", tmp_path / "a.wav")]
    (sound,) = recorded(lines, corpus_run.settings)
    assert sound.line == lines[0] and (sound.seed, sound.ended) == (None, None)
    assert np.allclose(sound.audio, audio[-len(sound.audio) :], atol=1e-6)
    assert len(sound.audio) == 9_000 + 2_400  # keep_silence
    (through,) = decoded(lines, corpus_run.settings, codec)
    assert len(through.audio) == 6 * 2048


def test_wavs_belong_to_lines_by_their_number(tmp_path):
    noise(tmp_path / "002.wav", seconds=0.25)
    (sound,) = read_wavs([Line("one"), Line("two")], tmp_path)
    assert sound.line == Line("two") and len(sound.audio) == 6_000 and sound.ended is None


def test_what_was_spoken_is_not_spoken_again(corpus_run, codec, tmp_path, monkeypatch):
    lines, loads = [Line("seven two"), Line("nine")], []
    load_run = orpheus.run_info.load_run
    monkeypatch.setattr(
        orpheus.run_info, "load_run", lambda info: loads.append(info) or load_run(info)
    )

    def speak(lines, seeds=2, info=corpus_run, voice="slt"):
        return list(spoken(info, voice, lines, seeds, codec, tmp_path / "spoken"))

    first = speak(lines)
    seed = corpus_run.settings.seed
    assert [(s.line, s.seed) for s in first] == [
        (line, s) for s in (seed, seed + 1) for line in lines
    ]
    assert len(loads) == 1 and all(sound.ended is False for sound in first)  # 0.3 s
    assert not np.array_equal(first[0].audio, first[2].audio)
    again = speak(lines)
    assert len(loads) == 1
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(first, again, strict=True))
    more = speak([lines[0], Line("six"), lines[1]])
    assert len(loads) == 2 and np.array_equal(more[2].audio, first[1].audio)
    (folder,) = (tmp_path / "spoken").iterdir()
    wavs = {path.name for path in folder.glob("*.wav")}
    assert len(wavs) == 6 == len(json.loads((folder / "ended.json").read_text()))
    speak(lines, voice="rms")
    other = load_run_info(str(corpus_run.folder), SHORT | {"max_seconds": "0.2"})
    assert len(speak(lines, info=other)[0].audio) == 2 * 2048  # other settings, other sounds
    assert len(loads) == 4 and len(list((tmp_path / "spoken").iterdir())) == 3


def test_a_sound_is_what_infer_would_say(corpus_run, codec, tmp_path, monkeypatch):
    from speaking import say

    (sound,) = spoken(corpus_run, "slt", [Line("nine")], 1, codec, tmp_path / "spoken")
    words = ["nine", "--model", corpus_run.folder, "--out", tmp_path / "nine.wav"]
    say(monkeypatch, *words, *(f"--{name}={value}" for name, value in SHORT.items()))
    assert np.array_equal(sound.audio, read_audio(tmp_path / "nine.wav")[0])
