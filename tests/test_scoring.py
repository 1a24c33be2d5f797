"""Failures, silence, the judges and what they are given, and the choice of a candidate."""

import csv
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import soxr
import torch
from speaking import SHORT

import orpheus.scoring
from orpheus.scoring import (
    BY_ITSELF,
    CUT_OFF,
    Utterance,
    detect_failure,
    find_judges,
    judge_sound,
    judge_sound_again,
    judge_voice,
    judge_words,
    longest_silence,
    rank,
)


def failure_of(coarse, text="x" * 30, pace=0.07):
    row = Utterance(text, [], 999, frames=[np.array([code, *range(6)]) for code in coarse])
    return detect_failure(row, pace)


def test_loops_and_runaways_are_detected_and_speech_is_not():
    speech = np.random.default_rng(0).integers(0, 50, 48).tolist()
    assert failure_of(speech) == ""
    assert failure_of(speech[:20] + [7] * 23) == "" != failure_of(speech[:20] + [7] * 24)
    assert "loop: 5 frames" in failure_of(speech[:20] + speech[:5] * 5)
    assert "runaway" in failure_of(speech * 3)
    assert failure_of(speech + list(range(90)), pace=None) == ""


def test_silence_is_measured():
    tone = np.sin(np.arange(24_000) / 10).astype(np.float32)
    assert longest_silence(tone) < 0.1
    gap = np.concatenate([tone, np.zeros(36_000, np.float32), tone])
    assert longest_silence(gap) == pytest.approx(1.5, abs=0.05)
    assert longest_silence(np.concatenate([tone, 0.001 * tone])) == pytest.approx(1, abs=0.1)
    assert longest_silence(np.zeros(48_000, np.float32)) > 1.9


JUDGES = ("faster_whisper", "jiwer", "resemblyzer", "speechmos")


MOS = [{"ovrl_mos": 3.0, "sig_mos": 1.0}, {"ovrl_mos": 4.0, "sig_mos": 1.0}]


def mock_judges(monkeypatch, language="en", **answers):
    """Mocks of the judges' packages. What each is asked again and again, it answers in turn."""
    mocks = {name: Mock(__spec__=ModuleSpec(name, None)) for name in JUDGES}
    for name, mock in mocks.items():
        monkeypatch.setitem(sys.modules, name, mock)
    words = [SimpleNamespace(text=text) for text in (" 75.", " 6.")]
    whisper = mocks["faster_whisper"].WhisperModel
    whisper.return_value.transcribe.return_value = words, SimpleNamespace(language=language)
    resemblyzer = mocks["resemblyzer"]
    resemblyzer.preprocess_wav.side_effect = lambda sound, source_sr: sound
    mocks["jiwer"].cer.return_value = 0.125
    asked = {
        "transcribe": whisper.return_value.transcribe,
        "wer": mocks["jiwer"].wer,
        "embed": resemblyzer.VoiceEncoder.return_value.embed_utterance,
        "mos": mocks["speechmos"].dnsmos.run,
    }
    for name, values in answers.items():
        asked[name].side_effect = [*values, *values[-1:] * 9]
    return mocks, {name: mock.call_args_list for name, mock in asked.items()}


def arguments_of(calls):
    return [call.args[0] for call in calls]


@pytest.fixture
def two_lines(tmp_path):
    """lines.csv: a text twice, each with a recording of its own."""
    for n in (0, 1):
        recording = np.sin(np.arange(12_000) / (20 + 10 * n)) / 2
        soundfile.write(tmp_path / f"{n}.wav", recording, 24_000, subtype="FLOAT")
    with open(tmp_path / "lines.csv", "w", newline="") as file:
        rows = [[f"{n}.wav", 'Seven, "five" <laugh> 56!'] for n in (0, 1)]
        csv.writer(file).writerows([["file_name", "text"], *rows])
    words = ["--max_seconds", "3", "--temperature", "0.3", "--voice", "rms"]  # ends by itself
    return ["--file", tmp_path / "lines.csv", *SHORT, *words]


def test_words_of_other_languages_are_not_normalised_as_english(monkeypatch):
    _, calls = mock_judges(monkeypatch, language="de", wer=[0.5])
    judge = judge_words("base", [])
    assert judge(np.zeros(24_000, "f4"), "Seven <sigh> 56!") == {"wer": 0.5, "cer": 0.125}
    assert [call.args for call in calls["wer"]] == [("seven 5 6", "7 5 6")]
    assert judge(np.zeros(24_000, "f4"), "<sigh>") == {}  # no words, so no error rate


def test_sound_over_full_scale_is_clipped_for_dnsmos(monkeypatch):
    _, calls = mock_judges(monkeypatch, mos=MOS)
    loud = 3 * np.sin(np.arange(24_000, dtype="f4") / 10)
    assert judge_sound("base", [])(loud, "") == {"mos": 3.0}
    assert abs(calls["mos"][0].args[0]).max() == 1


def test_the_second_opinion_is_asked_at_16_khz_and_a_judge_that_does_not_load_is_named(monkeypatch):
    asked = []
    opinion = Mock(side_effect=lambda sound: asked.append(sound) or torch.tensor([2.5]))
    mock = Mock(__spec__=ModuleSpec("distillmos", None))
    mock.ConvTransformerSQAModel.return_value.eval.return_value = opinion
    monkeypatch.setitem(sys.modules, "distillmos", mock)
    tone = np.sin(np.arange(24_000, dtype="f4") / 10)
    assert judge_sound_again("base", [])(tone, "") == {"distillmos": 2.5}
    assert np.allclose(asked[0].numpy(), [soxr.resample(tone, 24_000, 16_000)], atol=1e-6)
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: name == "distillmos" or None)
    assert [len(found) for found in find_judges("base", [])] == [1, 2, 3]
    mock.ConvTransformerSQAModel.side_effect = OSError("torchaudio of another torch")
    judges, available, missing = find_judges("base", [])
    assert (judges, available) == ([], ["silence, pace"])
    assert missing[-1] == "distillmos (does not load: torchaudio of another torch)"


def test_silence_has_no_likeness(monkeypatch, tmp_path):
    mock_judges(monkeypatch, embed=[[1.0, 0.0]])
    judge = judge_voice("base", [np.ones(24_000, "f4")])
    assert judge(np.zeros(24_000, "f4"), "") == {}
    assert judge(np.ones(24_000, "f4"), "") == {"likeness": 1.0}


def test_word_errors_outweigh_pace_and_failures_outweigh_word_errors():
    scores = {"good": {"wer": 0.0, "pace": 2.0}, "bad": {"wer": 0.5, "pace": 1.0}}
    row = Utterance("x", [], 9, end=BY_ITSELF)
    ranks = {name: rank(row, {"silence": 0.1} | values) for name, values in scores.items()}
    assert ranks["good"] < ranks["bad"]
    cut = Utterance("x", [], 9, end=CUT_OFF)
    assert rank(cut, {"silence": 0.1, "wer": 0.0}) > ranks["bad"]
    assert rank(row, {"silence": 2.0, "wer": 0.0}) > ranks["bad"]
