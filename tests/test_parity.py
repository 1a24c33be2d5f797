"""The measure by which a merged model is compared with its adapter."""

import pytest
import torch
from running import settings_of

from orpheus import parity
from orpheus.models import load_model
from orpheus.tokens import SLOTS


def test_the_codes_of_a_slot_are_compared_by_their_log_probabilities(ids):
    logits = torch.randn(2 * SLOTS, ids.audio + SLOTS * ids.codebook_size)
    found = parity.code_log_probs(logits, ids)
    for token in range(2 * SLOTS):
        start = ids.audio + ids.codebook_size * (token % SLOTS)
        slot = logits[token, start : start + ids.codebook_size]
        assert torch.equal(found[token], slot.log_softmax(-1))


@pytest.mark.parametrize(("noise", "passes"), [(0.02, True), (0.1, False)])
def test_rounding_passes_and_other_weights_do_not(noise, passes, tokenizer, ids, monkeypatch):
    """The divergence of noise of standard deviation s is s² / 2 for flat distributions, as here."""

    from orpheus import parity

    model, _ = load_model("data/demo/base")
    settings = settings_of(max_seconds="0.5", sample_texts='["one two"]')
    rows = parity.generate_greedy(model, tokenizer, ids, settings, "rms")
    torch.manual_seed(0)
    flat = torch.zeros_like(parity.speech_log_probs(model, ids, rows))
    noisy = (flat + noise * torch.randn_like(flat)).log_softmax(-1)
    monkeypatch.setattr(parity, "speech_log_probs", lambda *_: noisy)
    passed, message = parity.compare(rows, flat.log_softmax(-1), model, ids)
    assert passed == passes == (noise**2 / 2 < parity.MAX_DIVERGENCE)
    divergence = float(message.split("adapter ")[1].split()[0])
    assert divergence == pytest.approx(noise**2 / 2, rel=0.1)
