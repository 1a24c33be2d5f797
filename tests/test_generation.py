"""Speaking: the loop against model.generate, the stream against the whole, batches, long texts."""

import csv
import json
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
from conftest import ROOT, one_line

import infer
import orpheus.codec
import orpheus.generation
import orpheus.models
import orpheus.scoring
from orpheus.audio import read_audio, streamed_audio
from orpheus.codec import CONTEXT, decode_stream
from orpheus.generation import (
    FADE,
    PAUSE,
    concat_with_pauses,
    generate_batch,
    generate_with_transformers,
    sample_codes,
    speak,
    speak_best,
    speak_frames,
    split_text,
)
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.scoring import (
    BY_ITSELF,
    CUT_OFF,
    Utterance,
    detect_failure,
    judge_sound,
    judge_words,
    longest_silence,
    rank,
)
from orpheus.settings import read_settings
from orpheus.tokens import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SLOTS,
)

TEXTS = ["seven", "one two three four five six", "nine zero two", "four four eight one"]


@pytest.fixture(scope="session")
def model(ids):
    """Random weights: small and quick, with grouped queries, and ends that come now and then."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ids.audio + SLOTS * ids.codebook_size,
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[ids.eos] *= 1.5
    return model


def demo(**keys):
    return read_settings("data/demo/config.json", {n: str(v) for n, v in keys.items()})


def begun(model, tokenizer, ids, texts, settings, voices=("rms",)):
    voices = [voices[n % len(voices)] for n in range(len(texts))]
    pairs = zip(texts, voices, strict=True)
    return [
        orpheus.generation.make_utterance(model, tokenizer, ids, text, settings, voice)
        for text, voice in pairs
    ]


def spoken(model, tokenizer, ids, texts, settings, static=False):
    rows = begun(model, tokenizer, ids, texts, settings, ("rms", "awb"))
    for _ in speak_frames(model, rows, ids, settings, static):
        pass
    return rows


def same(rows, others):
    return all(
        a.end == b.end and np.array_equal(a.codes, b.codes)
        for a, b in zip(rows, others, strict=True)
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_generate_batched_and_one_by_one(model, tokenizer, ids, penalty):
    settings = demo(temperature=0, repetition_penalty=penalty, max_seconds=1.1)
    plain = begun(model, tokenizer, ids, TEXTS, settings, ("rms", "awb"))
    for row in plain:
        generate_with_transformers(model, [row], ids, settings)
    assert sum(len(row.frames) for row in plain) > 20
    assert same(spoken(model, tokenizer, ids, TEXTS, settings), plain)
    assert same(spoken(model, tokenizer, ids, TEXTS, settings, static=True), plain)
    together = begun(model, tokenizer, ids, TEXTS, settings, ("rms", "awb"))
    generate_with_transformers(model, together, ids, settings)
    assert same(together, plain)
    for n, text in enumerate(TEXTS[:2]):
        row = begun(model, tokenizer, ids, [text], settings, (("rms", "awb")[n],))
        generate_batch(model, row, ids, settings)
        assert same(row, plain[n : n + 1])


def test_a_wav_is_the_same_by_seed_alone_and_in_any_batch(model, tokenizer, ids):
    settings = demo(temperature=0.9, max_seconds=1.5)
    together = spoken(model, tokenizer, ids, TEXTS, settings)
    assert same(spoken(model, tokenizer, ids, TEXTS, settings, static=True), together)
    alone = begun(model, tokenizer, ids, TEXTS[2:3], settings)
    generate_batch(model, alone, ids, settings)
    assert same(alone, together[2:3])
    reseeded = demo(temperature=0.9, max_seconds=1.5, seed=1)
    other = begun(model, tokenizer, ids, TEXTS[2:3], reseeded)
    generate_batch(model, other, ids, reseeded)
    assert not same(other, alone)


def test_a_row_that_is_ended_from_outside_leaves_the_others_as_they_were(model, tokenizer, ids):
    settings = demo(temperature=0, max_seconds=1.5)
    for static in (False, True):
        whole = spoken(model, tokenizer, ids, TEXTS, settings, static)
        rows = begun(model, tokenizer, ids, TEXTS, settings, ("rms", "awb"))
        for n, _ in enumerate(speak_frames(model, rows, ids, settings, static), 1):
            if n == 3:
                rows[1].end = "enough"
        assert (rows[1].end, len(rows[1].frames)) == ("enough", 3)
        assert same([rows[0], *rows[2:]], [whole[0], *whole[2:]])


def test_a_head_that_is_not_plain_is_used_whole(model, tokenizer, ids):
    class Wrapped(torch.nn.Linear):
        pass

    settings, head = demo(temperature=0, max_seconds=1), model.lm_head
    plain = spoken(model, tokenizer, ids, TEXTS, settings)
    model.lm_head = Wrapped(*head.weight.shape[::-1], bias=False)
    model.lm_head.weight = head.weight
    try:
        assert same(spoken(model, tokenizer, ids, TEXTS, settings), plain)
    finally:
        model.lm_head = head


@pytest.mark.parametrize(("temperature", "top_p", "penalty"), [(0.6, 0.8, 1.3), (1.5, 1.0, 1.0)])
def test_draws_are_spread_as_transformers_spreads_them(temperature, top_p, penalty):
    """Over 20,000 evenly spaced chances each choice comes as often as its probability says."""
    from transformers import generation

    torch.manual_seed(0)
    scores, drawn = torch.randn(1, 60) * 2, torch.arange(0, 60, 7)[None]
    shares = generation.RepetitionPenaltyLogitsProcessor(penalty)(drawn, scores.clone())
    shares = generation.TemperatureLogitsWarper(temperature)(drawn, shares)
    shares = generation.TopPLogitsWarper(top_p)(drawn, shares).softmax(-1)[0]
    settings = demo(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    used = torch.zeros(1, 60, dtype=torch.bool).scatter_(1, drawn, True)
    chances = (torch.arange(20_000) + 0.5) / 20_000
    many = (scores.expand(20_000, -1), used.expand(20_000, -1))
    counts = torch.bincount(sample_codes(*many, settings, chances), minlength=60) / 20_000
    assert (counts - shares).abs().max() < 3e-4
    assert (counts[shares == 0] == 0).all()


# ---------------------------------------------------------------- streams


def noisy_codec():
    """SNAC's shape with random weights, with the noise blocks that the full-size decoder has."""
    from snac import SNAC

    torch.manual_seed(0)
    keys = json.loads((ROOT / "data/demo/codec/config.json").read_text())
    return SNAC(**keys | {"noise": True, "decoder_dim": 32}).eval()


def test_every_frame_comes_once_in_every_chunking():
    """A codec that says which frame it was given: each comes out once, in order, code 0 kept."""

    class Naming:
        def parameters(self):
            yield torch.zeros(1)

        def decode(self, levels):  # the coarse code, over the frame's samples
            return levels[0].repeat_interleave(FRAME_SAMPLES, dim=-1)[:, None].float()

    for length in range(1, 41):
        codes = np.zeros((length, 7), dtype=np.int64)
        codes[:, 0] = np.arange(length)
        for size in range(1, 42):
            pieces = list(decode_stream(Naming(), iter(codes), size))
            heard = np.concatenate(pieces)[::FRAME_SAMPLES]
            assert heard.tolist() == list(range(length)), (length, size)
            assert sum(map(len, pieces)) == length * FRAME_SAMPLES


def test_a_piece_comes_as_soon_as_its_context_is_there(codec):
    taken = []

    def frames():
        for n in range(20):
            taken.append(n)
            yield np.zeros(7, np.int64)

    next(decode_stream(codec, frames(), 4))
    assert len(taken) == 4 + CONTEXT


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 12, 40])
def test_a_stream_equals_the_whole(codec, length):
    """But for float32's last digit: in which order torch adds up depends on the length."""
    codes = np.random.default_rng(length).integers(0, codec.codebook_size, (length, 7))
    whole = orpheus.codec.decode(codec, codes)
    for size in (1, 4, 9):
        pieces = np.concatenate(list(decode_stream(codec, iter(codes), size)))
        assert pieces.shape == whole.shape and abs(pieces - whole).max() < 1e-6, size


def test_a_stream_equals_the_whole_with_equal_noise(monkeypatch):
    """≥ 90 dB where every sample has the noise of its place, whatever piece it is decoded in."""
    codec, done = noisy_codec(), {}
    field = torch.randn(8, 1, 90 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(0))
    first = [0]  # sample of the whole where the piece at hand begins

    def noise(shape, **_):
        length = shape[-1]
        rate = done["samples"] // length  # samples of sound a step of this block
        start = first[0] // rate
        return field[len(str(rate)), :, start : start + length][None]

    monkeypatch.setattr("snac.layers.torch.randn", noise)
    decode = orpheus.codec.decode

    def placed(codec, codes):
        first[0] = int(codes[0][0]) * FRAME_SAMPLES  # the coarse code counts the frames
        done["samples"] = len(codes) * FRAME_SAMPLES
        return decode(codec, codes)

    monkeypatch.setattr(orpheus.codec, "decode", placed)
    codes = np.random.default_rng(0).integers(0, codec.codebook_size, (40, 7))
    codes[:, 0] = np.arange(40)
    whole = orpheus.codec.decode(codec, codes)
    for size in (1, 4, 9):
        pieces = np.concatenate(list(decode_stream(codec, iter(codes), size)))
        error = np.sqrt(((pieces - whole) ** 2).mean() / (whole**2).mean())
        assert 20 * np.log10(error + 1e-12) < -90, size
    field.neg_()
    assert abs(orpheus.codec.decode(codec, codes) - whole).max() > 1e-4  # the noise is heard


def say(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words)])
    infer.main()


SHORT = ["--model", "data/demo/base", "--codec", "data/demo/codec", "--max_seconds", "0.9"]


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
            heard, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
            assert (len(heard), rate, heard[-1]) == (1000 * n, 24_000, 8192)


# ---------------------------------------------------------------- long texts, voices


def test_long_text_is_split_at_sentences_then_at_words():
    text = "Dr. Smith paid 3.50 in the U.S.A. <laugh> Did he? Yes, e.g. today! " + "word " * 30
    parts = split_text(text, 60)
    assert " ".join(parts) == " ".join(text.split())
    assert parts[:2] == ["Dr. Smith paid 3.50 in the U.S.A. <laugh> Did he?", "Yes, e.g. today!"]
    assert [len(part) for part in parts[2:]] == [59, 59, 29]
    assert split_text(" short.  one ", 60) == ["short. one"]
    assert split_text("one. " + "x" * 99, 60) == ["one.", "x" * 99]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 99])
def test_parts_are_joined_with_a_pause_and_no_click(count, size):
    """Whatever the pieces: all samples but the faded edges as they were, a pause between."""
    parts = [np.full(4 * FRAME_SAMPLES, n + 1, np.float32) for n in range(count)]
    pieces = [np.split(part, range(size * 2048, len(part), size * 2048)) for part in parts]
    heard = np.concatenate(list(concat_with_pauses(pieces)))
    whole = np.concatenate(list(concat_with_pauses([[part] for part in parts])))
    assert heard.tobytes() == whole.tobytes()
    pause = int(PAUSE * SAMPLE_RATE)
    assert len(heard) == count * 4 * 2048 + (count - 1) * pause
    steepest = count / (FADE - 1) + 1e-6 if count > 1 else 0
    assert abs(np.diff(heard)).max() <= steepest
    for n, part in enumerate(parts):
        start = n * (len(part) + pause)
        fades = (FADE if n else 0, FADE if n < count - 1 else 0)
        inner = slice(start + fades[0], start + len(part) - fades[1])
        assert (heard[inner] == n + 1).all()
        assert n == count - 1 or not heard[start + len(part) : start + len(part) + pause].any()


def test_a_long_text_streamed_and_not(tmp_path, monkeypatch, capsys):
    """Parts in batches of two: as if each were spoken alone, with pauses."""
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


def test_several_texts_are_each_as_alone(tmp_path, model, tokenizer, ids, codec):
    settings = demo(temperature=0.8, max_seconds=1, speak_batch_size=3)
    paths = [tmp_path / f"{n}.wav" for n in range(4)]
    speak(TEXTS, paths, model, tokenizer, codec, settings, "rms")
    speak(TEXTS[2:3], [tmp_path / "alone.wav"], model, tokenizer, codec, settings, "rms")
    assert (tmp_path / "alone.wav").read_bytes() == paths[2].read_bytes()
    assert (tmp_path / "alone.wav").read_bytes() != paths[1].read_bytes()


def test_a_voice_that_was_not_trained_is_told(tmp_path, monkeypatch):
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


def told_fault(coarse, text="x" * 30, pace=0.07):
    row = Utterance(text, [], 999, frames=[np.array([code, *range(6)]) for code in coarse])
    return detect_failure(row, pace)


def test_loops_and_runaways_are_told_from_speech():
    speech = np.random.default_rng(0).integers(0, 50, 48).tolist()
    assert told_fault(speech) == ""
    assert told_fault(speech[:20] + [7] * 23) == "" != told_fault(speech[:20] + [7] * 24)
    assert "loop: 5 frames" in told_fault(speech[:20] + speech[:5] * 5)
    assert "runaway" in told_fault(speech * 3)
    assert told_fault(speech * 1 + list(range(90)), pace=None) == ""


def test_silence_is_measured():
    tone = np.sin(np.arange(24_000) / 10).astype(np.float32)
    assert longest_silence(tone) < 0.1
    gap = np.concatenate([tone, np.zeros(36_000, np.float32), tone])
    assert longest_silence(gap) == pytest.approx(1.5, abs=0.05)
    assert longest_silence(np.concatenate([tone, 0.001 * tone])) == pytest.approx(1, abs=0.1)
    assert longest_silence(np.zeros(48_000, np.float32)) > 1.9


def test_the_best_of_several_is_kept_and_the_faults_told(
    model, tokenizer, ids, codec, monkeypatch, capsys
):
    """Candidates that loop leave early; one that ends by itself at the voice's pace is kept."""
    settings = demo(temperature=0.9, max_seconds=4, best_of=3)
    text = "seven two nine"
    begin = [
        orpheus.generation.make_utterance(model, tokenizer, ids, text, settings, "rms", n)
        for n in range(3)
    ]

    def frames(model, rows, ids, settings):
        for n in range(40):
            for row in rows:
                loops = row.candidate == 0
                code = 5 if loops else (n * 37) % 251
                if not row.end:
                    row.frames.append(np.full(7, code))
                if row.candidate == 2 and n == 14:
                    row.end = BY_ITSELF
            if all(row.end for row in rows):
                return
            yield
        for row in rows:
            row.end = row.end or CUT_OFF

    monkeypatch.setattr(orpheus.generation, "speak_frames", frames)
    kept = speak_best([begin], model, codec, ids, settings, 0.09, ())
    printed = capsys.readouterr().out
    assert kept == [begin[2]]
    assert len(begin[0].frames) == 24 and "loop" in begin[0].end
    assert begin[1].end == CUT_OFF
    assert "kept candidate 3 of 3, 2 at fault" in printed and "1 loop: 1 frames" in printed


def test_best_of_is_repeatable_and_the_first_candidate_is_the_plain_one(
    model, tokenizer, ids, codec
):
    plain, several = (demo(temperature=0.9, max_seconds=1, best_of=n) for n in (1, 3))
    rows = [
        orpheus.generation.make_utterance(model, tokenizer, ids, "nine", several, "rms", n)
        for n in range(3)
    ]
    kept = speak_best([rows], model, codec, ids, several, None, ())
    again = [
        orpheus.generation.make_utterance(model, tokenizer, ids, "nine", several, "rms", n)
        for n in range(3)
    ]
    kept_again = speak_best([again], model, codec, ids, several, None, ())
    assert same(again, rows) and kept_again[0].candidate == kept[0].candidate
    alone = orpheus.generation.make_utterance(model, tokenizer, ids, "nine", plain, "rms")
    generate_batch(model, [alone], ids, plain)
    assert same([rows[0]], [alone])
    assert not same([rows[1]], [alone]) and not same([rows[1]], [rows[2]])


# ---------------------------------------------------------------- scores


def test_scores_tell_what_could_be_done(tmp_path, monkeypatch, capsys):
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
    assert printed.count(f"kept candidate {better + 1} of 2, 0 at fault\n") == 2
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
    assert first == ["scores", "silence,", "pace,", "wer,", "cer,", "likeness,", "mos"]
    wavs = [tmp_path / f"said/{n:03}.wav" for n in (1, 2)]
    spoken = [read_audio(wav)[0] for wav in wavs]
    at_16_khz = [soxr.resample(audio, 24_000, 16_000) for audio in spoken]

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
    for sound, expected in zip(embedded, [*recordings, *spoken], strict=True):
        assert abs(sound - expected).max() < 1e-3
    resampled = mocks["resemblyzer"].preprocess_wav.call_args_list
    assert [call.kwargs for call in resampled] == [{"source_sr": 24_000}] * 4


def test_words_of_other_languages_are_not_normalised_as_english(monkeypatch):
    _, calls = mock_judges(monkeypatch, language="de", wer=[0.5])
    judge = judge_words("base", None)
    assert judge(np.zeros(24_000, "f4"), "Seven <sigh> 56!") == {"wer": 0.5, "cer": 0.125}
    assert [call.args for call in calls["wer"]] == [("seven 5 6", "7 5 6")]
    assert judge(np.zeros(24_000, "f4"), "<sigh>") == {}  # no words, so no error rate


def test_sound_over_full_scale_is_clipped_for_dnsmos(monkeypatch):
    _, calls = mock_judges(monkeypatch, mos=MOS)
    loud = 3 * np.sin(np.arange(24_000, dtype="f4") / 10)
    assert judge_sound()(loud, "") == {"mos": 3.0}
    assert abs(calls["mos"][0].args[0]).max() == 1


def test_wrong_words_count_for_more_than_pace_and_faults_for_more_than_words():
    heard = {"good": {"wer": 0.0, "pace": 2.0}, "bad": {"wer": 0.5, "pace": 1.0}}
    row = Utterance("x", [], 9, end=BY_ITSELF)
    ranks = {name: rank(row, {"silence": 0.1} | told) for name, told in heard.items()}
    assert ranks["good"] < ranks["bad"]
    cut = Utterance("x", [], 9, end=CUT_OFF)
    assert rank(cut, {"silence": 0.1, "wer": 0.0}) > ranks["bad"]
    assert rank(row, {"silence": 2.0, "wer": 0.0}) > ranks["bad"]
