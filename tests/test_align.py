"""orpheus/align.py: words that were heard, and the text that was read aloud."""

import difflib
from importlib.util import find_spec

import pytest

from orpheus import recording as align
from orpheus.recording import Word, count_edits, edits, letters, read_script


def use_difflib(monkeypatch):
    """difflib in the place of rapidfuzz, where that is not installed."""
    if not find_spec("rapidfuzz"):

        def edits(source, target):
            return difflib.SequenceMatcher(None, source, target, autojunk=False).get_opcodes()

        monkeypatch.setattr(align, "edits", edits)


@pytest.fixture(autouse=True)
def without_packages(monkeypatch):
    numbers = {"12": ["twelve", "twelfth"], "1455": ["one thousand", "fourteen fifty-five"]}
    monkeypatch.setattr(align, "read_number", lambda digits, language: numbers[digits])
    use_difflib(monkeypatch)


def say(text):
    """Words of one second each."""
    return [Word(n, n + 1, f" {word}") for n, word in enumerate(text.split())]


def aligned(heard, text):
    return "".join(word.text for word in align.align(say(heard), text)).strip()


PLAIN = "the art of printing is older than the books that we know in all the towns of the north"


def test_edits_are_the_fewest():
    pytest.importorskip("rapidfuzz", reason="make cut installs it")
    assert edits(["a", "b", "c"], ["a", "x", "c"]) == [
        ("equal", 0, 1, 0, 1),
        ("replace", 1, 2, 1, 2),
        ("equal", 2, 3, 2, 3),
    ]
    assert count_edits("kitten", "sitting") == 3


def test_letters_leave_out_case_accents_and_punctuation():
    assert letters("Perché, l’État-Major?") == "perchéletatmajor".replace("é", "e")


def test_spelling_punctuation_and_case_are_those_of_the_text():
    text = (
        "The Art of “Printing” is older than the books—that we know—in all the Towns of the North."
    )
    assert aligned(PLAIN, text) == text
    assert [word.start for word in align.align(say(PLAIN), text)] == list(range(19))


def test_words_heard_wrongly_are_corrected():
    heard = PLAIN.replace("printing", "prin ting").replace("towns", "downs").replace("than", "then")
    assert aligned(heard, PLAIN) == PLAIN


def test_the_first_and_last_word_may_be_heard_wrongly():
    assert aligned("tha " + PLAIN[4:-5] + "nort", PLAIN) == PLAIN


def test_heads_and_page_numbers_that_were_not_spoken_are_left_out():
    words = PLAIN.split()
    text = " ".join(words[:5]) + "\n\nCHAPTER II\nThe Printed Book\n\n" + " ".join(words[5:9])
    text += "\n12\n" + " ".join(words[9:15]) + " [Pg 13]\n* * *\n_" + " ".join(words[15:]) + "_"
    assert aligned(PLAIN, text) == PLAIN


def test_a_head_that_was_spoken_stays():
    words = PLAIN.split()
    text = " ".join(words[:5]) + "\n\nChapter Two\n\n" + " ".join(words[5:])
    assert aligned(text, text).split() == text.split()
    assert aligned(text.replace("Two", "too"), text).split() == text.split()


def test_what_is_not_in_the_text_has_no_words():
    notice = "this is a public recording made by volunteers "
    placed = align.align(say(notice + PLAIN), PLAIN)
    assert placed[0].start == len(notice.split()) and len(placed) == len(PLAIN.split())


def test_only_the_passage_that_was_read_is_taken():
    other = "another chapter of which nobody has read a word of all the towns " * 30
    assert aligned(PLAIN, f"{other}\n\n{PLAIN}\n\n{other}") == PLAIN


def test_numbers_are_written_as_they_were_read():
    heard = f"{PLAIN} in about fourteen fifty five he had twelve books in the house"
    text = f"{PLAIN} in about 1,455, he had 12 books in the house"
    expected = f"{PLAIN} in about fourteen fifty-five, he had twelve books in the house"
    assert aligned(heard, text) == expected
    assert aligned(heard.replace("twelve", "twelf"), text) == expected


def test_how_numbers_may_be_read(monkeypatch):
    pytest.importorskip("num2words", reason="make cut installs it")
    monkeypatch.undo()
    assert "fourteen fifty-five" in align.read_number("1455", "en")
    assert "one four five five" in align.read_number("1455", "en")
    assert align.read_number("1455", "xx") == ["1455"]


def test_times_within_a_gap_follow_the_letters():
    heard = say("the art of print ing is older than the books")
    placed = align.align(heard, "the art of printing is older than the books")
    assert (placed[3].start, placed[3].end) == (3, 5)


def test_nothing_heard_and_nothing_in_common():
    assert align.align([], PLAIN) == []
    assert align.align(say("seven"), PLAIN) == []


def test_a_word_ends_at_a_dash():
    words, lines = read_script("Yes — no--never.\n— — —\n12")
    assert words == [" Yes —", " no--", "never.", " 12"] and lines == [0, 0, 0, 2]
