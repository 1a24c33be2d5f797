"""The loop against model.generate: alone and in batches, with both caches, as a graph runs it."""

import numpy as np
import pytest
import torch
from speaking import demo_settings, generate_text, random_model, same_codes, utterances
from transformers import generation

import orpheus.sampling
from orpheus.generation import generate_with_transformers
from orpheus.sampling import sample_codes, speak_frames


@pytest.fixture(scope="session")
def model(ids):
    return random_model(ids)


@pytest.fixture
def generate(model, tokenizer, ids):
    """generate(settings, static): the four texts in one batch."""

    def generate(settings, static=False):
        rows = utterances(model, tokenizer, ids, settings)
        for _ in speak_frames(model, rows, ids, settings, static):
            pass
        return rows

    return generate


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_codes_are_those_of_transformers(model, tokenizer, ids, generate, penalty):
    settings = demo_settings(temperature=0, repetition_penalty=penalty, max_seconds=1.1)
    expected = utterances(model, tokenizer, ids, settings)
    for row in expected:
        generate_with_transformers(model, [row], ids, settings)
    assert sum(len(row.frames) for row in expected) > 20
    assert same_codes(generate(settings), expected)
    assert same_codes(generate(settings, static=True), expected)
    together = utterances(model, tokenizer, ids, settings)
    generate_with_transformers(model, together, ids, settings)
    assert same_codes(together, expected)
    for row, voice in zip(expected[:2], ("rms", "awb"), strict=True):
        assert same_codes([generate_text(model, tokenizer, ids, settings, row.text, voice)], [row])


def test_a_seed_gives_the_same_codes_alone_and_in_any_batch(model, tokenizer, ids, generate):
    settings = demo_settings(temperature=0.9, max_seconds=1.5)
    together = generate(settings)
    assert same_codes(generate(settings, static=True), together)
    alone = generate_text(model, tokenizer, ids, settings, together[2].text)
    assert same_codes([alone], together[2:3])
    reseeded = demo_settings(temperature=0.9, max_seconds=1.5, seed=1)
    other = generate_text(model, tokenizer, ids, reseeded, together[2].text)
    assert not same_codes([other], [alone])


@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_is_ended_early_does_not_change_the_others(
    model, tokenizer, ids, generate, static
):
    settings = demo_settings(temperature=0, max_seconds=1.5)
    whole = generate(settings, static)
    rows = utterances(model, tokenizer, ids, settings)
    for frame, _ in enumerate(speak_frames(model, rows, ids, settings, static), 1):
        if frame == 3:
            rows[1].end = "enough"
    assert (rows[1].end, len(rows[1].frames)) == ("enough", 3)
    assert same_codes([rows[0], *rows[2:]], [whole[0], *whole[2:]])


def test_a_head_that_is_not_plain_is_computed_whole(model, generate):
    class Wrapped(torch.nn.Linear):
        pass

    settings, head = demo_settings(temperature=0, max_seconds=1), model.lm_head
    plain = generate(settings)
    model.lm_head = Wrapped(*head.weight.shape[::-1], bias=False)
    model.lm_head.weight = head.weight
    try:
        assert same_codes(generate(settings), plain)
    finally:
        model.lm_head = head


def test_a_frame_can_be_captured_in_a_cuda_graph(generate, monkeypatch):
    """A stand-in for the graph: it always reads and writes the same tensors, and refuses to wait.

    A graph cannot be captured of work that needs values on the CPU.
    """

    def refuse(*_, **__):
        raise AssertionError("a captured frame waits for the GPU")

    def capture(function, inputs):
        buffers, results = [tensor.clone() for tensor in inputs], []

        def replay(*inputs):
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor)
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "cpu", "numpy", "__bool__", "nonzero"):
                    patch.setattr(torch.Tensor, name, refuse)
                new = function(*buffers)
            results[:] = results or new
            for result, tensor in zip(results, new, strict=True):
                result.copy_(tensor)
            replays.append(new)
            return results[0].clone(), *results[1:]  # the codes are copied to the CPU

        return replay

    replays = []
    monkeypatch.setattr(orpheus.sampling, "capture_cuda_graph", capture)
    settings = {"temperature": 0.9, "max_seconds": 1.1, "repetition_penalty": 1.2}
    rows = generate(demo_settings(**settings, cuda_graph="true"), static=True)
    assert same_codes(rows, generate(demo_settings(**settings)))
    assert len(replays) > 5


@pytest.mark.parametrize(("temperature", "top_p", "penalty"), [(0.6, 0.8, 1.3), (1.5, 1.0, 1.0)])
def test_codes_are_distributed_as_by_transformers(temperature, top_p, penalty):
    """Over 20,000 evenly spaced uniforms, each choice comes as often as its probability says."""
    torch.manual_seed(0)
    logits, seen = torch.randn(1, 60) * 2, torch.arange(0, 60, 7)[None]
    expected = generation.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    expected = generation.TemperatureLogitsWarper(temperature)(seen, expected)
    expected = generation.TopPLogitsWarper(top_p)(seen, expected).softmax(-1)[0]
    settings = demo_settings(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    seen_mask = torch.zeros(1, 60, dtype=torch.bool).scatter_(1, seen, True)
    uniforms = torch.from_numpy((np.arange(20_000, dtype=np.float32) + 0.5) / 20_000)
    rows = logits.expand(20_000, -1), seen_mask.expand(20_000, -1)
    shares = torch.bincount(sample_codes(*rows, settings, uniforms), minlength=60) / 20_000
    assert (shares - expected).abs().max() < 3e-4
    assert (shares[expected == 0] == 0).all()
