"""orpheus/audio.py: kinds of recordings, recordings that are cut short or too loud, trimming."""

import io
import resource
import shutil
import struct
import subprocess

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

from orpheus.audio import audio_file, measure_clip, pack_samples, read_audio, trim
from orpheus.settings import UserError


def noise_of(seconds=2.0, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, int(24_000 * seconds))


def sound_of(seconds=2.0, seed=0, **how):
    file = io.BytesIO()
    soundfile.write(file, noise_of(seconds, seed), 24_000, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    "how",
    [
        {"format": "WAV"},
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "WAV", "subtype": "ALAW"},
        {"format": "WAV", "subtype": "IMA_ADPCM"},
        {"format": "WAV", "subtype": "GSM610"},
        {"format": "WAVEX"},
        {"format": "FLAC"},
        {"format": "MP3"},
    ],
    ids=str,
)
def test_a_sound_that_is_cut_short(how, tmp_path):
    data = sound_of(**how)
    audio, _ = read_audio(data)
    assert abs(len(audio) - 48_000) < 2_400
    with pytest.raises(UserError, match=r"cut short.*: the header says 2\.[01] s"):
        read_audio(data[: len(data) // 2])
    if how["format"] not in ("FLAC", "MP3"):
        assert len(read_audio(data[:-20])[0]) > 47_000  # a few samples do not matter


def test_sizes_that_are_unknown_are_not_cut_short():
    """As programs leave them that write into a pipe."""
    data = bytearray(sound_of(format="WAV"))
    for size in (2**32 - 1, 2**31 - 1, 2**31 - 1 - 36):
        data[40:44] = struct.pack("<I", size)
        assert len(read_audio(bytes(data))[0]) == 48_000


def without_length(flac):
    """A FLAC as it is written into a pipe."""
    flac = bytearray(flac)
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    return bytes(flac)


def test_a_header_that_says_less_than_the_file_holds():
    """A recorder that was killed, or wrote its header too early; tags and chunks are no samples."""
    wav = bytearray(sound_of(4.5, format="WAV"))
    whole = read_audio(bytes(wav))[0]
    wav[40:44] = struct.pack("<I", 52_800)
    assert np.array_equal(read_audio(bytes(wav))[0], whole)
    wav = bytearray(sound_of(4.5, format="WAV", subtype="IMA_ADPCM"))
    at = wav.index(b"data") + 4
    wav[at : at + 4] = struct.pack("<I", 16_384)
    assert abs(len(read_audio(bytes(wav))[0]) - 108_000) < 2_400
    short = sound_of(0.5, format="WAV")
    picture = b"id3 " + struct.pack("<I", 200_000) + bytes(range(250)) * 800
    for tail in (
        picture,
        b"\0" * 90_000,
        b"ID3\4" + picture,
        b"TAG" + picture,
        b"LIST" + picture[4:],
    ):
        assert len(read_audio(short + tail)[0]) == 12_000


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_files_that_hold_two_recordings_are_named(form):
    with pytest.raises(UserError, match="more than one recording in one file"):
        read_audio(sound_of(format=form) + sound_of(format=form, seed=1))


def mp3_of(seconds=2.0, seed=0, xing=False, **how):
    """An mp3, with or without the frame that says how long it is."""
    data = sound_of(seconds, seed, format="MP3", **how)
    return data if xing else data[data.index(b"\xff\xf3", 1) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_is_read_to_its_end_whatever_its_header_says(mode):
    how = {"bitrate_mode": mode}
    quiet_then_loud = np.append(np.zeros(24_000), noise_of(2.0))
    file = io.BytesIO()
    soundfile.write(file, quiet_then_loud, 24_000, format="MP3", **how)
    data = file.getvalue()
    bare = data[data.index(b"\xff\xf3", 1) :]
    picture = b"ID3\4\0\0\0\2\0\0" + bytes(32_768)
    tag = b"TAG" + bytes(125)
    for data in (bare, picture + bare, bare + tag, bare + b"APETAGEX" + bytes(50_000) + tag):
        audio = read_audio(data)[0]
        assert abs(len(audio) - 72_000) < 2_400
        assert audio[-24_000:-2_400].std() > 0.05
    for first, second in ((False, False), (True, True), (True, False)):
        joined = mp3_of(xing=first, **how) + mp3_of(1.5, seed=1, xing=second, **how)
        assert abs(len(read_audio(joined)[0]) - 84_000) < 4_800
    file = io.BytesIO()
    soundfile.write(file, noise_of(2.0), 48_000, format="MP3")
    with pytest.raises(UserError, match="more than one recording in one file"):
        read_audio(mp3_of(**how) + file.getvalue())


def test_a_segment_of_a_recording(tmp_path):
    for form in ("a.wav", "a.flac", "a.ogg", "a.mp3"):
        soundfile.write(tmp_path / form, noise_of(5.0), 24_000)
        whole = read_audio(tmp_path / form)[0]
        segment = read_audio(tmp_path / form, 1.5, 2.0)[0]
        assert np.abs(segment - whole[36_000:84_000]).max() < 1e-3, form
        assert abs(len(read_audio(tmp_path / form, 4.0)[0]) - (len(whole) - 96_000)) < 2
    soundfile.write(tmp_path / "b.wav", noise_of(5.0), 24_000, subtype="GSM610")  # cannot seek
    segment = read_audio(tmp_path / "b.wav", 1.5, 2.0)[0]
    assert np.array_equal(segment, read_audio(tmp_path / "b.wav")[0][36_000:84_000])
    for start, duration in ((6, 1), (4, 2), (5.0, None), (1, 0), (-1, 2)):
        with pytest.raises(UserError, match=r"a\.wav: no samples in it .*: it has 5\.00 s"):
            read_audio(tmp_path / "a.wav", start, duration)
    for start, duration in ((70, 4.9), (0, 5.2)):  # cut out already: these are times of the source
        assert len(read_audio(tmp_path / "a.wav", start, duration)[0]) == 120_000
    _, sound = measure_clip(tmp_path / "a.wav", settings("x"), 1.5, 2.0)
    assert sound.seconds == 2.0


@pytest.mark.parametrize("offset", [0.005, -0.1])
def test_silence_is_measured_without_a_dc_offset(offset):
    silence = np.random.default_rng(1).normal(0, 1e-4, 48_000)
    audio = np.concatenate([silence, noise_of(1.0), silence]) + offset
    _, sound = measure_clip(pack_samples(audio, 24_000), settings("x", keep_silence=0.1))
    assert 3.7 < sound.silence < 3.9 and sound.offset == pytest.approx(offset, abs=1e-3)
    with pytest.raises(UserError, match="silent throughout"):
        measure_clip(pack_samples(np.full(24_000, offset), 24_000), settings("x"))


def test_channels_that_cancel_each_other(tmp_path, tokenizer):
    mono = noise_of(1.0)
    noise(tmp_path / "plain.wav", seed=3, channels=2)
    for name, right in (("a", -mono), ("b", -0.7 * mono), ("c", 0.99 * -mono + 0.01)):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([mono, right], 1), 24_000)
        audio, sound = read_audio(tmp_path / f"{name}.wav")
        assert sound.cancelling and np.abs(audio - mono).max() < 1e-3
    names = ("a", "b", "c", "plain")
    folder_of(tmp_path, [(f"{name}.wav", name, "") for name in names])
    _, report = rows_of(tmp_path, tokenizer, leave_out="[]")
    found = {name: len(report.findings.get(name, ())) for name in ("cancelling", "stereo")}
    assert found == {"cancelling": 3, "stereo": 1}


def test_samples_that_are_decoded_already():
    mono = noise_of(0.5).astype("f4")
    for samples in (
        mono,
        mono.tolist(),
        mono[None],
        np.stack([mono, mono]),
        np.stack([mono] * 2, 1),
    ):
        data = pack_samples(samples, 24_000)
        assert np.abs(read_audio(data)[0] - mono).max() < 1e-6
        assert data == pack_samples(samples, 24_000)
    for whole in ((mono * 2**15).astype("i2"), (mono * 2**15).astype(int).tolist()):
        assert np.abs(read_audio(pack_samples(whole, 24_000))[0] - mono).max() < 1e-4
    assert read_audio(pack_samples(mono, 16_000))[1].rate == 16_000
    for samples, rate in (
        (["a"], 24_000),
        ([[1.0, 2.0], [3.0]], 24_000),
        (mono, None),
        (mono, 0),
        (3.0, 9),
    ):
        with pytest.raises(UserError, match="no samples at a rate"):
            pack_samples(samples, rate)


@pytest.mark.parametrize(
    "start, fault",
    [
        (
            b"\0\0\0\x1cftypM4A ",
            r"MP4 \(as m4a is\), which libsndfile does not read; install ffmpeg",
        ),
        (b"\xff\xf1\x50\x80", "AAC, which libsndfile"),
        (b"\x1aE\xdf\xa3", "WebM or Matroska, which"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"", r"an empty file; copy it again"),
        (b"some text", "not audio that libsndfile reads"),
    ],
)
@pytest.mark.parametrize("suffix", [".mp3", ".wav"])
def test_sound_files_that_are_not_what_their_names_say(start, fault, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(start + bytes(9_000) * bool(start))
    with pytest.raises(UserError, match=fault) as caught:
        read_audio(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if "libsndfile does not" in str(caught.value):
        assert f"ffmpeg -i a{suffix} a.flac" in str(caught.value)
    with pytest.raises(UserError, match=fault):
        read_audio(path.read_bytes())


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
@pytest.mark.parametrize("form", ["a.m4a", "a.aac", "a.webm", "a.mp4", "a.mka"])
def test_what_ffmpeg_reads(form, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise_of(), 24_000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / form]
    subprocess.run(command, check=True)
    data = (tmp_path / form).read_bytes()
    for source in (tmp_path / form, data):
        audio = read_audio(source)[0]
        assert abs(len(audio) - 48_000) < 2_400 and audio.std() > 0.05
    with pytest.raises(UserError, match="cut short or damaged"):
        read_audio(data[: len(data) // 2])


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_ffmpeg_reads_a_flac_without_a_length(tmp_path, monkeypatch):
    data = without_length(sound_of(format="FLAC"))
    assert np.array_equal(read_audio(data)[0], read_audio(sound_of(format="FLAC"))[0])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="FLAC that does not say how long it is, which"):
        read_audio(data)


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
    audio, _ = read_audio(path)
    assert abs(len(audio) - 48_000) < 4_800


def test_damage_in_the_middle_of_a_long_clip_is_noticed(tmp_path):
    """Read in blocks, what is lost behind it would be made up by reading a part twice."""
    data = bytearray(sound_of(80.0, format="OGG"))
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)
    (tmp_path / "a.ogg").write_bytes(data)
    with pytest.raises(UserError, match="cut short"):
        read_audio(tmp_path / "a.ogg")
