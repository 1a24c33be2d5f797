"""Reading recordings and writing them, whole or while they grow."""

import contextlib
import fcntl
import io
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from orpheus.settings import UserError
from orpheus.tokens import SAMPLE_RATE

MOST_SECONDS = 600  # of one recording
LOUDEST = 10  # times full scale; a recording above that was saved with the wrong scale


def wav_bytes(file) -> tuple[int, int] | None:
    """(bytes of samples that a RIFF header declares, bytes that the file holds after it).

    None for other formats, and for the huge sizes that programs write into a pipe.
    """
    head = file.read(12)
    while head[:4] == b"RIFF" and head[8:] == b"WAVE" and len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            start = file.tell()
            return (size, file.seek(0, os.SEEK_END) - start) if size < 0x7FFF0000 else None
        file.seek(size + size % 2, os.SEEK_CUR)
    return None


def read_samples(file, where) -> tuple[np.ndarray, int, int]:
    """An open sound file → (samples,) mono at its own rate, the rate, the number of channels.

    Raises `UserError` for a file that holds less sound than its header declares, as after a
    download that broke off.
    """
    import soundfile

    declared, held = wav_bytes(file) or (0, 0)
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        rate, channels, frames = sound.samplerate, sound.channels, sound.frames
        if frames == 2**63 - 1:  # a FLAC that was written into a pipe
            raise UserError(f"{where}: its header does not say how long it is; make it a wav")
        if frames > MOST_SECONDS * rate:
            raise UserError(f"{where}: {frames / rate:.0f} s long; cut it into sentences")
        try:
            audio = sound.read(dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError as error:
            fault = f"cut short or damaged: the header says {frames / rate:.1f} s"
            raise UserError(f"{where}: {fault}: {error.error_string}") from None
    frames = round(len(audio) * declared / held) if declared > held > 0 else frames
    if frames - len(audio) > rate / 10:
        sizes = f"the header says {frames / rate:.1f} s, the file holds {len(audio) / rate:.1f} s"
        raise UserError(f"{where}: cut short: {sizes}")
    return audio, rate, channels


def read_audio(source: Path | bytes) -> tuple[np.ndarray, int, int]:
    """A recording that libsndfile reads → (samples,) at 24 kHz, mono; its own rate and channels."""
    import soundfile
    import soxr

    where = "its audio" if isinstance(source, bytes) else source
    if where is source and not os.path.isfile(source):
        fault = "is a folder, not a sound" if os.path.isdir(source) else "does not exist"
        raise UserError(f"{where} {fault}")
    if where is source and source.suffix.lower() in (".m4a", ".mp4", ".aac", ".webm", ".wma"):
        made = source.with_suffix(".wav").name
        raise UserError(f"{where}: not read here; ffmpeg -i {source.name} {made} makes it a wav")
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            audio, rate, channels = read_samples(file, where)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", None) or error.strerror
        raise UserError(f"{where}: not audio that libsndfile reads: {reason}") from None
    if not np.isfinite(audio).all():
        raise UserError(f"{where}: samples that are not numbers (NaN or infinite)")
    if (peak := np.abs(audio).max(initial=0)) > LOUDEST:
        fault = f"samples of up to {peak:.3g}, far over full scale (1.0)"
        raise UserError(f"{where}: {fault}; scale it down")
    audio = soxr.resample(audio, rate, SAMPLE_RATE)
    if not len(audio):
        raise UserError(f"{where}: no samples in it")
    return audio, rate, channels


@contextlib.contextmanager
def whole_file(path: Path):
    """Yields a path to write to, renamed to `path` once that is done: it is whole or not there.

    What a killed process left is written over by the next one, since the name is always the same.
    It is locked; while another process writes to it, a name of our own is used.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(lock.fileno()), part.stat())
            except OSError:  # another process writes to it, or has just renamed it
                free = False
            if not free:
                part = part.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
            try:
                yield part
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Rounded here, since libsndfile cuts off: so a file and a stream hold the same samples."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype("<i2")


@contextlib.contextmanager
def audio_file(path: Path):
    """write(samples) at 24 kHz to a file of the kind its name ends in, whole or not at all."""
    import soundfile

    kind = path.suffix[1:].upper()
    if kind not in soundfile.available_formats():
        raise UserError(f"{path}: end the name in .wav or .flac")
    try:
        with (
            whole_file(path) as part,
            soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format=kind) as file,
        ):
            yield lambda audio: file.write(to_int16(audio))
    except soundfile.LibsndfileError as error:  # 2: an error of the system, which it does not name
        reason = "the disk may be full" if error.code == 2 else error.error_string
        raise UserError(f"{path}: cannot be written: {reason}") from None


def wav_header(size: int) -> bytes:
    """The 44 bytes before `size` bytes of 16-bit mono samples; 2³² − 1 where they are more."""
    sizes, rate = (min(36 + size, 2**32 - 1), min(size, 2**32 - 1)), SAMPLE_RATE
    fields = (b"RIFF", sizes[0], b"WAVEfmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", sizes[1])
    return struct.pack("<4sI8sIHHIIHH4sI", *fields)


@contextlib.contextmanager
def streamed_audio(out: Path):
    """write(samples) to be heard at once, from a growing wav or standard output."""
    piped, size = str(out) in ("-", "pcm"), 0
    if not piped and out.suffix != ".wav":
        raise UserError(f"{out}: a stream goes to a .wav, - (standard output) or pcm (bare)")

    def write(audio):
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


def make_folder(path: str, name: str) -> None:
    """Makes a folder and tries to write into it; `UserError` names the key that it comes from."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        remedy = f"set --{name} to a folder that can be written"
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None


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
