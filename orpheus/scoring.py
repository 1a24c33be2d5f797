"""What can be told of a sound: silence, pace, word errors, likeness, mean opinion score."""

import dataclasses
import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from orpheus.audio import read_audio
from orpheus.models import device
from orpheus.settings import UserError
from orpheus.tokens import FRAME_SAMPLES, SAMPLE_RATE, SLOTS

BY_ITSELF = "ended by itself"
CUT_OFF = "cut off at the limit: no end came (--max_seconds)"


@dataclass
class Utterance:
    """One text on its way through the model: what goes in, and what came of it."""

    text: str
    prompt: list[int]
    max_frames: int  # frames: max_seconds, or what the model's context leaves
    candidate: int = 0  # each has random numbers of its own
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)  # (7,) codes each
    end: str = ""  # how it ended, empty while it speaks; whoever looks on may end it, too
    audio: np.ndarray | None = None  # (samples,) of its frames, once they are decoded

    @property
    def codes(self) -> np.ndarray:
        return np.array(self.frames, dtype=np.int64).reshape(-1, SLOTS)  # (frames, 7)


SLOW, FAST, SILENCE = 2.5, 0.4, 1.5  # × the voice's own length, twice; seconds


def detect_failure(row: Utterance, pace: float | None) -> str:
    """What has gone wrong with it so far, by its frames alone; empty where nothing has.

    `pace` is the voice's, in seconds a character. A loop: slot 0, the coarsest, has repeated
    its last codes (up to two seconds of them) three times, or more until they are two seconds.
    """
    seconds, usual = len(row.frames) * FRAME_SAMPLES / SAMPLE_RATE, len(row.text) * (pace or 0)
    if pace and seconds > SLOW * usual + 1:
        return f"runaway: {seconds:.1f} s where the voice takes {usual:.1f}"
    coarse = [int(frame[0]) for frame in row.frames[-72:]]
    for period in range(1, 25):
        span = period * max(3, -(-24 // period))
        last = coarse[-span:]
        if len(last) == span and last[period:] == last[:-period]:
            return f"loop: {period} frames over and over for {span}"
    return ""


def longest_silence(audio: np.ndarray) -> float:
    """Seconds in one go at 40 dB or more under the loudest 20 ms, the sound's ends included."""
    blocks = audio[: len(audio) // 480 * 480].reshape(-1, 480)
    loud = np.sqrt((blocks**2).mean(axis=1))
    edges = np.flatnonzero(np.concatenate([[True], loud > loud.max() / 100, [True]]))
    return float((np.diff(edges) - 1).max()) * 480 / SAMPLE_RATE


def judge_words(whisper: str, _):
    """Word and character error rates of what faster-whisper hears; tags as <laugh> are no words."""
    import jiwer
    from faster_whisper import WhisperModel
    from transformers.models.whisper import english_normalizer

    plain = english_normalizer.BasicTextNormalizer()
    english = english_normalizer.EnglishTextNormalizer({})
    try:
        model = WhisperModel(whisper, compute_type="int8")
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(f"--whisper {whisper}: neither a folder nor to be had: {told}") from None

    def judge(audio, text):
        import soxr

        sound = np.pad(soxr.resample(audio, SAMPLE_RATE, 16_000), 8_000)  # silence at the ends
        told, info = model.transcribe(sound, temperature=0, condition_on_previous_text=False)
        normal = english if info.language == "en" else plain
        pair = (re.sub(r"<\w+>", " ", text), " ".join(part.text for part in told))
        # every digit a word, else "5631" and "5, 6, 3, 1" have nothing in common
        said, heard = (re.sub(r"(?<=\d)(?=\d)", " ", normal(t)).strip() for t in pair)
        return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)} if said else {}

    return judge


def judge_voice(_, clips: list[Path]):
    """Resemblyzer's likeness to the mean of the recordings, −1 to 1."""
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder(device(), verbose=False)

    def embed(audio):
        return encoder.embed_utterance(preprocess_wav(audio, source_sr=SAMPLE_RATE))

    voice = np.mean([embed(read_audio(clip)[0]) for clip in clips], axis=0)
    return lambda audio, text: {"likeness": float(embed(audio) @ voice / np.linalg.norm(voice))}


def judge_sound(*_):
    """DNSMOS's overall mean opinion score, 1 to 5, of how clean it sounds."""
    import soxr
    from speechmos import dnsmos

    def judge(audio, text):
        sound = np.clip(soxr.resample(audio, SAMPLE_RATE, 16_000), -1, 1)
        return {"mos": float(dnsmos.run(sound, sr=16_000)["ovrl_mos"])}

    return judge


JUDGES = {
    "wer, cer": (judge_words, {"faster_whisper": "faster-whisper", "jiwer": "jiwer"}),
    "likeness": (judge_voice, {"resemblyzer": "resemblyzer"}),
    "mos": (judge_sound, {"speechmos": "speechmos onnxruntime"}),
}


def load_judges(whisper: str, recordings: list[Path]) -> list:
    """judge(audio, text) → scores, of each package that is there; tells which are and are not."""
    judges, able, unable = [], ["silence, pace"], []
    for name, (make, packages) in JUDGES.items():
        missing = [pip for module, pip in packages.items() if not find_spec(module)]
        if missing:
            unable.append(f"{name} (pip install {' '.join(missing)})")
        elif make is judge_voice and not recordings:
            unable.append(f"{name} (give recordings: --file metadata.csv)")
        else:
            judges.append(make(whisper, recordings))
            able.append(name)
    print(f"scores   {', '.join(able)}" + (f"; not: {', '.join(unable)}" if unable else ""))
    return judges


def measure(audio: np.ndarray, text: str, pace: float | None, judges) -> dict[str, float]:
    """Scores of one sound: its pace against the voice's, its silence, and what the judges say."""
    scores = {"silence": longest_silence(audio)}
    if pace:
        scores["pace"] = len(audio) / SAMPLE_RATE / len(text) / pace
    for judge in judges or ():
        scores |= judge(audio, text)
    return scores


def format_scores(scores: dict) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def rejection_reason(row: Utterance, scores: dict) -> str:
    """Why a spoken candidate should not be kept; empty where it may be."""
    if row.end != BY_ITSELF:
        return row.end
    if scores["silence"] > SILENCE:
        return f"silence of {scores['silence']:.1f} s"
    return f"too fast: {scores['pace']:.2f} × the voice" if scores.get("pace", 1) < FAST else ""


def rank(row: Utterance, scores: dict) -> tuple:
    """Least is best: no fault, few wrong words, a like voice, a clean sound, the voice's pace."""
    pace = abs(math.log(scores.get("pace", 1)))
    likeness, mos = scores.get("likeness", 0), scores.get("mos", 0)
    return bool(rejection_reason(row, scores)), scores.get("wer", 0), -likeness, -mos, pace
