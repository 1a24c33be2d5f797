"""orpheus/recording.py: long recordings, read in blocks."""

import json
import math

import numpy as np
import pytest
import soundfile
import soxr

from orpheus import recording
from orpheus.recording import (
    SPEECH_RATE,
    STEP,
    Word,
    check_recording,
    choose_gain,
    detect_speech,
    measure_level,
    read_spans,
    resampled_blocks,
    transcribe,
)
from orpheus.settings import UserError


def noise(path, seconds, rate=24_000, channels=1, level=0.1, **how):
    audio = np.random.default_rng(0).normal(0, level, (int(seconds * rate), channels))
    soundfile.write(path, audio, rate, **how)
    return path


def rms_loudness(audio):
    """The mean square of every 400 ms as if it were LUFS, without the filter of BS.1770."""
    size = 9_600
    blocks = [audio[n : n + size] for n in range(0, len(audio) - size + 1, size // 4)]
    return [10 * math.log10(float((block**2).mean()) + 1e-12) for block in blocks]


@pytest.mark.parametrize("seconds", [0.5, 60, 130.37])
def test_blocks_are_the_whole_recording_resampled(tmp_path, seconds):
    path = noise(tmp_path / "a.wav", seconds, 16_000, channels=2)
    blocks = list(resampled_blocks(path, 24_000))
    whole = soxr.resample(soundfile.read(path, dtype="float32")[0].mean(axis=1), 16_000, 24_000)
    assert max(map(len, blocks)) <= 61 * 24_000
    joined = np.concatenate(blocks)
    assert abs(len(joined) - len(whole)) <= 1
    assert np.abs(joined[: len(whole)] - whole[: len(joined)]).max() < 1e-5


@pytest.mark.parametrize("form", ["a.flac", "a.mp3", "a.ogg"])
def test_compressed_recordings_are_as_long_as_they_say(tmp_path, form):
    path = noise(tmp_path / form, 70)
    length = sum(map(len, resampled_blocks(path, SPEECH_RATE))) / SPEECH_RATE
    assert abs(length - check_recording(path)) < 0.1 and abs(length - 70) < 0.1


def test_spans_may_lie_anywhere_and_overlap(tmp_path):
    path = noise(tmp_path / "a.wav", 150, SPEECH_RATE)
    whole = np.concatenate(list(resampled_blocks(path, SPEECH_RATE)))
    spans = [(0, 1), (0.5, 61), (61, 61.5), (130, 140), (149, 155)]
    for (start, end), audio in zip(spans, read_spans(path, SPEECH_RATE, spans), strict=True):
        assert (audio == whole[round(start * SPEECH_RATE) : round(end * SPEECH_RATE)]).all()


def test_the_detector_sees_every_step_once_after_a_lead(tmp_path):
    path = noise(tmp_path / "a.wav", 130.3, SPEECH_RATE)
    whole = np.concatenate(list(resampled_blocks(path, SPEECH_RATE)))
    sizes = []

    def first_samples(audio):
        sizes.append(len(audio))
        return audio.reshape(-1, STEP)[:, :1]

    probabilities, levels = detect_speech(path, 130.3, first_samples)
    assert (probabilities == whole[::STEP]).all()
    assert len(levels) == len(probabilities) and np.abs(levels[:-1] + 20).max() < 2
    assert max(sizes) <= 62 * SPEECH_RATE


def test_level_in_blocks_is_that_of_the_whole(tmp_path):
    pyloudnorm = pytest.importorskip("pyloudnorm", reason="make cut installs it")
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.choice([0.0, 0.003, 0.05, 0.2], 150), 24_000)
    soundfile.write(tmp_path / "a.wav", loud * rng.normal(0, 1, len(loud)), 24_000)
    audio = soundfile.read(tmp_path / "a.wav")[0]
    loudness, peak = measure_level(tmp_path / "a.wav")
    assert abs(loudness - pyloudnorm.Meter(24_000).integrated_loudness(audio)) < 0.05
    assert peak == pytest.approx(np.abs(audio).max(), abs=1e-3)


def test_silence_does_not_count_for_the_level(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "block_loudness", rms_loudness)
    sound = 0.1 * np.sin(np.arange(240_000))
    soundfile.write(tmp_path / "a.wav", np.append(sound, np.zeros(2_400_000)), 24_000)
    assert measure_level(tmp_path / "a.wav")[0] == pytest.approx(-23, abs=0.3)
    soundfile.write(tmp_path / "b.wav", np.zeros(240_000), 24_000)
    assert measure_level(tmp_path / "b.wav") == (-math.inf, 0)
    assert choose_gain(-math.inf, 0) == 1


def test_gain_stops_under_the_peak():
    assert choose_gain(-30, 0.1) == pytest.approx(10 ** (10 / 20))
    assert choose_gain(-30, 0.5) == pytest.approx(10 ** (-1 / 20) / 0.5)
    assert choose_gain(-14, 1.0) == pytest.approx(10 ** (-6 / 20))


def test_words_are_kept_for_the_next_run(tmp_path):
    path, saved, shown = noise(tmp_path / "a.wav", 20), tmp_path / "a.jsonl", []
    windows, calls = [(0.0, 4.0), (5.0, 9.0), (10.0, 14.0)], []

    def listen(audio, language):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((len(audio), language))
        return "it", [Word(1, 2, " uno", 0.5)]

    with pytest.raises(KeyboardInterrupt):
        transcribe(path, windows, listen, None, saved, shown.append)
    assert calls == [(64_000, None), (64_000, "it")] and shown == [4, 9]
    saved.write_bytes(saved.read_bytes() + b'[10.0, 14.0, "it"')  # killed within a line
    calls.clear()
    language, words = transcribe(path, windows, listen, None, saved, shown.append)
    assert calls == [(64_000, "it")] and shown == [4, 9, 14] and language == "it"
    assert words == [Word(n + 1, n + 2, " uno", 0.5) for n in (0, 5, 10)]
    assert len(list(map(json.loads, saved.read_text().splitlines()))) == 3


def test_bad_recordings_are_one_line(tmp_path):
    def fault(path, read=True):
        with pytest.raises(UserError) as caught:
            check_recording(path)
            list(resampled_blocks(path, SPEECH_RATE))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    assert "does not exist" in fault(tmp_path / "none.wav")
    assert "is a folder, not an audio file" in fault(tmp_path)
    (tmp_path / "a.wav").write_text("no sound")
    assert "not audio that libsndfile reads" in fault(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 24_000)
    assert "no samples" in fault(tmp_path / "b.wav")
    whole = noise(tmp_path / "c.wav", 3).read_bytes()
    (tmp_path / "c.wav").write_bytes(whole[: len(whole) // 2])
    assert "cut short: the header says" in fault(tmp_path / "c.wav")
    whole = noise(tmp_path / "c.flac", 3).read_bytes()
    (tmp_path / "c.flac").write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in fault(tmp_path / "c.flac")
    soundfile.write(tmp_path / "d.wav", np.full(24_000, np.nan), 24_000, subtype="FLOAT")
    assert "not numbers" in fault(tmp_path / "d.wav")
    soundfile.write(tmp_path / "e.wav", np.full(24_000, 300.0), 24_000, subtype="FLOAT")
    assert "far over full scale" in fault(tmp_path / "e.wav")
