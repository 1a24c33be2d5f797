"""Words that were heard and the text that was read aloud → the words of the text, with times."""

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

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
