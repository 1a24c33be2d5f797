"""What can be measured of speech: silence, pace, word errors, likeness, mean opinion score."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import soxr
import torch
from transformers.models.whisper import english_normalizer

from orpheus.audio import read_audio
from orpheus.settings import UserError, first_reason, quiet_libraries
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS, TAG

BY_ITSELF = "ended by itself"
CUT_OFF = "cut off at the limit without an end token (raise --max_seconds)"


@dataclass
class Utterance:
    """A text that is to be spoken, and what has been generated for it."""

    text: str
    prompt: list[int]
    max_frames: int
    candidate: int = 0  # its number among the candidates of a text; each has its own random numbers
    frames: list[np.ndarray] = field(default_factory=list)  # (7,) codes each
    end: str = ""  # how it ended; empty while it is generated, and set to end it early
    audio: np.ndarray | None = None  # (samples,) of its frames, once they are decoded

    @property
    def codes(self) -> np.ndarray:
        """Its frames as (frames, 7) int64."""
        return np.array(self.frames, dtype=np.int64).reshape(-1, SLOTS)


def format_end(rows: list[Utterance]) -> str:
    """How many frames the parts of a text have, and how the first that was cut off ended."""
    frames = sum(len(row.frames) for row in rows)
    cut_off = [row for row in rows if row.end != BY_ITSELF]
    share = f" in {len(cut_off)} of {len(rows)} parts" if cut_off and len(rows) > 1 else ""
    return f"{frames} frames, {cut_off[0].end if cut_off else BY_ITSELF}{share}"


MAX_LENGTH, MIN_LENGTH = 2.5, 0.4  # of speech, as multiples of what the voice would take
MAX_SILENCE = 1.5  # seconds
LOOP_FRAMES = 24  # two seconds: the longest period of a loop, and the shortest loop


def detect_failure(row: Utterance, pace: float | None) -> str:
    """Describes what has gone wrong so far, judging by the frames alone; empty if nothing has.

    `pace` is the voice's, in seconds a character. It is a loop when the codes of slot 0, the
    coarsest, have repeated with a period of up to two seconds, at least three times and for at
    least two seconds.
    """
    seconds = len(row.codes) * FRAME_SAMPLES / SAMPLE_RATE
    expected = len(row.text) * (pace or 0)
    if pace and seconds > MAX_LENGTH * expected + 1:
        return f"runaway: {seconds:.1f} s, the voice would take {expected:.1f} s"
    coarse = row.codes[-3 * LOOP_FRAMES :, 0].tolist()
    for period in range(1, LOOP_FRAMES + 1):
        span = period * max(3, math.ceil(LOOP_FRAMES / period))
        last = coarse[-span:]
        if len(last) == span and last[period:] == last[:-period]:
            return f"loop: {period} frames repeated over the last {span}"
    return ""


def longest_silence(audio: np.ndarray) -> float:
    """Seconds of the longest stretch that is 40 dB or more below the loudest 20 ms."""
    blocks = audio[: len(audio) // 480 * 480].reshape(-1, 480)  # 20 ms each
    levels = np.sqrt((blocks**2).mean(axis=1))
    loud = np.flatnonzero(np.concatenate([[True], levels > levels.max() / 100, [True]]))
    return float((np.diff(loud) - 1).max()) * 480 / SAMPLE_RATE


Judge = Callable[[np.ndarray, str], dict[str, float]]  # (samples at 24 kHz, text) → scores


def resample_to_16_khz(audio: np.ndarray) -> np.ndarray:
    return soxr.resample(audio, SAMPLE_RATE, 16_000)


def judge_words(whisper: str, recordings: list) -> Judge:
    """Word and character error rates of faster-whisper's transcript; `whisper` is a size or folder.

    Tags such as <laugh> do not count as words.
    """
    import jiwer
    from faster_whisper import WhisperModel

    basic = english_normalizer.BasicTextNormalizer()
    english = english_normalizer.EnglishTextNormalizer({})
    try:
        model = WhisperModel(whisper, compute_type="int8")
    except (OSError, ValueError, RuntimeError) as error:
        fault = f"neither a folder nor a size that can be downloaded: {first_reason(error)}"
        raise UserError(f"--whisper {whisper}: {fault}") from None

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
    """Cosine similarity of Resemblyzer's embedding to the mean of the recordings', −1 to 1.

    A recording is a file, its bytes, or (samples,) at 24 kHz.
    """
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder(verbose=False)

    def embed(audio):
        return encoder.embed_utterance(preprocess_wav(audio, source_sr=SAMPLE_RATE))

    sounds = [r if isinstance(r, np.ndarray) else read_audio(r)[0] for r in recordings]
    voice = np.mean([embed(sound) for sound in sounds], axis=0)

    def judge(audio, text):
        if not audio.any():  # its normalised samples would be NaN
            return {}
        return {"likeness": float(embed(audio) @ voice / np.linalg.norm(voice))}

    return judge


def judge_sound(whisper: str, recordings: list) -> Judge:
    """DNSMOS's overall mean opinion score of how clean the speech sounds, 1 to 5."""
    from speechmos import dnsmos

    def judge(audio, text):
        clipped = np.clip(resample_to_16_khz(audio), -1, 1)
        return {"mos": float(dnsmos.run(clipped, sr=16_000)["ovrl_mos"])}

    return judge


def judge_sound_again(whisper: str, recordings: list) -> Judge:
    """Distill-MOS's mean opinion score, 1 to 5: another opinion than DNSMOS's."""
    from distillmos import ConvTransformerSQAModel

    with quiet_libraries():
        model = ConvTransformerSQAModel().eval()

    def judge(audio, text):
        with torch.no_grad():
            score = model(torch.from_numpy(resample_to_16_khz(audio))[None])
        return {"distillmos": float(score)}

    return judge


# For each judge the scores it gives, and the modules it needs with their names on PyPI.
JUDGES = {
    "wer, cer": (judge_words, {"faster_whisper": "faster-whisper", "jiwer": "jiwer"}),
    "likeness": (judge_voice, {"resemblyzer": "resemblyzer"}),
    "mos": (judge_sound, {"speechmos": "speechmos onnxruntime"}),
    "distillmos": (judge_sound_again, {"distillmos": "distillmos"}),
}


def find_judges(whisper: str, recordings: list) -> tuple[list[Judge], list[str], list[str]]:
    """Loads the judges whose packages are installed.

    Args:
        whisper: faster-whisper's model, a size or a folder.
        recordings: of the voice, as `judge_voice` takes them; without any there is no likeness.

    Returns:
        the judges, the names of the scores that there will be, and the names of those that cannot
        be computed, each with what to install or to give for it.
    """
    judges, available, missing = [], ["silence, pace"], []
    for name, (load_judge, packages) in JUDGES.items():
        to_install = [pip_name for module, pip_name in packages.items() if not find_spec(module)]
        if to_install:
            missing.append(f"{name} (pip install {' '.join(to_install)})")
        elif load_judge is judge_voice and not recordings:
            missing.append(f"{name} (give recordings: --file metadata.csv)")
        else:
            try:
                judges.append(load_judge(whisper, recordings))
                available.append(name)
            except (ImportError, OSError) as error:  # torchaudio of another torch, for example
                missing.append(f"{name} (does not load: {first_reason(error)})")
    return judges, available, missing


def load_judges(whisper: str, recordings: list) -> list[Judge]:
    """The judges of `find_judges`; prints which scores there will be, and which there will not."""
    judges, available, missing = find_judges(whisper, recordings)
    print(f"scores   {', '.join(available)}" + (f"; not: {', '.join(missing)}" if missing else ""))
    return judges


def measure(
    audio: np.ndarray, text: str, pace: float | None, judges: list[Judge] | None
) -> dict[str, float]:
    """Scores of (samples,) that should say `text`.

    Returns:
        silence in seconds, the pace as a multiple of the voice's `pace` (seconds a character) if
        that is known, and the scores of the judges.
    """
    scores = {"silence": longest_silence(audio)}
    if pace:
        scores["pace"] = len(audio) / SAMPLE_RATE / len(text) / pace
    for judge in judges or ():
        scores |= judge(audio, text)
    return scores


def format_scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def rejection_reason(row: Utterance, scores: dict[str, float]) -> str:
    """Why a candidate should not be kept; empty if it may be."""
    if row.end != BY_ITSELF:
        return row.end
    if scores["silence"] > MAX_SILENCE:
        return f"silence of {scores['silence']:.1f} s"
    if scores.get("pace", 1) < MIN_LENGTH:
        return f"too short: {scores['pace']:.2f} × the voice's length"
    return ""


def rank(row: Utterance, scores: dict[str, float]) -> tuple:
    """A sort key, lowest for the best candidate.

    It compares, in this order: no reason to reject it, word errors, likeness, mean opinion score,
    and how close the pace is to the voice's.
    """
    pace = abs(math.log(scores.get("pace", 1)))
    likeness, mos = scores.get("likeness", 0), scores.get("mos", 0)
    return bool(rejection_reason(row, scores)), scores.get("wer", 0), -likeness, -mos, pace


def choose_best(candidates: list[Utterance], pace: float | None, judges=()) -> Utterance:
    """Scores the decoded candidates of a text; prints why any failed, and returns the best."""
    ranks, reasons = [], []
    for row in candidates:
        scores = measure(row.audio, row.text, pace, judges)
        ranks.append(rank(row, scores))
        if reason := rejection_reason(row, scores):
            reasons.append(f"candidate {row.candidate + 1}, {reason}")
    best = candidates[ranks.index(min(ranks))]
    kept = f"kept candidate {best.candidate + 1} of {len(candidates)}, {len(reasons)} failed"
    print(f"{best.text[:40]!r}: {kept}{': ' if reasons else ''}{'; '.join(reasons)}")
    return best
