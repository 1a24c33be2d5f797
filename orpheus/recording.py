"""Long recordings, read in blocks: level, speech and words; and the words of a text with times.

Memory does not grow with a recording's length. Times are in seconds from its start.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

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


# ---------------------------------------------------------------- words heard → words of a text

ISLAND = 5  # words that are found in a row; fewer, far from all others, are there by chance
NUMBERS = "cardinal", "ordinal", "year"  # the forms of num2words
WORD = re.compile(r" ?[^ ]+?(?:--+|[—–])| ?[^ ]+")  # with the space before it
FAR = 50  # words of the text between two that were heard one after the other: it was not read on


class Word(NamedTuple):
    start: float  # seconds
    end: float
    text: str  # with its punctuation and the space before it
    score: float = 1.0  # probability


@dataclass(eq=False)
class Token:
    """A part of a word, as words are compared: forty-two has two."""

    letters: str
    word: int  # its word's index
    start: float = math.nan
    end: float = math.nan


def letters(text: str) -> str:
    """A text without case, accents, spaces and punctuation."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text.casefold())))


def edits(source, target) -> list[tuple[str, int, int, int, int]]:
    """The fewest edits that turn one sequence into another, as difflib's opcodes."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.opcodes(source, target).as_list()


def count_edits(source: str, target: str) -> int:
    operations = edits(source, target)
    return sum(max(b - a, d - c) for tag, a, b, c, d in operations if tag != "equal")


def read_script(text: str) -> tuple[list[str], list[int]]:
    """The words of a text, with the space before each, and the line that each stands in.

    A word ends at a dash, where a reader may pause. Marks of emphasis and numbers in brackets are
    left out.
    """
    text = re.sub(r"[\[{(](?:(?:pg|page|p)\.?\s*)?\d+[\]})]|[_*|]", "", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,455 is one number
    words, lines = [], []
    for n, line in enumerate(text.splitlines()):
        for part in WORD.findall("".join(f" {word}" for word in line.split())):
            if letters(part):
                words.append(part)
                lines.append(n)
            elif words and lines[-1] == n and re.fullmatch(" ?[-–—…]+", part):
                words[-1] += part
    return words, lines


def split_tokens(words: list[Word]) -> list[Token]:
    """Tokens of words, each with its share of the word's time by letters."""
    tokens = []
    for n, word in enumerate(words):
        parts = [part for part in map(letters, re.split(r"[-–—/]", word.text)) if part]
        times = np.cumsum([0, *map(len, parts)]) / max(1, sum(map(len, parts)))
        times = (word.start + (word.end - word.start) * times).tolist()
        tokens += [Token(part, n, *times[k : k + 2]) for k, part in enumerate(parts)]
    return tokens


def match(spoken: list[Token], script: list[Token]) -> list[list[tuple[int, int]]]:
    """Pairs (spoken, script) of tokens that agree, in islands: passages that were read through.

    An island is extended at both ends by tokens that are alike, which were heard a little wrong.
    """
    operations = edits([t.letters for t in spoken], [t.letters for t in script])
    pairs = [
        (a + n, c + n) for tag, a, b, c, _ in operations if tag == "equal" for n in range(b - a)
    ]
    islands = [[pair] for pair in pairs[:1]]
    for before, pair in pairwise(pairs):
        if pair[1] - before[1] > FAR:
            islands.append([])
        islands[-1].append(pair)
    islands = [i for i in islands if len(i) >= ISLAND] or (islands and [max(islands, key=len)])
    taken = {pair[0] for island in islands for pair in island}
    for island in islands:
        for end, step in ((0, -1), (-1, 1)):
            i, j = island[end]
            while alike(spoken, i := i + step, script, j := j + step) and i not in taken:
                island.insert(0 if step < 0 else len(island), (i, j))
                taken.add(i)
    return islands


def alike(spoken: list[Token], i: int, script: list[Token], j: int) -> bool:
    if not (0 <= i < len(spoken) and 0 <= j < len(script)):
        return False
    heard, written = spoken[i].letters, script[j].letters
    return count_edits(heard, written) <= max(len(heard), len(written)) / 2


def join(tokens: list[Token]) -> str:
    return "".join(token.letters for token in tokens)


def read_number(digits: str, language: str) -> list[str]:
    """How a number may be read aloud: as a count, a rank, a year, or digit by digit."""
    from num2words import num2words

    try:
        ways = [num2words(int(digits), lang=language, to=to) for to in NUMBERS]
        return [*ways, " ".join(num2words(int(digit), lang=language) for digit in digits)]
    except (NotImplementedError, OverflowError):  # a language or a size that num2words lacks
        return [digits]


def spell_numbers(gap: list[Token], heard: str, words: list[str], language: str) -> None:
    """Writes the numbers of a gap in the way that comes nearest to what was heard."""
    for token in gap:
        word = words[token.word]
        if not re.fullmatch("[0-9]{1,12}", token.letters) or re.search(r"[$£€%]", word):
            continue
        digits, ways = token.letters, []
        for reading in read_number(digits, language):
            token.letters = letters(reading)
            ways.append((count_edits(heard, join(gap)), reading))
        _, reading = min(ways, key=lambda way: way[0])
        token.letters, words[token.word] = letters(reading), word.replace(digits, reading, 1)


def drop_unspoken(gap: list[Token], heard: str, lines: list[int], sizes: Counter) -> list[Token]:
    """The tokens of a gap without whole lines that were not spoken: heads, page numbers and such.

    A line was not spoken if what was heard is nearer to the rest. `sizes` has the tokens of lines.
    """
    for line, count in Counter(lines[token.word] for token in gap).items():
        rest = [token for token in gap if lines[token.word] != line]
        if count == sizes[line] and count_edits(heard, join(rest)) < count_edits(heard, join(gap)):
            gap = rest
    return gap


def place(gap: list[Token], heard: list[Token], before: float, after: float) -> None:
    """Times for the tokens of a gap, by the letters that agree the most with those heard in it.

    Where nothing was heard, it is the middle of the time from `before` to `after`.
    """
    operations = edits(join(heard), join(gap))
    corners = [(d, b) for _, _, b, _, d in operations]  # letters of the text, letters heard
    targets, sources = zip((0, 0), *corners, strict=True)
    at = np.cumsum([0] + [len(token.letters) for token in gap])
    at = np.interp(at, targets, sources)
    known = [t for h in heard for t in np.linspace(h.start, h.end, len(h.letters), endpoint=False)]
    known.append(heard[-1].end if heard else (before + after) / 2)
    times = np.interp(at, np.arange(len(known)), known).tolist()
    for token, (start, end) in zip(gap, pairwise(times), strict=True):
        token.start, token.end = start, end


def align(heard: list[Word], text: str, language: str = "en") -> list[Word]:
    """The words of `text` that were spoken, with the times at which they were heard.

    Chapter heads and page numbers that were not spoken are left out, and so is all that was not
    read. Numbers in digits are written as they were read.
    """
    words, lines = read_script(text)
    script = split_tokens([Word(math.nan, math.nan, word) for word in words])
    spoken = split_tokens(heard)
    sizes = Counter(lines[token.word] for token in script)
    for island in match(spoken, script):
        for i, j in island:
            script[j].start, script[j].end = spoken[i].start, spoken[i].end
        for (i0, j0), (i1, j1) in pairwise(island):
            between, gap = spoken[i0 + 1 : i1], script[j0 + 1 : j1]
            spell_numbers(gap, join(between), words, language)
            gap = drop_unspoken(gap, join(between), lines, sizes)
            if gap:
                place(gap, between, spoken[i0].end, spoken[i1].start)
    times = {}
    for token in script:
        if not math.isnan(token.start):
            start, _ = times.get(token.word, (token.start, None))
            times[token.word] = start, token.end
    return [Word(*times[n], words[n]) for n in sorted(times)]
