"""Merging: the merged folder speaks as the adapter over the weights that it was trained over."""

import os
import resource

import pytest
import torch
from conftest import change, one_line, over_nf4
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpheus.merge
import orpheus.models
from orpheus.generation import SlotProcessor
from orpheus.merge import merge
from orpheus.models import load_model
from orpheus.parity import generate_greedy, speech_log_probs
from orpheus.run_info import load_run_info
from orpheus.runs import SAVED_CONFIG, find_sample
from orpheus.settings import UserError, read_json
from orpheus.tokens import codes_to_ids, prompt_ids, read_speech_ids


def greedy_row(model, tokenizer, run):
    """(ids, the first sample text spoken without sampling)."""
    ids = read_speech_ids(tokenizer, 256)
    return ids, generate_greedy(model, tokenizer, ids, run.settings, "slt")[0]


def test_merged_speaks_in_plain_transformers_as_the_adapter_does(tmp_path, finished, capsys):
    run, out = load_run_info(str(finished[0]), {}), tmp_path / "merged"
    assert merge(run, "slt", out), capsys.readouterr().out
    printed = capsys.readouterr().out
    assert float(printed.split("from the adapter ")[1].split()[0]) < 1e-3
    assert "first choices on 2 texts are the same" in printed
    weights = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert weights.dtype == torch.float16 and not (out / "adapter_config.json").exists()
    plain, tokenizer = weights.float(), AutoTokenizer.from_pretrained(out)
    ids, row = greedy_row(load_model(str(finished[0]))[0], tokenizer, run)
    prompt = torch.tensor([prompt_ids(tokenizer, ids, row.text, "slt")])
    speech = plain.generate(
        prompt, max_new_tokens=7 * len(row.frames), do_sample=False,
        logits_processor=[SlotProcessor(ids, prompt.shape[1])],
    )[0, prompt.shape[1] :]  # fmt: skip
    assert speech.tolist() == codes_to_ids(row.codes, ids).tolist()
    again = load_run_info(str(out), {})
    assert again.voices == run.voices and again.settings.weights == "16bit" and again.pace
    card = (out / "README.md").read_text()
    assert "16 clips" in card and "LoRA of rank 64" in card and "AutoModelForCausalLM" in card
    assert "[A sample](sample.wav)" in card
    assert (out / "sample.wav").read_bytes() == find_sample(run.home).read_bytes()


def test_a_4_bit_run_is_merged_into_the_weights_that_it_was_trained_over(tmp_path, adapter, capsys):
    change(adapter / SAVED_CONFIG, weights="4bit")
    run, out = load_run_info(str(adapter), {}), tmp_path / "merged"
    trained = over_nf4(adapter)
    merge(run, "slt", out)
    merged, tokenizer = load_model(str(out))
    ids, row = greedy_row(trained, tokenizer, run)
    full_precision, _ = load_model(str(adapter))
    wanted, found, other = (
        speech_log_probs(model, ids, [row]) for model in (trained, merged, full_precision)
    )
    assert (found - wanted).abs().max() < 0.1 < 0.5 < (other - wanted).abs().max()
    printed = capsys.readouterr().out
    assert float(printed.split("from the adapter ")[1].split()[0]) < 1e-3
    assert load_run_info(str(out), {}).settings.weights == "16bit"
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

    monkeypatch.setattr(orpheus.models, "load_model", worse)
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
        (["data/demo/base"], "the following arguments are required: FOLDER"),
        (["data/demo/base", ""], "--out is empty"),
        (["data/demo/base", "a", "--temperature", "1"], "unrecognized arguments"),
        (["data/demo/base", "a", "--config", "none.json"], "none.json: cannot be read"),
        (["data/demo/base", "a"], "data/demo/base: no adapter: there is nothing to merge"),
        (["tests/nothing_here", "a"], "tests/nothing_here: no such folder"),
    ],
)
def test_mistakes_of_merging_are_one_line(words, line, monkeypatch):
    assert line in one_line(orpheus.merge.main, monkeypatch, *words)


def no_room_left(monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(orpheus.merge, "write_text", full)


@pytest.mark.parametrize("full", ["for the weights", "for the settings"])
def test_a_full_disk_in_a_merge_leaves_nothing(full, adapter, tmp_path, monkeypatch):
    """The system refuses to write more than 100 KB, or our own files, as a full disk does."""
    run, limits = load_run_info(str(adapter), {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(tmp_path.iterdir())
    if full == "for the settings":
        no_room_left(monkeypatch)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="merged: cannot be written"):
            merge(run, "slt", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before
