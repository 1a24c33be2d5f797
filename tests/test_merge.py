"""Merging: the merged folder speaks as the adapter over the weights that it was trained over."""

import pytest
import torch
from conftest import change, one_line, over_nf4
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpheus.merge
from orpheus.merge import MAX_DIVERGENCE, merge, speak_greedily, speech_log_probs
from orpheus.models import load_model
from orpheus.runs import SAVED_CONFIG
from orpheus.settings import read_json
from orpheus.tokens import SLOTS
from orpheus.voice import load_voice


def test_merged_speaks_in_plain_transformers_as_the_adapter_does(tmp_path, finished, capsys):
    out = tmp_path / "merged"
    assert merge(finished[0], out) < 1e-3
    assert "first choices the same" in capsys.readouterr().out
    weights = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert weights.dtype == torch.float16 and not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out).get_vocab()["<custom_token_2>"]
    adapter, merged = load_voice(finished[0]), load_voice(out)
    rows = speak_greedily(adapter)
    assert [r.codes.tolist() for r in speak_greedily(merged)] == [r.codes.tolist() for r in rows]
    wanted = speech_log_probs(adapter.model, adapter.ids, rows)
    found = speech_log_probs(weights.float(), adapter.ids, rows)
    assert (wanted - found).abs().max() < 0.05
    assert merged.name == adapter.name and merged.settings.weights == "16bit" and merged.pace
    assert "first choices the same" in (out / "README.md").read_text()


def test_a_4_bit_run_is_merged_into_the_weights_that_it_was_trained_over(tmp_path, adapter):
    change(adapter / SAVED_CONFIG, weights="4bit")
    out, trained = tmp_path / "merged", over_nf4(adapter)
    assert merge(adapter, out) < 1e-3
    voice = load_voice(adapter)
    rows = speak_greedily(voice)
    full_precision, _ = load_model(str(adapter))
    wanted, found, other = (
        speech_log_probs(model, voice.ids, rows)
        for model in (trained, load_model(str(out))[0], full_precision)
    )
    assert (found - wanted).abs().max() < 0.1 < 0.5 < (other - wanted).abs().max()
    assert load_voice(out).settings.weights == "16bit"
    saved = read_json(out / "config.json")
    assert "quantization_config" not in saved and saved["rope_theta"] == 10_000


def test_a_merge_that_changes_the_voice_says_so_and_exits_1(
    tmp_path, finished, monkeypatch, capsys
):
    load = load_model

    def worse(path, weights="16bit", merged=False, dtype=None):
        model, tokenizer = load(path, weights, merged)
        if merged:
            model.model.norm.weight.data.neg_()
        return model, tokenizer

    monkeypatch.setattr(orpheus.merge, "load_model", worse)
    out = tmp_path / "merged"
    monkeypatch.setattr("sys.argv", ["merge", str(finished[0]), str(out)])
    with pytest.raises(SystemExit) as stopped:
        orpheus.merge.main()
    assert stopped.value.code == 1
    assert "parity   FAILED" in capsys.readouterr().out
    line = one_line(orpheus.merge.main, monkeypatch, finished[0], out)
    assert line == f"{out} is there already; give a new folder"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data/demo/base"], "FOLDER"),
        (["data/demo/base", "a"], "data/demo/base: no adapter: there is nothing to merge"),
        (["tests/nothing_here", "a"], "tests/nothing_here: no such folder"),
    ],
)
def test_mistakes_of_merging_are_one_line(words, line, monkeypatch):
    assert line in one_line(orpheus.merge.main, monkeypatch, *words)


def test_the_codes_of_a_slot_are_compared_by_their_log_probabilities(ids):
    logits = torch.randn(2 * SLOTS, ids.audio + SLOTS * ids.codebook_size)
    found = orpheus.merge.code_log_probs(logits, ids)
    for token in range(2 * SLOTS):
        start = ids.audio + ids.codebook_size * (token % SLOTS)
        slot = logits[token, start : start + ids.codebook_size]
        assert torch.equal(found[token], slot.log_softmax(-1))


@pytest.mark.parametrize(("noise", "passes"), [(0.02, True), (0.1, False)])
def test_rounding_passes_and_other_weights_do_not(noise, passes):
    """The divergence of noise of standard deviation s is s² / 2 for flat distributions."""
    torch.manual_seed(0)
    flat = torch.zeros(200, 256)
    noisy = (flat + noise * torch.randn_like(flat)).log_softmax(-1)
    divergence = orpheus.merge.mean_divergence(flat.log_softmax(-1), noisy)
    assert divergence == pytest.approx(noise**2 / 2, rel=0.1)
    assert passes == (divergence <= MAX_DIVERGENCE)
