"""orpheus/comparison.py: intervals against a plain account, the table, the picture."""

import json

import numpy as np
import pytest

from orpheus.comparison import LEGEND, bootstrap, format_table, make_rows, save_table, summarize

TEXTS = ["one", "two three", "one", "four five six", "two three"]


def test_the_bootstrap_equals_a_loop_over_drawn_texts():
    """Against lists in Python: whole texts are drawn, each with the values of all its seeds."""
    values, weights = np.array([0.0, 0.5, 0.25, 1.0, 0.75]), np.array([1.0, 2.0, 1.0, 3.0, 2.0])
    texts, means = sorted(set(TEXTS)), []
    for drawn in np.random.default_rng(0).integers(3, size=(2000, 3)):
        sounds = [n for t in drawn for n, text in enumerate(TEXTS) if text == texts[t]]
        total = sum(weights[n] * values[n] for n in sounds)
        means.append(total / sum(weights[n] for n in sounds))
    mean, low, high = bootstrap(values, weights, TEXTS)
    assert mean == pytest.approx((0 + 1 + 0.25 + 3 + 1.5) / 9)
    assert [low, high] == pytest.approx([np.quantile(means, 0.025), np.quantile(means, 0.975)])
    assert low < mean < high


def test_the_interval_of_means_of_normal_values_is_the_textbook_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = bootstrap(values, np.ones(400), [str(n) for n in range(400)])
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1 * half)


def test_more_seeds_of_the_same_sounds_do_not_narrow_the_interval():
    values, texts = np.random.default_rng(2).random(20), [str(n) for n in range(20)]
    once = bootstrap(values, np.ones(20), texts)
    assert bootstrap(np.tile(values, 3), np.ones(60), texts * 3) == pytest.approx(once)


def test_words_weigh_in_word_errors_and_missing_scores_do_not():
    scores = [
        {"text": "one", "wer": 1.0, "ended": True},
        {"text": "two three four", "wer": 0.0, "ended": False},
        {"text": "<sigh>", "ended": True, "likeness": None},
    ]
    figures = summarize(scores)
    assert list(figures) == ["wer", "ended"]
    assert figures["wer"]["mean"] == 0.25
    assert figures["ended"]["mean"] == pytest.approx(2 / 3)


def sounds(speaker, kind, wer, **scores):
    return [{"speaker": speaker, "kind": kind, "text": "a b", "wer": wer, **scores}]


def example_rows():
    scores = sounds("codec", "held-out", 0.1) + sounds("tuned", "questions", 0.2, ended=True)
    scores += sounds("tuned", "tags", 0.4, ended=False)
    scores += sounds("tuned", "held-out", 0.3, ended=True)
    return make_rows(scores)


def test_the_table_shows_the_floor_beside_the_figures_of_models():
    rows = example_rows()
    assert [(row["texts"], row["speaker"], row["sounds"]) for row in rows] == [
        ("held-out", "codec", 1),
        ("held-out", "tuned", 1),
        ("general", "tuned", 2),
    ]
    assert {kind: figures["wer"]["mean"] for kind, figures in rows[2]["kinds"].items()} == {
        "questions": 0.2,
        "tags": 0.4,
    }
    assert format_table(rows).splitlines() == [
        "| texts | speaker | sounds | word errors, % | ended, % |",
        "|---|---|---|---|---|",
        "| held-out | codec | 1 | 10.0 (10.0 to 10.0) | – |",
        "| held-out | tuned | 1 | 30.0 (30.0 to 30.0) → 10.0 | 100 (100 to 100) |",
        "| general | tuned | 2 | 30.0 (30.0 to 30.0) | 50 (50 to 50) |",
    ]


def test_what_is_saved(tmp_path):
    rows = example_rows()
    save_table(tmp_path, "Evaluation of $x_$", ["Not computed: mos."], {"rows": rows, "seeds": 3})
    parts = (tmp_path / "table.md").read_text().split("\n\n")
    assert parts == ["# Evaluation of $x_$", format_table(rows), LEGEND, "Not computed: mos.\n"]
    assert json.loads((tmp_path / "table.json").read_text()) == {"rows": rows, "seeds": 3}
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
