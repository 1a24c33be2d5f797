"""Speaking: the loop against model.generate, the stream against the whole, batches, long texts."""

import numpy as np
import pytest
import torch

import infer

TEXTS = ["seven", "one two three four five six", "nine zero two", "four four eight one"]


@pytest.fixture(scope="session")
def model():
    return infer.load_model("data/demo/base")[0]


def demo(**keys):
    return infer.read_settings("data/demo/config.json", {n: str(v) for n, v in keys.items()})


def begun(model, tokenizer, ids, texts, settings, voices=("rms",)):
    voices = [voices[n % len(voices)] for n in range(len(texts))]
    pairs = zip(texts, voices, strict=True)
    return [infer.begin(model, tokenizer, ids, text, settings, voice) for text, voice in pairs]


def spoken(model, tokenizer, ids, texts, settings, static=False):
    rows = begun(model, tokenizer, ids, texts, settings, ("rms", "awb"))
    for _ in infer.speak_frames(model, rows, ids, settings, static):
        pass
    return rows


def same(rows, others):
    return all(
        a.end == b.end and np.array_equal(a.codes, b.codes)
        for a, b in zip(rows, others, strict=True)
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("seconds", [2.5, 0.6])  # ended by itself, and cut off
def test_greedy_equals_generate_batched_and_one_by_one(model, tokenizer, ids, penalty, seconds):
    settings = demo(temperature=0, repetition_penalty=penalty, max_seconds=seconds)
    plain = begun(model, tokenizer, ids, TEXTS, settings, ("rms", "awb"))
    for row in plain:
        infer.generate_plainly(model, [row], ids, settings)
    assert sum(len(row.frames) for row in plain) > 20
    assert same(spoken(model, tokenizer, ids, TEXTS, settings), plain)
    assert same(spoken(model, tokenizer, ids, TEXTS, settings, static=True), plain)
    together = begun(model, tokenizer, ids, TEXTS, settings, ("rms", "awb"))
    infer.generate_plainly(model, together, ids, settings)
    assert same(together, plain)
    for n, text in enumerate(TEXTS[:2]):
        row = begun(model, tokenizer, ids, [text], settings, (("rms", "awb")[n],))
        infer.speak_rows(model, row, ids, settings)
        assert same(row, plain[n : n + 1])


def test_a_wav_is_the_same_by_seed_alone_and_in_any_batch(model, tokenizer, ids):
    settings = demo(temperature=0.9, max_seconds=1.5)
    together = spoken(model, tokenizer, ids, TEXTS, settings)
    assert same(spoken(model, tokenizer, ids, TEXTS, settings, static=True), together)
    alone = begun(model, tokenizer, ids, TEXTS[2:3], settings)
    infer.speak_rows(model, alone, ids, settings)
    assert same(alone, together[2:3])
    other = begun(model, tokenizer, ids, TEXTS[2:3], demo(temperature=0.9, seed=1))
    infer.speak_rows(model, other, ids, demo(temperature=0.9, max_seconds=1.5, seed=1))
    assert not same(other, alone)


def test_a_row_that_is_ended_from_outside_leaves_the_others_as_they_were(model, tokenizer, ids):
    settings = demo(temperature=0, max_seconds=1.5)
    for static in (False, True):
        whole = spoken(model, tokenizer, ids, TEXTS, settings, static)
        rows = begun(model, tokenizer, ids, TEXTS, settings, ("rms", "awb"))
        for n, _ in enumerate(infer.speak_frames(model, rows, ids, settings, static), 1):
            if n == 3:
                rows[1].end = "enough"
        assert (rows[1].end, len(rows[1].frames)) == ("enough", 3)
        assert same([rows[0], *rows[2:]], [whole[0], *whole[2:]])


def test_a_head_that_is_not_plain_is_used_whole(model, tokenizer, ids):
    class Wrapped(torch.nn.Linear):
        pass

    settings, head = demo(temperature=0, max_seconds=1), model.lm_head
    plain = spoken(model, tokenizer, ids, TEXTS, settings)
    model.lm_head = Wrapped(*head.weight.shape[::-1], bias=False)
    model.lm_head.weight = head.weight
    try:
        assert same(spoken(model, tokenizer, ids, TEXTS, settings), plain)
    finally:
        model.lm_head = head


@pytest.mark.parametrize(("temperature", "top_p", "penalty"), [(0.6, 0.8, 1.3), (1.5, 1.0, 1.0)])
def test_draws_are_spread_as_transformers_spreads_them(temperature, top_p, penalty):
    """Over 20,000 evenly spaced chances each choice comes as often as its probability says."""
    from transformers import generation

    torch.manual_seed(0)
    scores, drawn = torch.randn(1, 60) * 2, torch.arange(0, 60, 7)[None]
    shares = generation.RepetitionPenaltyLogitsProcessor(penalty)(drawn, scores.clone())
    shares = generation.TemperatureLogitsWarper(temperature)(drawn, shares)
    shares = generation.TopPLogitsWarper(top_p)(drawn, shares).softmax(-1)[0]
    settings = demo(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    used = torch.zeros(1, 60, dtype=torch.bool).scatter_(1, drawn, True)
    chances = (torch.arange(20_000) + 0.5) / 20_000
    many = (scores.expand(20_000, -1), used.expand(20_000, -1))
    counts = torch.bincount(infer.draw(*many, settings, chances), minlength=60) / 20_000
    assert (counts - shares).abs().max() < 3e-4
    assert (counts[shares == 0] == 0).all()
