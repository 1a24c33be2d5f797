"""Failures, silence, the judges and what they are given, and the choice of a candidate."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import soxr

import orpheus.scoring
from orpheus.scoring import (
    BY_ITSELF,
    CUT_OFF,
    detect_failure,
    judge_sound,
    judge_voice,
    judge_words,
    load_judges,
    longest_silence,
    measure,
    rejection_reason,
)
from orpheus.settings import UserError


def failure_of(coarse, text="x" * 30, pace=0.07):
    return detect_failure(np.array([[code, *range(6)] for code in coarse]), text, pace)


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


def test_missing_judges_are_named_with_their_packages(monkeypatch):
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: None)
    judges, missing = load_judges("base", [])
    assert judges == [] and missing[0] == "word errors (pip install faster-whisper jiwer)"
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: name)
    monkeypatch.setattr(orpheus.scoring, "JUDGES", {"likeness": orpheus.scoring.JUDGES["likeness"]})
    assert load_judges("base", []) == ([], ["likeness (needs recordings of the voice)"])


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


def test_what_judges_are_given(tmp_path, monkeypatch):
    mocks, calls = mock_judges(monkeypatch, wer=[0.5], embed=[[1, 0], [0.6, 0.8]], mos=MOS)
    recording, spoken = (np.sin(np.arange(12_000, dtype="f4") / n) / 2 for n in (20, 30))
    soundfile.write(tmp_path / "a.wav", recording, 24_000, subtype="FLOAT")
    judges, missing = load_judges("a/model", [tmp_path / "a.wav"])
    scores = measure(spoken, 'Seven, "five" <laugh> 56!', 0.05, judges)
    assert missing == [] and [*scores] == ["silence", "pace", "wer", "cer", "likeness", "mos"]
    assert scores["likeness"] == pytest.approx(0.6) and scores["pace"] == pytest.approx(0.4)
    at_16_khz = soxr.resample(spoken, 24_000, 16_000)
    mocks["faster_whisper"].WhisperModel.assert_called_once_with("a/model", compute_type="int8")
    (sound,) = arguments_of(calls["transcribe"])
    assert not sound[:8000].any() and not sound[-8000:].any()  # half a second
    assert abs(sound[8000:-8000] - at_16_khz).max() < 1e-6
    pair = ("7 5 5 6", "7 5 6")  # no tag, no marks, every digit a word
    assert calls["wer"][0].args == mocks["jiwer"].cer.call_args.args == pair
    assert abs(arguments_of(calls["mos"])[0] - at_16_khz).max() < 1e-6
    assert calls["mos"][0].kwargs == {"sr": 16_000}
    for sound, expected in zip(arguments_of(calls["embed"]), [recording, spoken], strict=True):
        assert abs(sound - expected).max() < 1e-6
    resampled = mocks["resemblyzer"].preprocess_wav.call_args_list
    assert [call.kwargs for call in resampled] == [{"source_sr": 24_000}] * 2


def test_a_whisper_that_cannot_be_had_is_told_and_one_that_was_asked_for_is_an_error(monkeypatch):
    mocks, _ = mock_judges(monkeypatch)
    mocks["faster_whisper"].WhisperModel.side_effect = OSError("no network")
    judges, missing = load_judges(None, [])
    assert len(judges) == 1 and missing[0].startswith("word errors (--whisper base is neither")
    with pytest.raises(UserError, match="--whisper tiny is neither a folder"):
        load_judges("tiny", [])


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


def test_silence_has_no_likeness(monkeypatch, tmp_path):
    mock_judges(monkeypatch, embed=[[1.0, 0.0]])
    soundfile.write(tmp_path / "a.wav", np.full(24_000, 0.5), 24_000)
    judge = judge_voice("base", [tmp_path / "a.wav"])
    assert judge(np.zeros(24_000, "f4"), "") == {}
    assert judge(np.ones(24_000, "f4"), "") == {"likeness": 1.0}


def test_why_speech_is_rejected():
    assert rejection_reason(BY_ITSELF, {"silence": 0.1, "pace": 0.5}) == ""
    assert rejection_reason(CUT_OFF, {"silence": 0.1}) == CUT_OFF
    assert rejection_reason(BY_ITSELF, {"silence": 2.0}) == "silence of 2.0 s"
    assert "too short: 0.30" in rejection_reason(BY_ITSELF, {"silence": 0.1, "pace": 0.3})
