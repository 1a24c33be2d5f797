"""Words that were heard and the text that was read aloud → the words of the text, with times."""

import re
import unicodedata
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ISLAND = 5  # words that are found in a row; fewer, far from all others, are there by chance
FAR = 50  # words of the text between two that were heard one after the other: it was not read on


class Word(NamedTuple):
    start: float  # seconds
    end: float
    text: str  # with its punctuation and the space before it
    score: float = 1.0  # probability


class Token(NamedTuple):
    """A part of a word, as words are compared: forty-two has two."""

    letters: str
    word: int  # its word's index
    start: float = np.nan
    end: float = np.nan


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
    """The words of a text, and the line that each stands in.

    Marks of emphasis and page marks in brackets are left out; a dash by itself belongs to the word
    before it.
    """
    text = re.sub(r"[\[{(](?:(?:pg|page|p)\.?\s*)?\d+[\]})]|[_*|]", "", text, flags=re.IGNORECASE)
    words, lines = [], []
    for n, line in enumerate(text.splitlines()):
        for word in line.split():
            if letters(word):
                words.append(word)
                lines.append(n)
            elif words and lines[-1] == n and re.fullmatch("[-–—…]+", word):
                words[-1] += f" {word}"
    return words, lines


def split_tokens(words: list[Word]) -> list[Token]:
    """Tokens of words, each with its share of the word's time by letters."""
    tokens = []
    for n, word in enumerate(words):
        parts = [part for part in map(letters, re.split(r"[-–—/]", word.text)) if part]
        times = np.cumsum([0, *map(len, parts)]) / max(1, sum(map(len, parts)))
        times = word.start + (word.end - word.start) * times
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
    one, other = spoken[i].letters, script[j].letters
    return count_edits(one, other) <= max(len(one), len(other)) / 2


def drop_unspoken(gap: list[int], heard: str, script: list[Token], lines: list[int]) -> list[int]:
    """The tokens of a gap in the text without whole lines that were not spoken.

    Those are chapter heads, page numbers and the like: what was heard resembles the rest more.
    """
    for line in dict.fromkeys(lines[script[j].word] for j in gap):
        inside = [j for j in gap if lines[script[j].word] == line]
        first, last = inside[0], inside[-1]
        if first and lines[script[first - 1].word] == line:
            continue
        if last + 1 < len(script) and lines[script[last + 1].word] == line:
            continue
        rest = [j for j in gap if j not in inside]
        with_line, without = ("".join(script[j].letters for j in g) for g in (gap, rest))
        if count_edits(heard, without) < count_edits(heard, with_line):
            gap = rest
    return gap


def letter_times(tokens: list[Token], before: Token, after: Token) -> np.ndarray:
    """(letters + 1,) seconds at which each letter of the tokens starts, and the end of the last."""
    if not tokens:
        return np.array([(before.end + after.start) / 2])
    starts = [np.linspace(t.start, t.end, len(t.letters), endpoint=False) for t in tokens]
    return np.append(np.concatenate(starts), tokens[-1].end)


def place_gap(spoken: list[Token], gap: list[int], script: list[Token], times: np.ndarray) -> None:
    """Times for the tokens between two that agree, by the letters that agree the most."""
    before, *heard, after = spoken
    source, target = ("".join(t.letters for t in g) for g in (heard, [script[j] for j in gap]))
    operations = edits(source, target)
    corners = [op[3] for op in operations] + [len(target)], [op[1] for op in operations]
    at = np.cumsum([0] + [len(script[j].letters) for j in gap])
    at = np.interp(at, corners[0], corners[1] + [len(source)])
    known = letter_times(heard, before, after)
    at = np.interp(at, np.arange(len(known)), known)
    times[gap] = np.stack([at[:-1], at[1:]], axis=1)


def align(heard: list[Word], text: str) -> list[Word]:
    """The words of `text` that were spoken, with the times at which they were heard.

    Where the text has a number in digits, the words that were heard in its place are taken.
    """
    words, lines = read_script(text)
    script = split_tokens([Word(0, 0, word) for word in words])
    spoken, times = split_tokens(heard), np.full((len(script), 2), np.nan)
    for island in match(spoken, script):
        for i, j in island:
            times[j] = spoken[i].start, spoken[i].end
        for (i0, j0), (i1, j1) in pairwise(island):
            between, gap = spoken[i0 : i1 + 1], list(range(j0 + 1, j1))
            gap = drop_unspoken(gap, "".join(t.letters for t in between[1:-1]), script, lines)
            numbers = [j for j in gap if script[j].letters.isdecimal()]
            if numbers == gap and gap and len(between) > 2:
                indexes = dict.fromkeys(token.word for token in between[1:-1])
                spelled = "".join(heard[n].text for n in indexes).strip(" .,;:!?")
                ending = re.search(r"\W*$", words[script[gap[-1]].word])[0]
                words[script[gap[0]].word], gap = spelled + ending, gap[:1]
            elif len(between) == 2:
                gap = [j for j in gap if j not in numbers]
            if gap:
                place_gap(between, gap, script, times)
    return [
        Word(float(t[0][0]), float(t[-1][1]), f" {word}")
        for word, t in zip(words, group_times(script, times, len(words)), strict=True)
        if len(t)
    ]


def group_times(script: list[Token], times: np.ndarray, words: int) -> list[np.ndarray]:
    """The (tokens, 2) times of each word, those that are known."""
    groups = [[] for _ in range(words)]
    for token, pair in zip(script, times, strict=True):
        if not np.isnan(pair[0]):
            groups[token.word].append(pair)
    return groups
