"""Long recordings, read in blocks: their level, where there is speech, and the words in it.

Memory does not grow with a recording's length. Times are in seconds from its start.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import soxr

from orpheus.align import Word
from orpheus.audio import BLOCK_SECONDS, ClipError, mix, open_audio, read_blocks
from orpheus.settings import UserError
from orpheus.tokens import SAMPLE_RATE

SPEECH_RATE = 16_000  # Hz, what Silero and Whisper take
STEP = 512  # samples at SPEECH_RATE: the voice activity detector gives one probability for each
LOUDNESS, PEAK = -20.0, -1.0  # LUFS integrated, dBFS: what a recording is brought to


def check_recording(path: Path) -> float:
    """Seconds of a recording; `ClipError` if it cannot be read."""
    with open_audio(path) as sound:
        if not sound.frames:
            raise ClipError("no samples in it", "unreadable")
        return sound.frames / sound.samplerate


def resampled_blocks(path: Path, rate: int) -> Iterator[np.ndarray]:
    """Yields a recording a minute at a time: (samples,) mono at `rate`.

    Raises `ClipError` as `read_blocks` does.
    """
    with open_audio(path) as sound:
        resampler = soxr.ResampleStream(sound.samplerate, rate, 1)
        for block in read_blocks(sound):
            last = len(block) < BLOCK_SECONDS * sound.samplerate
            yield resampler.resample_chunk(mix(block)[0], last=last)


def read_spans(path: Path, rate: int, spans: Iterable) -> Iterator[np.ndarray]:
    """Yields the samples, mono at `rate`, of each (start, end); the starts ascend."""
    blocks, buffer, offset = resampled_blocks(path, rate), np.empty(0, np.float32), 0
    for start, end in spans:
        first, last = round(start * rate), round(end * rate)
        while offset + len(buffer) < last and (block := next(blocks, None)) is not None:
            used = min(max(first - offset, 0), len(buffer))
            buffer, offset = np.concatenate([buffer[used:], block]), offset + used
        yield buffer[first - offset : last - offset]


def block_loudness(audio: np.ndarray) -> list[float]:
    """LUFS of every 400 ms, each 100 ms after the one before."""
    import pyloudnorm

    meter = pyloudnorm.Meter(SAMPLE_RATE)
    if len(audio) < meter.block_size * SAMPLE_RATE:
        return []
    meter.integrated_loudness(audio)
    return meter.blockwise_loudness


def measure_level(path: Path) -> tuple[float, float]:
    """(integrated loudness in LUFS, peak) of a recording; −inf where it is silent.

    The gates are those of ITU-R BS.1770-4: blocks over −70 LUFS, and of these the blocks less than
    10 LU below their mean.
    """
    blocks, peak = [], 0.0
    for audio in resampled_blocks(path, SAMPLE_RATE):
        blocks += block_loudness(audio)
        peak = max(peak, float(np.abs(audio).max(initial=0)))
    power = 10 ** (np.array([level for level in blocks if level >= -70]) / 10)
    power = power[power > power.mean() / 10] if len(power) else power
    return (10 * math.log10(power.mean()) if len(power) else -math.inf), peak


def choose_gain(loudness: float, peak: float) -> float:
    """The factor that brings a recording to `LOUDNESS` without a sample over `PEAK`."""
    if not peak or loudness == -math.inf:
        return 1.0
    return 10 ** (min(LOUDNESS - loudness, PEAK - 20 * math.log10(peak)) / 20)


def detect_speech(path: Path, seconds: float, detect: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(steps,) probabilities of speech and (steps,) levels in dB, each of a `STEP`.

    Read a minute at a time with a second before it as a lead. `detect` takes (samples,) at
    `SPEECH_RATE`, a multiple of `STEP`, and returns a probability for each step.
    """
    block, lead, probabilities, levels = 1875, 32, [], []  # steps: 60 s and about 1 s
    starts = range(0, math.ceil(seconds * SPEECH_RATE / STEP), block)
    spans = [(max(0, n - lead) * STEP, (n + block) * STEP) for n in starts]
    spans = [(start / SPEECH_RATE, end / SPEECH_RATE) for start, end in spans]
    for n, audio in zip(starts, read_spans(path, SPEECH_RATE, spans), strict=True):
        audio = np.pad(audio, (0, -len(audio) % STEP))
        power = (audio.reshape(-1, STEP) ** 2).mean(axis=1)
        probabilities.append(np.ravel(detect(audio))[min(n, lead) :])
        levels.append(10 * np.log10(power[min(n, lead) :] + 1e-12))
    return np.concatenate(probabilities), np.concatenate(levels)


def load_whisper(name: str, language: str | None) -> Callable:
    """listen(audio, language) → (language, words), by faster-whisper; a language of None is heard.

    Digits and symbols are suppressed, so that numbers are written as they are spoken. The score of
    words in a passage that repeats itself, as Whisper's inventions do, is 0.
    """
    import ctranslate2
    from faster_whisper import WhisperModel

    try:
        model = WhisperModel(name, compute_type="int8")
    except (OSError, ValueError, RuntimeError) as error:
        fault = f"neither a folder nor to be had: {error}"
        raise UserError(f"--whisper {name}: {fault}") from error
    if language and language not in model.supported_languages:
        raise UserError(f"--language {language}: {name} does not know it; name another --whisper")
    tokenizer = model.hf_tokenizer
    texts = map(tokenizer.decode, ([n] for n in range(tokenizer.token_to_id("<|endoftext|>"))))
    symbols = [n for n, text in enumerate(texts) if re.search(r"[\d%$£€@#*_{}\[\]\\|^~=+]", text)]

    def listen(audio: np.ndarray, language: str | None) -> tuple[str, list[Word]]:
        ctranslate2.set_random_seed(0)  # a window's words do not depend on those before it
        segments, info = model.transcribe(
            audio,
            language=language,
            temperature=(0, 0.4, 0.8),  # the next where a passage repeats itself or is unlikely
            condition_on_previous_text=False,
            word_timestamps=True,
            suppress_tokens=[-1, *symbols],
        )
        words = [
            Word(word.start, word.end, word.word, word.probability * (s.compression_ratio < 2.4))
            for s in segments
            for word in s.words
        ]
        return info.language, words

    return listen


def transcribe(path: Path, windows: list, listen, language: str | None, saved: Path, show):
    """(language, words) of a recording, a window at a time; show(seconds) follows each.

    Every window's words are appended to the file `saved`, from where a killed run goes on.
    """
    words, done = [], 0
    lines = saved.read_bytes().splitlines(keepends=True) if saved.is_file() else []
    lines = [line for line in lines if line.endswith(b"\n")]  # the last may be incomplete
    for line, window in zip(lines, windows, strict=False):
        *earlier, language, heard = json.loads(line)
        if earlier != list(window):
            break
        words += [Word(*word) for word in heard]
        done += 1
    try:
        with saved.open("wb") as file:
            file.writelines(lines[:done])
            spans = read_spans(path, SPEECH_RATE, windows[done:])
            for (start, end), audio in zip(windows[done:], spans, strict=True):
                language, heard = listen(audio, language)
                heard = [w._replace(start=w.start + start, end=w.end + start) for w in heard]
                words += heard
                file.write(json.dumps([start, end, language, heard]).encode() + b"\n")
                file.flush()
                show(end)
    except OSError as error:
        raise UserError(f"{saved}: cannot be written: {error.strerror}") from None
    return language, words
