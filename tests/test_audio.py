"""orpheus/audio.py: kinds of recordings, recordings that are cut short or too loud, trimming."""

import io
import resource
import struct

import numpy as np
import pytest
import soundfile
from clip_folders import (
    folder_of,
    noise,
    rows_of,
    settings,
    two_clips,
)

from orpheus.audio import audio_file, read_audio, trim
from orpheus.settings import UserError


def sound_of(seconds=2.0, **how):
    audio = np.random.default_rng(0).normal(0, 0.1, int(24_000 * seconds))
    file = io.BytesIO()
    soundfile.write(file, audio, 24_000, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    "how",
    [
        {"format": "WAV"},
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "WAV", "subtype": "ALAW"},
        {"format": "WAV", "subtype": "IMA_ADPCM"},
        {"format": "WAVEX"},
        {"format": "FLAC"},
        {"format": "MP3"},
    ],
    ids=str,
)
def test_a_sound_that_is_cut_short(how, tmp_path):
    data = sound_of(**how)
    audio, _, _ = read_audio(data)
    assert abs(len(audio) - 48_000) < 2_400
    with pytest.raises(UserError, match=r"cut short.*: the header says 2\.0 s"):
        read_audio(data[: len(data) // 2])
    if how["format"] not in ("FLAC", "MP3"):
        assert len(read_audio(data[:-20])[0]) > 47_000  # a few samples do not matter


def test_sizes_that_are_unknown_are_not_cut_short():
    """As programs leave them that write into a pipe."""
    data = bytearray(sound_of(format="WAV"))
    for size in (2**32 - 1, 2**31 - 1, 2**31 - 1 - 36):
        data[40:44] = struct.pack("<I", size)
        assert len(read_audio(bytes(data))[0]) == 48_000
    flac = bytearray(sound_of(format="FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    with pytest.raises(UserError, match="does not say how long it is"):
        read_audio(bytes(flac))


@pytest.mark.parametrize("peak, kept", [(0.9, True), (3.0, True), (1e4, False), (1e30, False)])
def test_samples_over_full_scale(peak, kept, tmp_path, tokenizer):
    two_clips(tmp_path)
    audio = np.random.default_rng(0).uniform(-peak, peak, 24_000)
    soundfile.write(tmp_path / "a.wav", audio, 24_000, subtype="FLOAT")
    folder_of(tmp_path, [("a.wav", "one", ""), ("b.wav", "two", "")])
    rows, report = rows_of(tmp_path, tokenizer)
    assert len(rows) == 1 + kept
    assert ("clipped" in report.findings) == (peak == 3.0)
    if not kept:
        assert "a.wav: samples of up to 1e+" in report.left_out[0]
        assert report.reasons == {"far over full scale": 1}


def test_kinds_of_sound_files(tmp_path, tokenizer):
    noise(tmp_path / "a.wav", rate=44_100, channels=2)
    noise(tmp_path / "b.flac", rate=16_000)
    noise(tmp_path / "c.mp3", rate=22_050)
    noise(tmp_path / "d.ogg", rate=48_000, format="OGG", subtype="VORBIS")
    noise(tmp_path / "e.opus", rate=48_000, format="OGG", subtype="OPUS")
    folder_of(
        tmp_path, [(f"{n}", "seven", "") for n in ("a.wav", "b.flac", "c.mp3", "d.ogg", "e.opus")]
    )
    rows, report = rows_of(tmp_path, tokenizer, voice="me")
    assert report.left_out == [] and report.voices == {"me": 5}
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) - min(lengths) <= 7  # an encoder may pad by some milliseconds


def test_rare_kinds_of_sound(tmp_path, tokenizer):
    draw = np.random.default_rng(0)
    kinds = {"u8": "PCM_U8", "double": "DOUBLE", "alaw": "ALAW", "ulaw": "ULAW", "int": "PCM_32"}
    for name, subtype in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", draw.normal(0, 0.1, 12_000), 24_000, subtype)
    soundfile.write(tmp_path / "many.wav", draw.normal(0, 1, (12_000, 200)), 24_000)
    soundfile.write(tmp_path / "fast.wav", draw.normal(0, 0.1, 1), 192_000)
    names = [*kinds, "many", "fast"]
    folder_of(tmp_path, [(f"{name}.wav", name, "") for name in names])
    rows, report = rows_of(tmp_path, tokenizer, leave_out="[]")
    assert len(rows) + len(report.left_out) == len(names) and len(rows) >= 6
    assert "many" in [row["text"] for row in rows]


def test_trimming_keeps_a_short_tail():
    chosen = settings("x", keep_silence=0.1)
    speech = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    hiss = np.random.default_rng(1).normal(0, 0.0003, 24_000).astype(np.float32)
    audio = np.concatenate([hiss, speech, hiss])
    assert abs(len(trim(audio, chosen)) - 1.2 * 24_000) <= 480
    chosen.keep_silence = None
    assert len(trim(audio, chosen)) == 72_000


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """The system refuses to write more than 100 KB, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"a\.wav: cannot be written: the disk may be full"),
            audio_file(tmp_path / "a.wav") as write,
        ):
            for _ in range(10):
                write(np.zeros(24_000, "f4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_sounds_are_written_as_wav_or_flac_alone(tmp_path):
    ending = pytest.raises(UserError, match=r"end the name in \.wav or \.flac")
    with ending, audio_file(tmp_path / "a.mp3"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_mp3_that_libsndfile_tells_by_its_suffix_alone(tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(bytes(3000) + sound_of(format="MP3"))
    audio, _, _ = read_audio(path)
    assert abs(len(audio) - 48_000) < 4_800


def test_damage_in_the_middle_of_a_long_clip_is_noticed(tmp_path):
    """Read in blocks, what is lost behind it would be made up by reading a part twice."""
    data = bytearray(sound_of(80.0, format="OGG"))
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)
    (tmp_path / "a.ogg").write_bytes(data)
    with pytest.raises(UserError, match="cut short"):
        read_audio(tmp_path / "a.ogg")
