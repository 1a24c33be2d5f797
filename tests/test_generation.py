"""Speaking: streams against whole files, long texts, several candidates, transformers' generate."""

import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, one_line
from speaking import SHORT, TEXTS, demo_settings, generate_text, random_model, same_codes, say

import infer
import orpheus.generation
import orpheus.models
import orpheus.scoring
from orpheus.audio import FADE, PAUSE, concat_with_pauses, streamed_audio
from orpheus.generation import SlotProcessor, make_utterance, speak, speak_best
from orpheus.models import load_model
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.scoring import BY_ITSELF, CUT_OFF
from orpheus.settings import UserError
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    ids_to_codes,
    split_text,
)


@pytest.fixture(scope="session")
def model(ids):
    return random_model(ids)


@pytest.fixture(scope="session")
def base():
    return load_model("data/demo/base")[0]


# ---------------------------------------------------------------- codes


def test_ten_thousand_frames_and_none_illegal(ids):
    """10⁴ constrained frames at a high temperature, sampled through the processor."""
    torch.manual_seed(0)
    processor = SlotProcessor(ids, prompt_length=3)
    vocabulary = ids.audio + 7 * ids.codebook_size
    speech = torch.zeros(600, 3, dtype=torch.long)  # 600 at once, 20 frames each
    for _ in range(20 * 7):
        scores = processor(speech, torch.randn(600, vocabulary) * 3)
        sampled = torch.multinomial(scores.softmax(-1), 1)
        speech = torch.cat([speech, sampled], dim=1)
    frames = speech[:, 3:].reshape(-1, 7)
    whole = frames[frames[:, 0] != ids.eos].numpy()
    assert len(whole) > 10_000
    ids_to_codes(whole.reshape(-1), ids)  # raises for any id out of its slot
    assert (frames[:, 1:] != ids.eos).all()
    assert not (speech[:, 3] == ids.eos).any(), "an end before the first frame"


def test_codes_are_repeatable_and_it_is_said_when_they_are_cut_off(base, tokenizer, ids):
    hot = {"max_seconds": 0.35, "temperature": 5, "top_p": 1}
    row, again, other = (
        generate_text(base, tokenizer, ids, demo_settings(**hot, seed=seed), "one two three four")
        for seed in (0, 0, 1)
    )
    assert row.codes.shape == (4, 7) and row.end == CUT_OFF
    assert same_codes([again], [row])
    assert not np.array_equal(row.codes, other.codes)


def test_codes_at_a_high_temperature_are_legal(base, tokenizer, ids):
    settings = demo_settings(temperature=5, top_p=1, max_seconds=3)
    codes = generate_text(base, tokenizer, ids, settings, "nine").codes
    assert len(codes) > 0 and 0 <= codes.min() <= codes.max() < ids.codebook_size


def test_text_longer_than_the_context_is_refused(base, tokenizer, ids):
    with pytest.raises(UserError, match="no room for a frame"):
        make_utterance(base.config, tokenizer, ids, "seven " * 3000, demo_settings(), None)


# ---------------------------------------------------------------- streams


def test_stream_pipe_and_file_are_bit_for_bit_the_same(tmp_path, monkeypatch, capfdbinary):
    words = ["seven two nine", *SHORT, "--voice", "rms"]
    say(monkeypatch, *words, "--out", tmp_path / "whole.wav")
    whole = soundfile.read(tmp_path / "whole.wav", dtype="int16")[0]
    assert len(whole) > 0
    say(monkeypatch, *words, "--stream", "--out", tmp_path / "grown.wav")
    printed = capfdbinary.readouterr().out
    assert b"first audio after" in printed and b"real-time factor" in printed
    assert np.array_equal(soundfile.read(tmp_path / "grown.wav", dtype="int16")[0], whole)
    for name, header in (("-", 44), ("pcm", 0)):
        say(monkeypatch, *words, "--out", name)
        sys.__stdout__.flush()
        piped = capfdbinary.readouterr()
        assert np.array_equal(np.frombuffer(piped.out[header:], "<i2"), whole), name
        assert b"first audio after" in piped.err


def test_a_growing_wav_is_a_whole_wav_at_any_time(tmp_path):
    with streamed_audio(tmp_path / "a.wav") as write:
        for n in range(1, 4):
            write(np.full(1000, 0.25, np.float32))
            grown, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
            assert (len(grown), rate, grown[-1]) == (1000 * n, 24_000, 8192)


# ---------------------------------------------------------------- long texts, voices


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 99])
def test_parts_are_joined_with_a_pause_and_no_click(count, size):
    """Whatever the pieces: all samples but the faded edges as they were, a pause between."""
    parts = [np.full(4 * FRAME_SAMPLES, n + 1, np.float32) for n in range(count)]
    pieces = [np.split(part, range(size * 2048, len(part), size * 2048)) for part in parts]
    joined = np.concatenate(list(concat_with_pauses(pieces)))
    whole = np.concatenate(list(concat_with_pauses([[part] for part in parts])))
    assert joined.tobytes() == whole.tobytes()
    pause = int(PAUSE * SAMPLE_RATE)
    assert len(joined) == count * 4 * 2048 + (count - 1) * pause
    steepest = count / (FADE - 1) + 1e-6 if count > 1 else 0
    assert abs(np.diff(joined)).max() <= steepest
    for n, part in enumerate(parts):
        start = n * (len(part) + pause)
        fades = (FADE if n else 0, FADE if n < count - 1 else 0)
        inner = slice(start + fades[0], start + len(part) - fades[1])
        assert (joined[inner] == n + 1).all()
        assert n == count - 1 or not joined[start + len(part) : start + len(part) + pause].any()


def test_a_long_text_streamed_and_not(tmp_path, monkeypatch, capsys):
    """Parts in batches of two: each is as if generated alone."""
    text = "one two three four. three. seven eight nine. zero five."
    words = [text, *SHORT, "--speak_batch_size", "2", "--out"]
    say(monkeypatch, *words, tmp_path / "whole.wav")
    printed = capsys.readouterr().out
    say(monkeypatch, *words, tmp_path / "grown.wav", "--stream")
    whole = soundfile.read(tmp_path / "whole.wav", dtype="int16")[0]
    assert np.array_equal(soundfile.read(tmp_path / "grown.wav", dtype="int16")[0], whole)
    parts = split_text(text, 20)
    frames = int(re.search(r"(\d+) frames", printed)[1])
    pause = int(PAUSE * SAMPLE_RATE)
    assert len(parts) == 4 and len(whole) == frames * 2048 + 3 * pause
    say(monkeypatch, parts[0], *SHORT, "--out", tmp_path / "first.wav")
    first = soundfile.read(tmp_path / "first.wav", dtype="int16")[0][:-FADE]
    assert np.array_equal(whole[: len(first)], first)


def test_several_texts_are_each_as_alone(tmp_path, model, tokenizer, codec):
    settings = demo_settings(temperature=0.8, max_seconds=1, speak_batch_size=3)
    paths = [tmp_path / f"{n}.wav" for n in range(4)]
    speak(TEXTS, paths, model, tokenizer, codec, settings, "rms")
    speak(TEXTS[2:3], [tmp_path / "alone.wav"], model, tokenizer, codec, settings, "rms")
    assert (tmp_path / "alone.wav").read_bytes() == paths[2].read_bytes()
    assert (tmp_path / "alone.wav").read_bytes() != paths[1].read_bytes()


def test_samples_are_returned_unless_they_are_not_kept(tmp_path, model, tokenizer, codec, capsys):
    settings = demo_settings(max_seconds=0.5)
    words = ["nine"], [tmp_path / "a.wav"], model, tokenizer, codec, settings, "rms"
    ((audio, _),) = speak(*words, quiet=True)
    assert capsys.readouterr().out == ""
    assert len(audio) == soundfile.info(tmp_path / "a.wav").frames > 0
    ((audio, _),) = speak(*words, keep=False)
    assert len(audio) == 0 and "a.wav  0." in capsys.readouterr().out


def test_a_voice_that_was_not_trained_is_refused(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(ROOT / "data/demo/base" / name)
    (tmp_path / SAVED_CONFIG).write_text((ROOT / "data/demo/config.json").read_text())
    (tmp_path / SAVED_REPORT).write_text('{"voices": {"slt": 9, "rms": 4}}')
    line = one_line(infer.main, monkeypatch, "hi", "--model", tmp_path, "--voice", "stl")
    assert line == f"--voice stl: {tmp_path} was trained on slt, rms"


def test_mistakes_in_speaking_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    cases = [
        (["--stream", "--out", tmp_path / "a.flac"], "a stream goes to a .wav"),
        (["--out", "speakers"], "end the name in"),
        (["--stream", "--best_of", "2"], "leave out --best_of"),
        (["--out", "-", "again"], "a wav holds one text"),
        (["--out", tmp_path / "file/a.wav"], "cannot be written"),
        (["--stream", "--out", tmp_path / "file/a.wav"], "cannot be written"),
        (["--best_of", "0"], "best_of"),
    ]
    for words, line in cases:
        assert line in one_line(infer.main, monkeypatch, *SHORT, *words, "hi"), words


# ---------------------------------------------------------------- candidates


@pytest.fixture
def candidates(model, tokenizer, ids):
    """candidates(text, settings): three of them."""
    return lambda text, settings: [
        make_utterance(model.config, tokenizer, ids, text, settings, "rms", n) for n in range(3)
    ]


def test_the_best_of_several_is_kept_and_failures_are_printed(
    model, ids, codec, candidates, monkeypatch, capsys
):
    """Candidates that loop leave early; one that ends by itself at the voice's pace is kept."""
    settings = demo_settings(temperature=0.9, max_seconds=4, best_of=3)
    rows = candidates("seven two nine", settings)

    def speak_frames(model, rows, ids, settings):
        for frame in range(40):
            for row in rows:
                code = 5 if row.candidate == 0 else (frame * 37) % 251
                if not row.end:
                    row.frames.append(np.full(7, code))
                if row.candidate == 2 and frame == 14:
                    row.end = BY_ITSELF
            if all(row.end for row in rows):
                return
            yield
        for row in rows:
            row.end = row.end or CUT_OFF

    monkeypatch.setattr(orpheus.generation, "speak_frames", speak_frames)
    best = list(speak_best([rows], model, codec, ids, settings, 0.09, ()))
    printed = capsys.readouterr().out
    assert best == [rows[2]]
    assert len(rows[0].frames) == 24 and "loop" in rows[0].end
    assert rows[1].end == CUT_OFF
    assert "kept candidate 3 of 3, 2 failed: candidate 1, loop: 1 frames" in printed


def test_best_of_is_repeatable_and_the_first_candidate_is_the_plain_one(
    model, tokenizer, ids, codec, candidates
):
    plain, several = (demo_settings(temperature=0.9, max_seconds=1, best_of=n) for n in (1, 3))
    rows, again = candidates("nine", several), candidates("nine", several)
    best, best_again = (
        next(speak_best([group], model, codec, ids, several, None, ())) for group in (rows, again)
    )
    assert same_codes(again, rows) and best_again.candidate == best.candidate
    alone = generate_text(model, tokenizer, ids, plain, "nine")
    assert same_codes([rows[0]], [alone])
    assert not same_codes([rows[1]], [alone]) and not same_codes([rows[1]], [rows[2]])
