"""What can be measured of speech: silence, pace, word errors, likeness, mean opinion score."""

import math
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import numpy as np
import soxr
from transformers.models.whisper import english_normalizer

from orpheus.audio import read_audio
from orpheus.settings import UserError
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, TAG

BY_ITSELF = "ended by itself"
CUT_OFF = "cut off at the limit without an end token (raise --max_seconds)"


MAX_LENGTH, MIN_LENGTH = 2.5, 0.4  # of speech, as multiples of what the voice would take
MAX_SILENCE = 1.5  # seconds
LOOP_FRAMES = 24  # two seconds: the longest period of a loop, and the shortest loop


def detect_failure(codes: np.ndarray, text: str, pace: float | None) -> str:
    """Describe what has gone wrong so far, judging by the codes alone; empty if nothing has.

    It is a loop when the codes of slot 0, the coarsest, have repeated with a period of up to two
    seconds, at least three times and for at least two seconds.

    Args:
        codes: (frames, 7).
        pace: of the voice, in seconds a character.
    """
    seconds = len(codes) * FRAME_SAMPLES / SAMPLE_RATE
    expected = len(text) * (pace or 0)
    if pace and seconds > MAX_LENGTH * expected + 1:
        return f"runaway: {seconds:.1f} s, the voice would take {expected:.1f} s"
    coarse = codes[-3 * LOOP_FRAMES :, 0].tolist()
    for period in range(1, LOOP_FRAMES + 1):
        span = period * max(3, math.ceil(LOOP_FRAMES / period))
        last = coarse[-span:]
        if len(last) == span and last[period:] == last[:-period]:
            return f"loop: {period} frames repeated over the last {span}"
    return ""


def longest_silence(audio: np.ndarray) -> float:
    """Return the seconds of the longest stretch that is 40 dB below the loudest 20 ms, or more."""
    blocks = audio[: len(audio) // 480 * 480].reshape(-1, 480)  # 20 ms each
    levels = np.sqrt((blocks**2).mean(axis=1))
    loud = np.flatnonzero(np.concatenate([[True], levels > levels.max() / 100, [True]]))
    return float((np.diff(loud) - 1).max()) * 480 / SAMPLE_RATE


Judge = Callable[[np.ndarray, str], dict[str, float]]  # (samples at 24 kHz, text) → scores


def resample_to_16_khz(audio: np.ndarray) -> np.ndarray:
    return soxr.resample(audio, SAMPLE_RATE, 16_000)


def judge_words(whisper: str, recordings: list) -> Judge:
    """Return a judge of word and character error rates, by faster-whisper's transcript.

    `whisper` is a size or a folder. Tags such as <laugh> do not count as words.
    """
    import jiwer
    from faster_whisper import WhisperModel

    basic = english_normalizer.BasicTextNormalizer()
    english = english_normalizer.EnglishTextNormalizer({})
    try:
        model = WhisperModel(whisper, compute_type="int8")
    except (OSError, ValueError, RuntimeError) as error:
        fault = "is neither a folder of faster-whisper nor a size that can be downloaded"
        raise UserError(f"--whisper {whisper} {fault}") from error

    def judge(audio, text):
        padded = np.pad(resample_to_16_khz(audio), 8_000)  # half a second of silence at each end
        segments, info = model.transcribe(padded, temperature=0, condition_on_previous_text=False)
        transcript = " ".join(segment.text for segment in segments)
        normalize = english if info.language == "en" else basic
        # every digit a word, otherwise "5631" and "5, 6, 3, 1" have nothing in common
        reference, hypothesis = (
            re.sub(r"(?<=\d)(?=\d)", " ", normalize(words)).strip()
            for words in (TAG.sub(" ", text), transcript)
        )
        if not reference:
            return {}
        return {"wer": jiwer.wer(reference, hypothesis), "cer": jiwer.cer(reference, hypothesis)}

    return judge


def judge_voice(whisper: str, recordings: list) -> Judge:
    """Return a judge of likeness: the cosine, −1 to 1, of Resemblyzer's embedding to the mean of
    the recordings'. A recording is a file or its bytes.
    """
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder(verbose=False)

    def embed(audio):
        return encoder.embed_utterance(preprocess_wav(audio, source_sr=SAMPLE_RATE))

    voice = np.mean([embed(read_audio(recording)[0]) for recording in recordings], axis=0)

    def judge(audio, text):
        if not audio.any():  # its normalised samples would be NaN
            return {}
        return {"likeness": float(embed(audio) @ voice / np.linalg.norm(voice))}

    return judge


def judge_sound(whisper: str, recordings: list) -> Judge:
    """Return a judge of how clean speech sounds: DNSMOS's overall mean opinion score, 1 to 5."""
    from speechmos import dnsmos

    def judge(audio, text):
        clipped = np.clip(resample_to_16_khz(audio), -1, 1)
        return {"mos": float(dnsmos.run(clipped, sr=16_000)["ovrl_mos"])}

    return judge


# For each judge the scores it gives, and the modules it needs with their names on PyPI.
JUDGES = {
    "word errors": (judge_words, {"faster_whisper": "faster-whisper", "jiwer": "jiwer"}),
    "likeness": (judge_voice, {"resemblyzer": "resemblyzer 'setuptools<81'"}),
    "DNSMOS": (judge_sound, {"speechmos": "speechmos onnxruntime"}),
}


def load_judges(whisper: str | None, recordings: list) -> tuple[list[Judge], list[str]]:
    """Load the judges whose packages are installed.

    Args:
        whisper: faster-whisper's model, a size or a folder; None is "base", if it is to be had.
        recordings: of the voice; without any there is no likeness.

    Returns:
        The judges, and the names of the scores that cannot be computed, each with what to install
        or to give for it.
    """
    judges, missing = [], []
    for name, (load_judge, packages) in JUDGES.items():
        to_install = [pip_name for module, pip_name in packages.items() if not find_spec(module)]
        if to_install:
            missing.append(f"{name} (pip install {' '.join(to_install)})")
        elif load_judge is judge_voice and not recordings:
            missing.append(f"{name} (needs recordings of the voice)")
        else:
            try:
                judges.append(load_judge(whisper or "base", recordings))
            except UserError as error:
                if whisper:
                    raise
                missing.append(f"{name} ({error})")
    return judges, missing


def measure(
    audio: np.ndarray, text: str, pace: float | None, judges: Iterable[Judge] = ()
) -> dict[str, float]:
    """Return the scores of (samples,) that should say `text`.

    They are the silence in seconds, the pace as a multiple of the voice's `pace` (seconds a
    character) if that is known, and the scores of the judges.
    """
    scores = {"silence": longest_silence(audio)}
    if pace:
        scores["pace"] = len(audio) / SAMPLE_RATE / len(text) / pace
    for judge in judges:
        scores |= judge(audio, text)
    return scores


def rejection_reason(end: str, scores: dict[str, float]) -> str:
    """Return why speech that ended like this should not be kept; empty if it may be."""
    if end != BY_ITSELF:
        return end
    if scores["silence"] > MAX_SILENCE:
        return f"silence of {scores['silence']:.1f} s"
    if scores.get("pace", 1) < MIN_LENGTH:
        return f"too short: {scores['pace']:.2f} × the voice's length"
    return ""
