"""data/cut.py: recordings put together from data/numbers, with stand-ins for Silero and Whisper."""

import csv
import itertools
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT, one_line, script
from test_align import use_difflib
from test_recording import rms_loudness

from data import cut
from data.prepare import make_rows
from orpheus import recording
from orpheus.audio import read_audio
from orpheus.clips import read_clips
from orpheus.recording import SPEECH_RATE, STEP, Word, detect_speech, read_spans
from orpheus.segment import KEEP, find_speech
from orpheus.settings import UserError, read_settings

RATE = 24_000


def read_rows(folder, name="metadata.csv"):
    return list(csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines()))


def record(path, seed=0, sentences=12, gain=1.0):
    """Writes a recording of sentences of numbers with pauses and noise; [(start, end, text)]."""
    rng = np.random.default_rng(seed)
    table = read_rows(ROOT / "data/numbers")
    parts, truth, at = [np.zeros(RATE // 2)], [], 0.5
    for row in rng.permutation(table)[:sentences]:
        audio, _ = read_audio(ROOT / "data/numbers" / row["file_name"])
        loud = np.flatnonzero(np.abs(audio) > 0.01)
        audio = audio[loud[0] : loud[-1] + 1]
        pause = np.zeros(int(rng.uniform(0.4, 1.2) * RATE))
        truth.append((at, at + len(audio) / RATE, row["text"].capitalize() + "."))
        parts += [audio, pause]
        at += (len(audio) + len(pause)) / RATE
    audio = np.concatenate(parts)
    soundfile.write(path, gain * (audio + rng.normal(0, 1e-4, len(audio))), RATE)
    return truth


def detect(audio):
    """Speech is what is louder than the noise."""
    return (np.sqrt((audio.reshape(-1, STEP) ** 2).mean(axis=1)) > 0.003).astype(float)


def stand_in(truths, calls):
    """listen(audio, language) that knows each recording's words, spread evenly over sentences."""
    sounds = {p: next(read_spans(p, SPEECH_RATE, [(0, 10_000)])) for p in truths}

    def listen(audio, language):
        calls.append(len(audio))
        for path, sound in sounds.items():
            for at in np.flatnonzero(sound[: len(sound) - len(audio) + 1] == audio[0]):
                if (sound[at : at + len(audio)] == audio).all():
                    return "en", words_between(truths[path], at / SPEECH_RATE, len(audio))
        raise AssertionError("a window of no recording")

    return listen


def words_between(truth, start, samples):
    words = []
    for first, last, text in truth:
        if start <= first and last <= start + samples / SPEECH_RATE:
            times = np.linspace(first - start, last - start, len(text.split()) + 1).tolist()
            pairs = itertools.pairwise(times)
            words += [Word(*t, f" {w}") for t, w in zip(pairs, text.split(), strict=True)]
    return words


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the optional packages, whether or not they are installed."""
    use_difflib(monkeypatch)
    monkeypatch.setattr(recording, "block_loudness", rms_loudness)
    monkeypatch.setattr(cut, "check_packages", lambda: None)
    return []


def run_cut(monkeypatch, truths, calls, *words, listen=None):
    tools = detect, listen or stand_in(truths, calls)
    monkeypatch.setattr(cut, "load_tools", lambda options: tools)
    monkeypatch.setattr(sys, "argv", ["cut.py", *map(str, [*truths, *words])])
    cut.main()


def join_texts(rows):
    return " ".join(row["text"] for row in rows)


def test_cuts_lie_at_pauses_and_nothing_is_lost(tmp_path, monkeypatch, calls, capsys):
    path, out = tmp_path / "my book.flac", tmp_path / "voice"
    truth = record(path)
    run_cut(monkeypatch, {path: truth}, calls, "--out", out, "--voice", "slt")
    rows = read_rows(out)
    assert join_texts(rows) == " ".join(text for *_, text in truth)
    for row in rows:
        inside = [t for t in truth if float(row["start"]) < t[0] and t[1] < float(row["end"])]
        assert row["text"] == " ".join(text for *_, text in inside)
        assert abs(float(row["start"]) - (inside[0][0] - KEEP)) < 0.05
        assert abs(float(row["end"]) - (inside[-1][1] + KEEP)) < 0.05
        assert 2 <= float(row["end"]) - float(row["start"]) <= 12.5
        assert (row["voice"], row["source"], row["cer"]) == ("slt", "my book.flac", "")
        info = soundfile.info(out / row["file_name"])
        assert (info.samplerate, info.channels, info.format) == (RATE, 1, "FLAC")
        assert abs(info.duration - (float(row["end"]) - float(row["start"]))) < 0.001
    assert rows[0]["file_name"] == "clips/my_book_0001.flac"
    assert read_rows(out, "rejected.csv") == []
    assert (out / "cuts.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert f"{len(rows)} clips" in printed and "× real time" in printed


def test_every_recording_is_brought_to_one_level(tmp_path, monkeypatch, calls):
    paths = [tmp_path / f"{n}.wav" for n in "ab"]
    truths = {path: record(path, n, gain=(0.9, 0.4)[n]) for n, path in enumerate(paths)}
    out = tmp_path / "out"
    run_cut(monkeypatch, truths, calls, "--out", out)
    levels = []
    for row in read_rows(out):
        audio = soundfile.read(out / row["file_name"])[0]
        levels.append((row["source"], 10 * np.log10((audio**2).mean())))
        assert np.abs(audio).max() <= 10 ** (-1 / 20) + 1e-4
    means = [np.mean([level for source, level in levels if source == p.name]) for p in paths]
    assert abs(means[0] - means[1]) < 1


def test_a_recording_is_read_with_its_text(tmp_path, monkeypatch, calls):
    path, out, book = tmp_path / "a.wav", tmp_path / "out", tmp_path / "book.txt"
    truth = record(path)
    texts = [text for *_, text in truth]
    texts = [texts[0], *(text.replace(" ", ", ") for text in texts[1:])]
    body = " ".join(texts[3:7]) + "\n\nCHAPTER THIRTEEN\n\n" + " ".join(texts[7:])
    book.write_text(f"Nobody read this page aloud.\n\n{body}\n\nNor this.")
    run_cut(monkeypatch, {path: truth}, calls, "--out", out, "--text", book)
    rows, rejected = read_rows(out), read_rows(out, "rejected.csv")
    assert join_texts(rows) == " ".join(texts[3:])
    assert {row["reason"] for row in rejected} == {"not in the text"}
    assert " ".join(row["heard"] for row in rejected) == " ".join(t for *_, t in truth[:3])
    assert {row["cer"] for row in rows} == {"0.0"}


def test_words_that_differ_are_rejected(tmp_path, monkeypatch, calls):
    path, out, book = tmp_path / "a.wav", tmp_path / "out", tmp_path / "book.txt"
    truth = record(path)
    texts = [text for *_, text in truth]
    texts[5] = "Something else stands here."
    book.write_text(" ".join(texts))
    run_cut(monkeypatch, {path: truth}, calls, "--out", out, "--text", book)
    (row,) = read_rows(out, "rejected.csv")
    assert (row["heard"], row["reason"]) == (truth[5][2], "not in the text")
    assert truth[5][2] not in join_texts(read_rows(out))


def test_a_killed_run_goes_on(tmp_path, monkeypatch, calls):
    paths, whole = [tmp_path / f"{n}.wav" for n in "ab"], tmp_path / "whole"
    truths = {path: record(path, n, sentences=16) for n, path in enumerate(paths)}
    run_cut(monkeypatch, truths, calls, "--out", whole)
    files = [p for p in whole.rglob("*.*") if p.suffix in (".flac", ".csv")]
    count = len(calls)
    assert count == 4 and len(files) > 6
    listen = stand_in(truths, calls)

    def killed(audio, language):
        if len(calls) == stop:
            raise KeyboardInterrupt
        return listen(audio, language)

    for stop in (0, 1, 3):
        calls.clear()
        out = tmp_path / f"out{stop}"
        with pytest.raises(KeyboardInterrupt):
            run_cut(monkeypatch, truths, calls, "--out", out, listen=killed)
        run_cut(monkeypatch, truths, calls, "--out", out, listen=listen)
        assert len(calls) == count
        assert all((out / p.relative_to(whole)).read_bytes() == p.read_bytes() for p in files)
    calls.clear()
    run_cut(monkeypatch, truths, calls, "--out", whole)
    assert calls == []


def test_the_folder_is_a_dataset(tmp_path, monkeypatch, calls, tokenizer):
    path, out = tmp_path / "a.wav", tmp_path / "voice"
    run_cut(monkeypatch, {path: record(path)}, calls, "--out", out, "--voice", "slt")
    keys = {"dataset": str(out), "cache_dir": "null"}
    settings = read_settings("data/demo/config.json", keys)
    train, held_out, report = make_rows(read_clips(settings), settings, tokenizer)
    count = len(train) + len(held_out)
    assert count == len(read_rows(out)) and report.voices == {"slt": count}
    assert not report.left_out and not report.findings


def test_recordings_of_one_name_do_not_share_clips(tmp_path, monkeypatch, calls):
    paths = [tmp_path / name / "a.wav" for name in "xy"]
    for path in paths:
        path.parent.mkdir()
    truths = {path: record(path, n, sentences=4) for n, path in enumerate(paths)}
    run_cut(monkeypatch, truths, calls, "--out", tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert len({row["file_name"] for row in rows}) == len(rows)
    assert sum(len(truth) for truth in truths.values()) == join_texts(rows).count(".")


def test_silence_alone_is_one_line(tmp_path, monkeypatch, calls):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    with pytest.raises(UserError, match=r"no clip could be kept: no speech"):
        run_cut(monkeypatch, {path: []}, calls, "--out", tmp_path / "out")


def test_mistakes_are_one_line(tmp_path, monkeypatch, calls):
    path, out, empty = tmp_path / "a.wav", tmp_path / "out", tmp_path / "empty.txt"
    truth = record(path, sentences=4)
    empty.write_text(" — \n")

    def mistake(*words):
        return one_line(cut.main, monkeypatch, *words)

    assert "required: recordings, --out" in mistake()
    assert "does not exist" in mistake(tmp_path / "b.wav", "--out", out)
    assert "given twice" in mistake(path, tmp_path / "." / "a.wav", "--out", out)
    assert "give a share from 0 to 1" in mistake(path, "--out", out, "--max_cer", "nan")
    assert "give an ISO code" in mistake(path, "--out", out, "--language", "English")
    assert "control character" in mistake(path, "--out", out, "--voice", "a\x07b")
    assert "no words in it" in mistake(path, "--out", out, "--text", empty)
    assert "cannot be read" in mistake(path, "--out", out, "--text", tmp_path / "none.txt")
    assert "not made by cut.py" in mistake(path, "--out", tmp_path)
    assert "not made by cut.py" in mistake(path, "--out", empty)
    assert not out.exists()
    run_cut(monkeypatch, {path: truth}, calls, "--out", out)
    assert "cut with other --voice" in mistake(path, "--out", out, "--voice", "anna")
    record(path, seed=1, sentences=5)
    assert "cut with other recordings" in mistake(path, "--out", out)


def test_a_command_that_heard_nothing_may_be_corrected(tmp_path, monkeypatch, calls):
    path, out = tmp_path / "a.wav", tmp_path / "out"
    truth = record(path, sentences=4)

    def load_tools(options):
        raise UserError("no such model")

    monkeypatch.setattr(cut, "load_tools", load_tools)
    assert one_line(cut.main, monkeypatch, path, "--out", out, "--whisper", "smal")
    run_cut(monkeypatch, {path: truth}, calls, "--out", out, "--whisper", "small")
    assert read_rows(out)


def test_missing_packages_are_one_line(tmp_path, monkeypatch):
    record(tmp_path / "a.wav", sentences=2)
    monkeypatch.setattr(cut, "find_spec", lambda name: None)
    line = one_line(cut.main, monkeypatch, tmp_path / "a.wav", "--out", tmp_path / "out")
    assert "pip install -r requirements/cut.txt" in line and "faster_whisper" in line


def test_help_imports_nothing_heavy():
    code, printed, errors = script("-X", "importtime", "data/cut.py", "--help")
    assert code == 0 and "--max_cer" in printed
    modules = {line.split("|")[-1].strip() for line in errors.splitlines()}
    assert not modules & {"torch", "transformers", "faster_whisper", "scipy"}


def test_silero_finds_the_same_speech(tmp_path):
    vad = pytest.importorskip("faster_whisper.vad", reason="make cut installs it")
    truth = record(tmp_path / "a.wav")
    found = find_speech(*detect_speech(tmp_path / "a.wav", truth[-1][1] + 0.4, vad.get_vad_model()))
    for start, end, _ in truth:
        assert np.abs(found[:, 0] - start).min() < 0.1 and np.abs(found[:, 1] - end).min() < 0.1
