"""What the tests of sampling, generation and scoring share."""

import sys

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import infer
from orpheus.generation import generate_batch, make_utterance
from orpheus.settings import read_settings
from orpheus.tokens import SLOTS

TEXTS = ["seven", "one two three four five six", "nine zero two", "four four eight one"]
VOICES = ["rms", "awb", "rms", "awb"]
SHORT = ["--model", "data/demo/base", "--codec", "data/demo/codec", "--max_seconds", "0.9"]


def random_model(ids):
    """A small Llama with grouped queries and random weights, which now and then ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ids.audio + SLOTS * ids.codebook_size,
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[ids.eos] *= 1.5
    return model


def demo_settings(**changes):
    return read_settings("data/demo/config.json", {name: str(v) for name, v in changes.items()})


def utterances(model, tokenizer, ids, settings, texts=TEXTS, voices=VOICES):
    return [
        make_utterance(model.config, tokenizer, ids, text, settings, voice)
        for text, voice in zip(texts, voices, strict=True)
    ]


def generate_text(model, tokenizer, ids, settings, text, voice="rms"):
    """The Utterance of one text, generated in a batch of its own."""
    rows = utterances(model, tokenizer, ids, settings, [text], [voice])
    generate_batch(model, rows, ids, settings)
    return rows[0]


def same_codes(rows, others):
    return all(
        row.end == other.end and np.array_equal(row.codes, other.codes)
        for row, other in zip(rows, others, strict=True)
    )


def say(monkeypatch, *words):
    """Runs infer.py in this process."""
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words)])
    infer.main()
