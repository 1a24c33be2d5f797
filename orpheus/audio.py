"""Reading, trimming and measuring recordings, and writing them whole or while they grow."""

import contextlib
import hashlib
import io
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from orpheus.files import atomic_file
from orpheus.settings import Settings, UserError
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE

MAX_SECONDS = 600  # of a clip
BLOCK_SECONDS = 60  # of a recording that are read at once
MAX_PEAK = 10  # times full scale; a recording above that was saved with the wrong scale
NEED_FFMPEG = (".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".wma")
# How files begin that libsndfile does not read, or takes for an mp3
FOREIGN = {
    rb".{4}ftyp": "MP4 (as m4a is)",
    rb"\x1aE\xdf\xa3": "WebM or Matroska",
    rb"\xff[\xf0\xf1\xf8\xf9]": "AAC",
    rb"0&\xb2u\x8ef\xcf\x11": "Windows Media",
}
NO_AUDIO = {
    rb"\Z": "an empty file; copy it again",
    rb"version https://git-lfs": "a git-lfs pointer, not the audio; fetch that with git lfs pull",
    rb"\s*<(?i:!doctype|html|\?xml)": "a web page, not audio; download it again",
}
MORE_THAN_ONE = "more than one recording in one file; take them apart"
# How one more recording begins in a file
JOINED = {b"RIFF": b"WAVEfmt ", b"OggS": b"OggS\0\2", b"fLaC": b"fLaC\0\0\0\x22"}
CHUNK = re.compile(rb"\0?[ -~]{4}(.{4})", re.DOTALL)  # behind the samples of a wav
TAIL = re.compile(rb"\0*(\Z|ID3|[ -~]{4})")  # behind these: zeros, a tag, a broken chunk
SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # the start of a frame of an mp3
XING = re.compile(rb"(?:Xing|Info)...[\x01-\xff](....)", re.DOTALL)  # its count of frames
KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # of MPEG 2 and 2.5
KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # of MPEG 1


class ClipError(UserError):
    """Why a clip cannot be used; `reason` is the few words under which the report counts it."""

    def __init__(self, message: str, reason: str = "broken row"):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def open_audio(source: Path | bytes) -> Iterator[soundfile.SoundFile]:
    """Open a recording in any form that libsndfile reads or, where it is installed, ffmpeg.

    Its `frames` are the samples that it holds, even where its header says less. Names the
    recording in any `ClipError` that is raised while it is open.

    Raises:
        ClipError: for what is not a whole recording, with what it is and the remedy.
    """
    if isinstance(source, Path) and not os.path.isfile(source):
        fault = "is a folder, not an audio file" if os.path.isdir(source) else "does not exist"
        raise ClipError(f"{source} {fault}", "no such file")
    name = "its audio" if isinstance(source, bytes) else source
    try:
        with contextlib.ExitStack() as stack:
            yield open_whole(source, stack)
    except ClipError as error:
        raise ClipError(f"{name}: {error}", error.reason) from error
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", None) or error.strerror
        raise ClipError(f"{name}: cannot be read: {reason}", "unreadable") from error


def open_whole(source: Path | bytes, stack: contextlib.ExitStack) -> soundfile.SoundFile:
    """Open a recording so that it can be read to its end; `stack` closes it."""
    data = source
    if isinstance(source, Path):
        with source.open("rb") as file:
            empty = not os.fstat(file.fileno()).st_size
            data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for start, fault in NO_AUDIO.items():
        if re.match(start, data[:100]):
            raise ClipError(fault, "unreadable")
    for start, kind in FOREIGN.items():
        if re.match(start, data[:100], re.DOTALL):
            return open_with_ffmpeg(source, kind, stack)
    if (mark := JOINED.get(data[:4])) and data.find(mark, 16) > 0:
        raise ClipError(MORE_THAN_ONE, "unreadable")
    try:
        # libsndfile tells some mp3s by their suffix alone; a name need not be valid UTF-8
        file = io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)
        sound = stack.enter_context(soundfile.SoundFile(file))
    except soundfile.LibsndfileError as error:
        fault = f"not audio that libsndfile reads: {error.error_string}"
        raise ClipError(fault, "unreadable") from error
    if sound.frames == 2**63 - 1:  # unknown
        return open_with_ffmpeg(source, "FLAC that does not say how long it is", stack)
    mend = mend_wav if data[:4] == b"RIFF" else mend_mp3 if sound.format == "MP3" else None
    if mend and (parts := mend(data, sound)):
        file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        file.writelines(parts)
        file.seek(0)
        sound = stack.enter_context(soundfile.SoundFile(file))
    return sound


def open_with_ffmpeg(
    source: Path | bytes, kind: str, stack: contextlib.ExitStack
) -> soundfile.SoundFile:
    """Open the FLAC that ffmpeg makes of what libsndfile does not read."""
    if not shutil.which("ffmpeg"):
        remedy = "install ffmpeg, or convert it to flac"
        if isinstance(source, Path):
            out = source.with_suffix(".wav" if source.suffix == ".flac" else ".flac")
            remedy += f": ffmpeg -i {source.name} {out.name}"
        raise ClipError(f"{kind}, which libsndfile does not read; {remedy}", "unreadable")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if isinstance(source, bytes):
        (folder / "in").write_bytes(source)
        source = folder / "in"
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", source.absolute(), "-map", "0:a:0"]
    done = subprocess.run([*command, folder / "out.flac"], capture_output=True)
    if errors := done.stderr.decode(errors="replace").splitlines():
        raise ClipError(f"{kind} that is cut short or damaged: {errors[-1]}", "cut short")
    return stack.enter_context(soundfile.SoundFile(folder / "out.flac"))


def check_complete(declared: float, held: float) -> None:
    """Raise `ClipError` if a file holds less, in seconds, than its header says."""
    if declared - held > 0.1:
        sizes = f"the header says {declared:.1f} s, the file holds {held:.1f} s"
        raise ClipError(f"cut short: {sizes}; copy it again", "cut short")


def mend_wav(data: bytes | mmap.mmap, sound: soundfile.SoundFile) -> list | None:
    """Return the parts of a wav with its true size, if its header says less than it holds.

    libsndfile reads what the header says, and a wav that is cut short without an error. Behind
    the samples there may be chunks, tags and zeros. A size of 0 or near 2 GiB and more is that of
    a program that wrote into a pipe.
    """
    at, size, name = 12, 0, b""
    while name != b"data":
        at += size + size % 2
        if len(chunk := data[at : at + 8]) < 8:
            return None
        name, size = struct.unpack("<4sI", chunk)
        at += 8
    end, held = at + size, len(data) - at
    if not size or not held or size >= 0x7FFF0000:
        return None
    second = min(size, held) * sound.samplerate / max(sound.frames, 1)  # in bytes
    check_complete(size / second, held / second)
    while (chunk := CHUNK.match(data, end)) and end < len(data):
        end = chunk.end() + int.from_bytes(chunk[1], "little")
    if TAIL.match(data, end) or (len(data) - end) / second < 0.1:
        return None
    return [data[: at - 4], struct.pack("<I", min(held, 2**32 - 1)), memoryview(data)[at:]]


def mp3_frame_bytes(header: bytes) -> int:
    """Return the size of the frame of an mp3 with this header of four bytes; 0 for no header."""
    if not SYNC.match(header) or header[2] >> 4 in (0, 15) or header[2] >> 2 & 3 == 3:
        return 0
    first, half = header[1] >= 0xFA, header[1] < 0xF0  # MPEG 1; 2.5, of half the rates of 2
    bits = 144_000 * KBPS_1[header[2] >> 4] if first else 72_000 * KBPS_2[header[2] >> 4]
    hertz = (44100, 48000, 32000)[header[2] >> 2 & 3] >> (0 if first else 1 + half)
    return bits // hertz + (header[2] >> 1 & 1)


def mend_mp3(data: bytes | mmap.mmap, sound: soundfile.SoundFile) -> list | None:
    """Return the parts of an mp3 after a header that has its length, if its own does not.

    libsndfile reads as many frames as the Xing header counts, whatever follows, and without one
    as many as it estimates.
    """
    kinds, first, end = Counter(), None, 0
    while found := SYNC.search(data, end):
        at = found.start()
        size = mp3_frame_bytes(header := data[at : at + 4])
        if whole := size and at + size <= len(data) and (at == end or SYNC.match(data, at + size)):
            first = at if first is None else first
            kinds[header[1] | 1, header[2] & 0x0C, header[3] >> 6 == 3] += 1  # version, rate, mono
        end = at + (size if whole else 1)
    if first is None:
        raise ClipError("not audio that libsndfile reads: an mp3 without frames", "unreadable")
    count = max(kinds.values())
    if kinds.total() - count > 9:
        raise ClipError(MORE_THAN_ONE, "unreadable")
    mpeg1, mono = sound.samplerate >= 32_000, sound.channels == 1
    second = sound.samplerate / (1152 if mpeg1 else 576)  # in frames
    if xing := XING.search(data, first, first + 60):
        declared, count = int.from_bytes(xing[1], "big"), count - 1
        check_complete(declared / second, count / second)
        if count - declared < second / 10:
            return None
    header = bytearray(data[first : first + 4])
    first += mp3_frame_bytes(header) if xing else 0
    header[1], header[2] = header[1] | 1, header[2] & 0x0C | 0xE0  # no checksum, the most room
    side = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    info = header + bytes(side) + b"Info" + struct.pack(">II", 1, count)
    return [info.ljust(mp3_frame_bytes(header), b"\0"), memoryview(data)[first:]]


def read_samples(sound: soundfile.SoundFile, count: int) -> np.ndarray:
    """Return the next (samples, channels) of an open recording; fewer than `count` at its end."""
    try:
        samples = sound.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        fault = f"the header says {sound.frames / sound.samplerate:.1f} s: {error.error_string}"
        raise ClipError(f"cut short or damaged: {fault}; copy it again", "cut short") from error
    if not np.isfinite(samples).all():
        raise ClipError("samples that are not numbers (NaN or infinite)", "unreadable")
    if (peak := np.abs(samples).max(initial=0)) > MAX_PEAK:
        fault = f"samples of up to {peak:.3g}, far over full scale (1.0); scale it down"
        raise ClipError(fault, "far over full scale")
    return samples


def read_blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yield an open recording a minute at a time, as (samples, channels); the last is shorter."""
    size, held, block = BLOCK_SECONDS * sound.samplerate, 0, None
    while block is None or len(block) == size:
        block = read_samples(sound, size)
        held += len(block)
        if len(block) < size:
            check_complete(sound.frames / sound.samplerate, held / sound.samplerate)
        yield block


def mix(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return (samples,) of (samples, channels), and whether its channels cancel each other.

    If they do, it is the loudest of them, otherwise their mean. The mean of n channels that have
    nothing in common has 1/n of their power.
    """
    mean, power = samples.mean(axis=1), samples.var(axis=0)
    if mean.var() < power.mean() / len(power) / 2:
        return samples[:, power.argmax()], True
    return mean, False


class Sound(NamedTuple):
    """What is measured of a clip's audio."""

    digest: str = ""  # SHA-256 of the samples that are encoded
    rate: int = SAMPLE_RATE  # Hz, before resampling
    channels: int = 1
    cancelling: bool = False  # the channels cancel each other, and one of them was taken
    seconds: float = 0.0  # after trimming
    silence: float = 0.0  # seconds cut off at both ends
    level: float = -20.0  # dB, RMS of full scale
    clipped: float = 0.0  # share of samples at full scale
    offset: float = 0.0  # mean of the samples

    @property
    def frames(self) -> int:
        """The codec's frames of the whole clip."""
        return -(-round(self.seconds * SAMPLE_RATE) // FRAME_SAMPLES)


def read_audio(
    source: Path | bytes, start: float | None = None, duration: float | None = None
) -> tuple[np.ndarray, Sound]:
    """Return the samples of a recording, (samples,) at 24 kHz, and what it was before.

    With `start` and `duration`, in seconds, those of a segment of it. Raises `ClipError` for a
    recording that cannot be used, with what to do about it.
    """
    with open_audio(source) as sound:
        rate, frames = sound.samplerate, sound.frames
        first = round((start or 0) * rate)
        count = frames - first if duration is None else round(duration * rate)
        if first + count > frames + rate / 10 and abs(frames - count) < rate / 2:
            first, count = 0, frames  # cut out already: the times are those of its source
        if first < 0 or count < rate / SAMPLE_RATE or first + count > frames + rate / 10:
            span = f"from {first / rate:.2f} to {(first + count) / rate:.2f} s"
            fault = f"no samples in it {span}: it has {frames / rate:.2f} s"
            raise ClipError(fault, "no samples")
        if count > MAX_SECONDS * rate:
            raise ClipError(f"{count / rate:.0f} s long; cut it into sentences", "too long")
        if first:
            sound.seek(first) if sound.seekable() else read_samples(sound, first)
        # As one block: soundfile seeks between blocks, which hides damage in the middle of a file
        samples = read_samples(sound, count)
        check_complete(min(count, frames - first) / rate, len(samples) / rate)
        mono, cancelling = mix(samples)
        audio = soxr.resample(mono, rate, SAMPLE_RATE)
        return audio, Sound(rate=rate, channels=sound.channels, cancelling=cancelling)


def pack_samples(samples: Any, rate: Any) -> bytes:
    """Return the bytes of an audio file of samples: an array or lists, with up to two axes.

    Integers are of 16 or 32 bits; the shorter axis is that of the channels.
    """
    try:
        array, file = np.asarray(samples), io.BytesIO()
        if array.dtype.kind == "i":
            array = array / (2**15 if np.abs(array).max(initial=0) <= 2**15 else 2**31)
        array = array.T if array.ndim == 2 and len(array) < array.shape[1] else array
        # AU, since the header of a wav with floats has the time in it
        soundfile.write(file, array.astype(np.float32), int(rate), format="AU", subtype="FLOAT")
    except (TypeError, ValueError, IndexError, soundfile.LibsndfileError) as error:
        raise ClipError(f"no samples at a rate: {error}", "unreadable") from error
    return file.getvalue()


def find_speech(audio: np.ndarray, threshold: float) -> tuple[int, int]:
    """Return the first sample after the silence at the start, and the first of that at the end.

    Silent are steps of 10 ms that are more than `threshold` dB below the loudest step, measured
    without a DC offset.
    """
    step = SAMPLE_RATE // 100
    steps = np.pad(audio - audio.mean(), (0, -len(audio) % step)).reshape(-1, step)
    power = (steps.astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-threshold / 10))
    return (loud[0] * step, (loud[-1] + 1) * step) if len(loud) else (0, len(audio))


def trim(audio: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the audio with at most `keep_silence` seconds of silence at either end; null: all."""
    if settings.keep_silence is None:
        return audio
    first, end = find_speech(audio, settings.silence_db)
    keep = int(settings.keep_silence * SAMPLE_RATE)
    return audio[max(first - keep, 0) : end + keep]


def measure_clip(
    source: Path | bytes,
    settings: Settings,
    start: float | None = None,
    duration: float | None = None,
) -> tuple[np.ndarray, Sound]:
    """Return the trimmed samples of a recording at 24 kHz, and what is measured of them.

    With `start` and `duration`, in seconds, of a segment of it. Raises `ClipError` for one that
    cannot be used or is silent.
    """
    whole, sound = read_audio(source, start, duration)
    audio = trim(whole, settings)
    rms = float(audio.std(dtype=np.float64))
    if rms < 1e-4:  # -80 dB
        name = "its audio" if isinstance(source, bytes) else source
        raise ClipError(f"{name}: silent throughout", "silent")
    return audio, sound._replace(
        digest=hashlib.sha256(audio.tobytes()).hexdigest(),
        seconds=len(audio) / SAMPLE_RATE,
        silence=(len(whole) - len(audio)) / SAMPLE_RATE,
        level=20 * np.log10(rms),
        clipped=float((np.abs(whole) >= 0.999).mean()),
        offset=float(whole.mean()),
    )


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Return samples of ±1 as int16, rounded; libsndfile would round down."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype("<i2")


@contextlib.contextmanager
def audio_file(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield write(samples), for 24 kHz audio, to a .wav or .flac that is whole or not there."""
    kind = path.suffix[1:].upper()
    if kind not in ("WAV", "FLAC"):
        raise UserError(f"{path}: end the name in .wav or .flac")
    try:
        with (
            atomic_file(path) as part,
            soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format=kind) as file,
        ):
            yield lambda audio: file.write(to_int16(audio))
    except soundfile.LibsndfileError as error:
        # Code 2 is an error of the system, which libsndfile does not name.
        reason = "the disk may be full" if error.code == 2 else error.error_string
        raise UserError(f"{path}: cannot be written: {reason}") from error


def wav_header(size: int) -> bytes:
    """Return the 44 bytes before `size` bytes of int16 samples; 2³² − 1 if that is unknown."""
    sizes, rate = (min(36 + size, 2**32 - 1), min(size, 2**32 - 1)), SAMPLE_RATE
    fields = (b"RIFF", sizes[0], b"WAVEfmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", sizes[1])
    return struct.pack("<4sI8sIHHIIHH4sI", *fields)


@contextlib.contextmanager
def streamed_audio(out: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield write(samples), for 24 kHz audio that can be heard while it grows.

    `out` is a .wav, whose header tells its length at the end; `-`, for a wav on standard output;
    or `pcm`, for bare samples there.
    """
    piped = str(out) in ("-", "pcm")
    if not piped and out.suffix != ".wav":
        raise UserError(f"{out}: a stream goes to a .wav, - (standard output) or pcm (bare)")

    def write(audio: np.ndarray) -> None:
        file.write(to_int16(audio).tobytes())
        file.flush()

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = sys.__stdout__.buffer if piped else out.open("wb")
        with contextlib.nullcontext() if piped else file:
            file.write(b"" if str(out) == "pcm" else wav_header(2**32))
            yield write
            if not piped:
                header = wav_header(file.tell() - 44)
                file.seek(0)
                file.write(header)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


PAUSE = 0.25  # seconds between the parts of a long text, added to the silence at their ends
FADE = 240  # samples, 10 ms: parts fade into the pause and out of it, which avoids clicks


def concat_with_pauses(parts: list[Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
    """Join parts, each an iterable of pieces of (samples,), with pauses; yield pieces."""
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    pause = np.zeros(int(PAUSE * SAMPLE_RATE), dtype=np.float32)
    for n, pieces in enumerate(parts):
        tail = None  # the last 10 ms, held back until it is known whether a pause follows
        for piece in pieces:
            if n and tail is None:
                piece = np.concatenate([piece[:FADE] * ramp, piece[FADE:]])
            tail = piece if tail is None else np.concatenate([tail, piece])
            yield tail[:-FADE]
            tail = tail[-FADE:]
        assert tail is not None, "a part without a frame"
        yield tail if n == len(parts) - 1 else np.concatenate([tail * ramp[::-1], pause])
