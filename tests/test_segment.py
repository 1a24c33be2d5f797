"""orpheus/segment.py: where speech is, and where it is cut."""

import numpy as np
import pytest
from test_align import use_difflib

from orpheus import segment
from orpheus.recording import Word
from orpheus.segment import KEEP, STEP, choose_cuts, find_speech, make_windows, reject_odd_pace

SECOND = 16_000 / STEP


@pytest.fixture(autouse=True)
def without_packages(monkeypatch):
    use_difflib(monkeypatch)


def steps(*runs, seconds):
    """(probabilities, levels) of speech within each (start, end) and silence elsewhere."""
    values = np.zeros(round(seconds * SECOND))
    for start, end in runs:
        values[round(start * SECOND) : round(end * SECOND)] = 1
    return values, 60 * values - 80


def sentences(*lengths, pause=0.5, text="Seven two nine."):
    """(speech, heard): a run for each length, and its words spread over it."""
    speech, heard, at = [], [], pause
    for length in lengths:
        speech.append((at, at + length))
        words = text.split()
        times = np.linspace(at, at + length, len(words) + 1).tolist()
        heard += [Word(times[n], times[n + 1], f" {word}") for n, word in enumerate(words)]
        at += length + pause
    return np.array(speech), heard


def lengths(segments):
    return [round(s.end - s.start, 1) for s in segments]


def test_speech_is_found_to_a_step():
    runs = [(1, 3), (3.5, 4), (6, 6.4)]
    found = find_speech(*steps(*runs, seconds=8))
    assert np.abs(found - runs).max() < STEP / 16_000


def test_closures_and_clicks_are_no_pauses_and_no_speech():
    found = find_speech(*steps((1, 2), (2.08, 3), (5, 5.06), seconds=6))
    assert found.shape == (1, 2) and np.abs(found - [(1, 3)]).max() < 0.05


def test_speech_needs_one_probability_over_a_half_and_ends_under_a_third():
    weak = np.full(100, 0.4)
    assert len(find_speech(weak, weak)) == 0
    weak[50] = 0.6
    assert find_speech(weak, weak).tolist() == [[0, 100 * STEP / 16_000]]


def test_speech_that_is_noticed_late_starts_where_it_is_loud():
    probabilities, _ = steps((1, 3), (4, 6), seconds=7)
    _, levels = steps((0.8, 3), (3.1, 6), seconds=7)
    found = find_speech(probabilities, levels)
    assert abs(found[0, 0] - 0.8) < 0.04
    assert abs(found[1, 0] - 4) < 0.04  # as loud all the time before it: not the voice


def test_no_speech_at_all():
    nothing = find_speech(np.zeros(100), np.zeros(100))
    assert len(nothing) == 0 and make_windows(nothing) == [] and choose_cuts(nothing, []) == []


def test_windows_hold_all_speech_and_end_in_long_pauses():
    rng = np.random.default_rng(0)
    starts = np.cumsum(rng.uniform(2.2, 4, 200))
    speech = np.stack([starts, starts + 2], axis=1)
    windows = np.array(make_windows(speech))
    assert (windows[1:, 0] >= windows[:-1, 1]).all()
    assert (windows[:, 1] - windows[:, 0] <= segment.WINDOW + 2 * KEEP).all()
    for start, end in speech:
        assert ((windows[:, 0] < start) & (end < windows[:, 1])).sum() == 1
    between = windows[1:, 0] - windows[:-1, 1]
    assert np.median(between + 2 * KEEP) > np.median(speech[1:, 0] - speech[:-1, 1])


def test_what_is_too_long_for_a_clip_is_not_transcribed():
    assert make_windows(np.array([(0.0, 60.0), (61.0, 63.0)])) == [(60.8, 63.2)]


def test_short_sentences_are_joined_to_the_lengths_aimed_at():
    segments = choose_cuts(*sentences(*[2.0] * 20))
    assert all(5 <= length <= 12 for length in lengths(segments))
    assert not any(s.reason for s in segments)


def test_a_long_sentence_stays_whole_and_a_longer_one_is_cut_at_a_comma():
    speech, heard = sentences(6, 6, 6, text="Seven two nine,")
    heard[-1] = heard[-1]._replace(text=" nine.")
    assert lengths(choose_cuts(speech, heard)) == [19.4]
    speech, heard = sentences(6, 6, 6, 6, text="Seven two nine")
    heard[5] = heard[5]._replace(text=" nine,")
    assert lengths(choose_cuts(speech, heard)) == [12.9, 12.9]


def test_a_clip_keeps_some_silence_and_half_of_a_short_pause():
    (first, second) = choose_cuts(*sentences(8, 8, pause=0.3))
    assert (first.start, round(first.end, 3)) == (pytest.approx(0.1), 8.45)
    assert (round(second.start, 3), round(second.end, 3)) == (8.45, 16.8)


def test_nothing_is_cut_within_a_word():
    speech = np.array([(0.5, 7.0), (7.2, 14.0)])
    heard = [Word(0.5, 6.5, " Seven"), Word(6.6, 7.5, " seventy."), Word(7.6, 14.0, " nine.")]
    assert lengths(choose_cuts(speech, heard)) == [13.9]


def test_abbreviations_end_no_sentence():
    words = [Word(0, 1, f" {word}") for word in ["Mr.", "Smith", "left.", "He", "is", "gone."]]
    ends = segment.find_sentence_ends(words, "en")
    assert ends.tolist() == [False, False, True, False, False, True]


def test_reasons_of_rejection():
    _, heard = sentences(6, pause=1)

    def reason(end=6, heard=heard, given=None, gap=0.5, max_cer=0.1):
        return segment.judge(0, end, heard, given, gap, max_cer).reason

    assert reason() == ""
    assert reason(end=1) == "too short"
    assert reason(end=21) == "too long without a pause"
    assert reason(heard=[]) == "no words heard"
    assert reason(gap=1) == "speech without words"
    unsure = [word._replace(score=0.5) for word in heard]
    assert reason(heard=unsure) == "low confidence"
    assert reason(heard=unsure, given=heard) == ""
    assert reason(given=[]) == "not in the text"
    other = [*heard[:2], heard[2]._replace(text=" five.")]
    assert reason(given=other) == "words differ from the text"
    assert reason(given=other, max_cer=0.2) == ""
    judged = segment.judge(0, 6, heard, other, 0.5, 0.1)
    assert judged.cer == pytest.approx(2 / 12) and judged.text == "Seven two five."


def test_speech_without_words_is_rejected():
    speech, heard = sentences(*[5.0] * 4, text="Seven two nine four five.")
    missing = [word for n, word in enumerate(heard) if n not in (7, 8)]
    segments = choose_cuts(speech, missing)
    assert [s.reason for s in segments if s.reason] == ["speech without words"]
    assert sum(s.end - s.start for s in segments if s.reason) < 6
    given = choose_cuts(speech, missing, heard, max_cer=0.5)
    assert not any(s.reason for s in given)


def test_speech_that_is_not_in_the_text_is_parted_from_what_is():
    speech, heard = sentences(*[3.0] * 8)
    given = heard[6:]  # the first two sentences are an announcement
    segments = choose_cuts(speech, heard, given)
    rejected = [s for s in segments if s.reason]
    assert {s.reason for s in rejected} == {"not in the text"}
    assert " ".join(s.heard for s in rejected) == "Seven two nine. Seven two nine."
    assert sum(len(s.text.split()) for s in segments if not s.reason) == len(given)


def test_an_odd_pace_is_rejected():
    usual = [segment.Segment(0, 8 + n / 10, "Seven " * 15, "", None, "") for n in range(12)]
    slow = segment.Segment(0, 18, "Seven", "", None, "")
    judged = reject_odd_pace([*usual, slow])
    assert [s.reason for s in judged] == [""] * 12 + ["odd pace"]
