"""Failures, silence, the judges and what they are given, and the choice of a candidate."""

import csv
import re
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import soxr
import torch
from speaking import SHORT, say

import orpheus.scoring
from orpheus.audio import read_audio
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


def test_missing_judges_are_named_with_their_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: None)
    say(monkeypatch, "seven", *SHORT, "--score", "--out", tmp_path / "a.wav")
    printed = capsys.readouterr().out
    assert "scores   silence, pace; not: wer, cer (pip install faster-whisper jiwer)" in printed
    assert re.search(r"\n +silence \d\.\d\d\n", printed)  # no pace: the base's is not known


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


@pytest.mark.parametrize("better", [0, 1])
@pytest.mark.parametrize("judge", ["wer", "embed", "mos"])
def test_the_candidate_that_judges_prefer_is_kept(
    tmp_path, monkeypatch, capsys, two_lines, judge, better
):
    """One judge prefers one of two candidates of each text, the others find them equal."""
    worse, best = {"wer": (0.25, 0.0), "embed": ([1, 0], [0.6, 0.8]), "mos": MOS}[judge]
    answers = {"wer": [0.25], "embed": [[1, 0]], "mos": MOS[:1]}
    answers[judge] = [best if n == better else worse for n in (0, 1, 0, 1)] + [best]
    answers["embed"] = [[1, 0], [0, 1], *answers["embed"]]  # the recordings come first
    mock_judges(monkeypatch, **answers)
    say(monkeypatch, *two_lines, "--best_of", "2", "--score", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count(f"kept candidate {better + 1} of 2, 0 failed\n") == 2
    scores = {"wer": "0.25", "embed": "0.71", "mos": "3.00"}
    scores[judge] = {"wer": "0.00", "embed": "0.99", "mos": "4.00"}[judge]
    line = "wer {wer}, cer 0.12, likeness {embed}, mos {mos}\n".format(**scores)
    assert printed.count(line) == 2
    say(monkeypatch, *two_lines, "--out", tmp_path / "first")
    wavs = [(tmp_path / folder / "001.wav").read_bytes() for folder in ("first", ".")]
    assert (wavs[0] == wavs[1]) == (better == 0)


def test_what_judges_are_given(tmp_path, monkeypatch, capsys, two_lines):
    mocks, calls = mock_judges(monkeypatch, wer=[0.5], embed=[[1, 0]], mos=MOS)
    say(monkeypatch, *two_lines, "--score", "--whisper", "a/model", "--out", tmp_path / "said")
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first[:6] == ["scores", "silence,", "pace,", "wer,", "cer,", "likeness,"]
    assert first[6:] == ["mos;", "not:", "distillmos", "(pip", "install", "distillmos)"]
    wavs = [tmp_path / f"said/{n:03}.wav" for n in (1, 2)]
    generated = [read_audio(wav)[0] for wav in wavs]
    at_16_khz = [soxr.resample(audio, 24_000, 16_000) for audio in generated]

    mocks["faster_whisper"].WhisperModel.assert_called_once_with("a/model", compute_type="int8")
    for sound, expected in zip(arguments_of(calls["transcribe"]), at_16_khz, strict=True):
        assert not sound[:8000].any() and not sound[-8000:].any()  # half a second
        assert abs(sound[8000:-8000] - expected).max() < 1e-3
    pair = ("7 5 5 6", "7 5 6")  # no tag, no marks, every digit a word
    assert [call.args for call in calls["wer"]] == [pair] * 2
    assert [call.args for call in mocks["jiwer"].cer.call_args_list] == [pair] * 2
    for sound, expected in zip(arguments_of(calls["mos"]), at_16_khz, strict=True):
        assert abs(sound - expected).max() < 1e-3
    assert all(call.kwargs == {"sr": 16_000} for call in calls["mos"])
    recordings = [read_audio(tmp_path / f"{n}.wav")[0] for n in (0, 1)]
    embedded = arguments_of(calls["embed"])
    for sound, expected in zip(embedded, [*recordings, *generated], strict=True):
        assert abs(sound - expected).max() < 1e-3
    resampled = mocks["resemblyzer"].preprocess_wav.call_args_list
    assert [call.kwargs for call in resampled] == [{"source_sr": 24_000}] * 4


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
