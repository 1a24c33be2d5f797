"""Reading, trimming and measuring recordings, and writing them whole or while they grow."""

import contextlib
import hashlib
import io
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from orpheus.files import atomic_file
from orpheus.settings import Settings, UserError
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE

MAX_SECONDS = 600  # of a clip
BLOCK_SECONDS = 60  # of a recording that are read at once
MAX_PEAK = 10  # times full scale; a recording above that was saved with the wrong scale
NEED_FFMPEG = (".m4a", ".m4b", ".mp4", ".aac", ".webm", ".wma")  # libsndfile does not read them


class ClipError(UserError):
    """Why a clip cannot be used; `reason` is the few words under which the report counts it."""

    def __init__(self, message: str, reason: str = "broken row"):
        super().__init__(message)
        self.reason = reason


def wav_data_bytes(file: BinaryIO) -> tuple[int, int] | None:
    """(bytes of samples that a RIFF header declares, bytes that the file holds after it).

    libsndfile reads a wav that is cut short without an error. None for other formats, and for the
    sizes near 2 GiB and more that programs declare when they write into a pipe.
    """
    head = file.read(12)
    while head[:4] == b"RIFF" and head[8:] == b"WAVE" and len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            start = file.tell()
            return (size, file.seek(0, os.SEEK_END) - start) if size < 0x7FFF0000 else None
        file.seek(size + size % 2, os.SEEK_CUR)
    return None


@contextlib.contextmanager
def open_audio(source: Path | bytes) -> Iterator[soundfile.SoundFile]:
    """Opens a recording in any format of libsndfile, from a file or its bytes.

    Raises `ClipError` for one that cannot be read, and for a wav that holds less audio than its
    header declares, as after a download that broke off. Names the recording in any `ClipError` that
    is raised while it is open.
    """
    if isinstance(source, Path) and not os.path.isfile(source):
        kind = "folder" if os.path.isdir(source) else "pipe or a device"
        fault = f"is a {kind}, not an audio file" if os.path.exists(source) else "does not exist"
        raise ClipError(f"{source} {fault}", "no such file")
    name = "its audio" if isinstance(source, bytes) else source
    try:
        if isinstance(source, Path) and source.suffix.lower() in NEED_FFMPEG:
            remedy = f"ffmpeg -i {source.name} {source.with_suffix('.flac').name}"
            raise ClipError(f"cannot be read here; convert it: {remedy}", "unreadable")
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            declared, held = wav_data_bytes(file) or (0, 0)
            file.seek(0)
            # libsndfile tells some mp3s by their suffix alone; a name need not be valid UTF-8
            opened = file if isinstance(source, bytes) else os.fsencode(source)
            with soundfile.SoundFile(opened) as sound:
                if sound.frames == 2**63 - 1:  # a FLAC that was written into a pipe
                    fault = "its header does not say how long it is; convert it to wav"
                    raise ClipError(fault, "unreadable")
                if declared > held > 0:
                    check_complete(round(sound.frames * declared / held), sound.frames, sound)
                yield sound
    except ClipError as error:
        raise ClipError(f"{name}: {error}", error.reason) from None
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", None) or error.strerror
        fault = f"{name}: not audio that libsndfile reads: {reason}"
        raise ClipError(fault, "unreadable") from None


def check_complete(declared: int, held: int, sound: soundfile.SoundFile) -> None:
    """`ClipError` if a file holds fewer samples than its header declares, by over 0.1 s."""
    rate = sound.samplerate
    if declared - held > rate / 10:
        sizes = f"the header says {declared / rate:.1f} s, the file holds {held / rate:.1f} s"
        raise ClipError(f"cut short: {sizes}; copy it again", "cut short")


def read_blocks(sound: soundfile.SoundFile, seconds: int = BLOCK_SECONDS) -> Iterator[np.ndarray]:
    """Yields an open recording in blocks of (samples,), mono; the last one is shorter.

    Raises `ClipError` where it is cut short or damaged, and for samples that are not numbers or far
    over full scale.
    """
    size, last = seconds * sound.samplerate, False
    while not last:
        try:
            block = sound.read(size, dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError as error:
            fault = f"the header says {sound.frames / sound.samplerate:.1f} s: {error.error_string}"
            raise ClipError(f"cut short or damaged: {fault}; copy it again", "cut short") from None
        last = len(block) < size
        if last:
            check_complete(sound.frames, sound.tell(), sound)
        if not np.isfinite(block).all():
            raise ClipError("samples that are not numbers (NaN or infinite)", "unreadable")
        if (peak := np.abs(block).max(initial=0)) > MAX_PEAK:
            fault = f"samples of up to {peak:.3g}, far over full scale (1.0); scale it down"
            raise ClipError(fault, "far over full scale")
        yield block


def read_audio(source: Path | bytes) -> tuple[np.ndarray, int, int]:
    """Reads a clip's recording, from a file or its bytes.

    Returns (samples,) at 24 kHz, mono, float32; the recording's own rate and number of channels.
    Raises `ClipError` for a recording that cannot be used, with what to do about it.
    """
    with open_audio(source) as sound:
        rate = sound.samplerate
        if sound.frames > MAX_SECONDS * rate:
            raise ClipError(f"{sound.frames / rate:.0f} s long; cut it into sentences", "too long")
        # As one block: soundfile seeks between blocks, which hides damage in the middle of a file
        whole = np.concatenate(list(read_blocks(sound, MAX_SECONDS)))
        audio = soxr.resample(whole, rate, SAMPLE_RATE)
        if not len(audio):
            raise ClipError("no samples in it", "unreadable")
    return audio, rate, sound.channels


class Sound(NamedTuple):
    """What is measured of a clip's audio."""

    digest: str = ""  # SHA-256 of the samples that are encoded
    rate: int = SAMPLE_RATE  # Hz, before resampling
    channels: int = 1
    seconds: float = 0.0  # after trimming
    silence: float = 0.0  # seconds cut off at both ends
    level: float = -20.0  # dB, RMS of full scale
    clipped: float = 0.0  # share of samples at full scale
    offset: float = 0.0  # mean of the samples

    @property
    def frames(self) -> int:
        """The codec's frames of the whole clip."""
        return -(-round(self.seconds * SAMPLE_RATE) // FRAME_SAMPLES)


def find_speech(audio: np.ndarray, threshold: float) -> tuple[int, int]:
    """(first, end) of the samples between silent ends.

    Silent are steps of 10 ms that are more than `threshold` dB below the loudest step.
    """
    step = SAMPLE_RATE // 100
    steps = np.pad(audio, (0, -len(audio) % step)).reshape(-1, step)
    power = (steps.astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-threshold / 10))
    return (loud[0] * step, (loud[-1] + 1) * step) if len(loud) else (0, len(audio))


def trim(audio: np.ndarray, settings: Settings) -> np.ndarray:
    """The audio with at most `keep_silence` seconds of silence at either end; null keeps all."""
    if settings.keep_silence is None:
        return audio
    first, end = find_speech(audio, settings.silence_db)
    keep = int(settings.keep_silence * SAMPLE_RATE)
    return audio[max(first - keep, 0) : end + keep]


def measure_clip(source: Path | bytes, settings: Settings) -> tuple[np.ndarray, Sound]:
    """(samples,) of a recording, trimmed, at 24 kHz, and what is measured of them.

    Raises `ClipError` for a recording that cannot be used or is silent.
    """
    whole, rate, channels = read_audio(source)
    audio = trim(whole, settings)
    rms = float(np.sqrt((audio.astype(np.float64) ** 2).mean()))
    if rms < 1e-4:  # -80 dB
        name = "its audio" if isinstance(source, bytes) else source
        raise ClipError(f"{name}: silent throughout", "silent")
    return audio, Sound(
        digest=hashlib.sha256(audio.tobytes()).hexdigest(),
        rate=rate,
        channels=channels,
        seconds=len(audio) / SAMPLE_RATE,
        silence=(len(whole) - len(audio)) / SAMPLE_RATE,
        level=20 * np.log10(rms),
        clipped=float((np.abs(whole) >= 0.999).mean()),
        offset=float(whole.mean()),
    )


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Samples of ±1 as int16. libsndfile would round down; so files and streams are the same."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype("<i2")


@contextlib.contextmanager
def audio_file(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields write(samples), for 24 kHz audio, to a .wav or .flac that is whole or not there."""
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
        raise UserError(f"{path}: cannot be written: {reason}") from None


def wav_header(size: int) -> bytes:
    """The 44 bytes before `size` bytes of 16-bit mono samples at 24 kHz.

    The size is capped at 2³² − 1, which players take for a stream of unknown length. (The standard
    library's `wave` refuses such a size, and writes a header only when samples come.)
    """
    sizes, rate = (min(36 + size, 2**32 - 1), min(size, 2**32 - 1)), SAMPLE_RATE
    fields = (b"RIFF", sizes[0], b"WAVEfmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", sizes[1])
    return struct.pack("<4sI8sIHHIIHH4sI", *fields)


@contextlib.contextmanager
def streamed_audio(out: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields write(samples), for 24 kHz audio that can be heard while it grows.

    `out` is a .wav, whose header is kept up to date; `-`, for a wav on standard output; or `pcm`,
    for bare samples there.
    """
    piped, size = str(out) in ("-", "pcm"), 0
    if not piped and out.suffix != ".wav":
        raise UserError(f"{out}: a stream goes to a .wav, - (standard output) or pcm (bare)")

    def write(audio: np.ndarray) -> None:
        nonlocal size
        samples = to_int16(audio).tobytes()
        file.write(samples)
        size += len(samples)
        if not piped:
            file.seek(0)
            file.write(wav_header(size))
            file.seek(0, os.SEEK_END)
        file.flush()

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = sys.__stdout__.buffer if piped else out.open("wb")
        with contextlib.nullcontext() if piped else file:
            file.write(b"" if str(out) == "pcm" else wav_header(2**32 if piped else 0))
            yield write
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None


PAUSE = 0.25  # seconds between the parts of a long text, added to the silence at their ends
FADE = 240  # samples, 10 ms: parts fade into the pause and out of it, which avoids clicks


def concat_with_pauses(parts: list[Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
    """Joins parts, each an iterable of pieces of (samples,), with pauses; yields pieces."""
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
