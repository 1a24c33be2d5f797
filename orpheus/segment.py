"""Speech and its words → clips: where to cut, and what to keep.

All times are in seconds from the start of a recording.
"""

from typing import NamedTuple

import numpy as np

from orpheus.doctor import find_outliers
from orpheus.recording import SPEECH_RATE, STEP, Word, count_edits, letters

SPEECH, QUIET = 0.5, 0.35  # probabilities at which speech starts and ends, as in silero-vad
SHORTEST_PAUSE = 0.13  # shorter gaps are closures within words
LATE, PAUSE_STEPS = 13, 5  # steps: by how much speech may start earlier; what a pause keeps
KEEP = 0.2  # of the silence at both ends of a clip
SHORTEST, SHORT, LONG, LONGEST = 2.0, 5.0, 12.0, 20.0  # of a clip: limits, and what is aimed at
WINDOW = 28.0  # of speech transcribed at once; Whisper pads every window to 30
CONFIDENCE = 0.75  # geometric mean of Whisper's word probabilities, below which a clip is rejected
GAP = 0.8  # seconds of speech in which no word was heard: up to 0.7 by inexact times, 1.4 by a lack
ODD_PACE = 4.0  # robust z-score; data/prepare.py names clips over 5


class Segment(NamedTuple):
    """A piece of a recording: a clip where `reason` is empty, otherwise rejected."""

    start: float
    end: float
    text: str
    heard: str
    cer: float | None  # character error rate between what was heard and the text that was given
    reason: str


def find_speech(probabilities: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(runs, 2) starts and ends of speech, with a pause between any two.

    `levels` are those of the steps, in dB.
    """
    changes = np.flatnonzero(np.diff(np.pad(probabilities >= QUIET, 1))).reshape(-1, 2)
    runs = [run for run in changes if probabilities[slice(*run)].max() >= SPEECH]
    if not runs:
        return np.empty((0, 2))
    runs = np.array(advance_starts(runs, levels)) * STEP / SPEECH_RATE
    runs = join_runs(runs, runs[1:, 0] - runs[:-1, 1] < SHORTEST_PAUSE)
    return runs[runs[:, 1] - runs[:, 0] > 0.1]  # shorter: a click


def advance_starts(runs: list, levels: np.ndarray) -> list[tuple[int, int]]:
    """The runs of steps, each starting with the loud steps just before it.

    After silence or music Silero was seen to notice a voice up to 0.3 s late.
    """
    usual = np.median(np.concatenate([levels[slice(*run)] for run in runs]))
    advanced, last = [], 0
    for start, end in runs:
        before = levels[max(last, start - LATE) : start][::-1]
        loud = before > max(usual - 20, before.min(initial=0) + 10)
        advanced.append((start - int(np.argmin(np.append(loud, False))), end))
        last = end + PAUSE_STEPS
    return advanced


def join_runs(runs: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """The runs with those after which `joined` is true made one with the next."""
    starts, ends = runs[np.r_[True, ~joined], 0], runs[np.r_[~joined, True], 1]
    return np.stack([starts, ends], axis=1)


def add_margins(speech: np.ndarray) -> np.ndarray:
    """(runs, 2): each with up to `KEEP` seconds of the pauses beside it, half of each at most."""
    pauses = np.r_[speech[:1, 0] * 2, speech[1:, 0] - speech[:-1, 1], np.inf]
    margins = np.minimum(KEEP, pauses / 2)
    return speech + np.stack([-margins[:-1], margins[1:]], axis=1)


def make_windows(speech: np.ndarray) -> list[tuple[float, float]]:
    """Spans of up to `WINDOW` seconds to transcribe, which end in the longest pause near that.

    A run that is too long for a clip is left out.
    """
    fits = speech[:, 1] - speech[:, 0] <= LONGEST
    outer, speech = add_margins(speech)[fits], speech[fits]
    windows, first = [], 0
    while first < len(speech):
        start = speech[first, 0]
        last = int(np.searchsorted(speech[:, 1], start + WINDOW, side="right"))
        pauses = np.append(speech[first + 1 :, 0], np.inf) - speech[first:, 1]
        if (long := np.flatnonzero(pauses[: last - first] > 3)).size:
            last = first + int(long[0]) + 1
        elif last < len(speech):
            late = int(np.searchsorted(speech[first:last, 1], start + WINDOW / 2))
            last = first + late + int(np.argmax(pauses[late : last - first])) + 1
        windows.append((float(outer[first, 0]), float(outer[last - 1, 1])))
        first = last
    return windows


def join_within_words(speech: np.ndarray, heard: list[Word]) -> np.ndarray:
    """The runs without the pauses under 0.3 s that lie within a word that was heard."""
    starts, ends = (np.array([getattr(w, name) for w in heard]) for name in ("start", "end"))
    before, after = speech[:-1, 1], speech[1:, 0]
    word = np.searchsorted(starts, before - 0.05) - 1  # the last that starts before the pause
    within = (word >= 0) & (np.append(ends, -np.inf)[word] > after + 0.05)
    return join_runs(speech, within & (after - before < 0.3))


def split_words(words: list[Word], cuts: np.ndarray) -> list[list[Word]]:
    """The words of each run: those whose middle is before its cut."""
    runs = [[] for _ in cuts]
    for word in words:
        runs[np.searchsorted(cuts, (word.start + word.end) / 2)].append(word)
    return runs


def longest_gaps(speech: np.ndarray, heard: list[list[Word]]) -> np.ndarray:
    """(runs,) the longest time in each run of speech in which no word was heard."""
    longest = []
    for (start, end), words in zip(speech.tolist(), heard, strict=True):
        ends = [start, *(word.end for word in words)]
        starts = [*(word.start for word in words), end]
        longest.append(max(b - a for a, b in zip(ends, starts, strict=True)))
    return np.array(longest)


def cut_costs(pauses: np.ndarray, words: list[list[Word]], language: str) -> np.ndarray:
    """(runs,) what a cut after each run costs: 0 after a sentence, 1 after a comma, otherwise 2.

    One more after a pause of under 0.2 s. The last run is followed by the end.
    """
    flat = [word for run in words for word in run]
    ends = np.append(find_sentence_ends(flat, language), True)
    commas = np.array([word.text.rstrip("\"'”’»)")[-1:] in ",;:–—" for word in flat] + [True])
    last = np.cumsum(list(map(len, words))) - 1
    costs = np.where(ends[last], 0, np.where(commas[last], 1, 2)) + (pauses < 0.2)
    return np.append(costs[:-1], 0)


def find_sentence_ends(words: list[Word], language: str) -> np.ndarray:
    """(words,) whether a sentence ends after each, by the rules of the language."""
    from sentencex import segment

    ends = np.cumsum([len(word.text) for word in words], dtype=int)
    lengths = map(len, segment(language, "".join(word.text for word in words)))
    after = np.cumsum([0, *lengths])  # the space between two sentences belongs to the first
    return np.isin(ends, np.concatenate([after, after - 1]))


def judge(
    start: float,
    end: float,
    heard: list[Word],
    given: list[Word] | None,
    gap: float,
    max_cer: float,
) -> Segment:
    """The segment of these words; its text is the words given, or else those that were heard.

    `gap` is its longest time of speech without a word.
    """
    sound = "".join(word.text for word in heard).strip()
    text = sound if given is None else "".join(word.text for word in given).strip()
    cer, reason = None, ""
    if given is not None:
        cer = count_edits(letters(sound), letters(text)) / max(1, len(letters(text)))
    if not letters(sound):
        reason = "no words heard"
    elif given is not None and cer > max(max_cer, 0.5):
        reason = "not in the text"
    elif given is not None and cer > max_cer:
        reason = "words differ from the text"
    elif end - start < SHORTEST:
        reason = "too short"
    elif end - start > LONGEST:
        reason = "too long without a pause"
    elif gap > GAP:
        reason = "speech without words"
    elif given is None and np.log([max(w.score, 1e-9) for w in heard]).mean() < np.log(CONFIDENCE):
        reason = "low confidence"
    return Segment(start, end, text, sound, cer, reason)


def segment_cost(segment: Segment, pauses: np.ndarray) -> float:
    """What a segment with these pauses in it costs: its seconds, if it is rejected.

    Otherwise up to 1 for a length outside of `SHORT` to `LONG`, and what its pauses have over 1 s.
    """
    seconds = segment.end - segment.start
    if segment.reason:
        return seconds
    length = max(0, (SHORT - seconds) / 3, (seconds - LONG) / 8)
    return length + float(np.maximum(pauses - 1, 0).sum()) + 0.1


def choose_cuts(
    speech: np.ndarray,
    heard: list[Word],
    given: list[Word] | None = None,
    max_cer: float = 0.1,
    language: str = "en",
) -> list[Segment]:
    """The segments of a recording, which together hold all of its speech.

    Of all ways to cut it at pauses, the cheapest is taken, by dynamic programming over
    `segment_cost` and `cut_costs`. `given` are the words of the text, with their times.
    """
    if not len(speech):
        return []
    speech = join_within_words(speech, heard)
    outer = add_margins(speech).tolist()
    pauses = np.append(speech[1:, 0] - speech[:-1, 1], np.inf)
    cuts = speech[:, 1] + pauses / 2  # after each run
    heard = split_words(heard, cuts)
    given = None if given is None else split_words(given, cuts)
    written = heard if given is None else given
    cost_after, gaps = cut_costs(pauses, written, language), longest_gaps(speech, written)
    best = [(0.0, 0, None)]  # up to each run: the cost, the last segment's first run, the segment
    for j in range(1, len(speech) + 1):
        ways = []
        for i in range(j - 1, -1, -1):
            start, end = outer[i][0], outer[j - 1][1]
            if end - start > LONGEST and i < j - 1:
                break
            words = [w and [x for run in w[i:j] for x in run] for w in (heard, given)]
            segment = judge(start, end, *words, gaps[i:j].max(), max_cer)
            cost = segment_cost(segment, pauses[i : j - 1]) + cost_after[j - 1]
            ways.append((best[i][0] + cost, i, segment))
        best.append(min(ways, key=lambda way: way[0]))
    segments, j = [], len(speech)
    while j:
        _, j, segment = best[j]
        segments.append(segment)
    return segments[::-1]


def reject_odd_pace(segments: list[Segment]) -> list[Segment]:
    """Rejects clips whose seconds for so many characters are far from the recording's own.

    Words that were not heard, or invented, show in this, whatever the text's source.
    """
    kept = [segment for segment in segments if not segment.reason]
    pace = np.log([(s.end - s.start) / (len(s.text) + 10) for s in kept])
    odd = find_outliers(pace, np.zeros(len(kept)), ODD_PACE) > 0
    rejected = {s: s._replace(reason="odd pace") for s, far in zip(kept, odd, strict=True) if far}
    return [rejected.get(segment, segment) for segment in segments]
