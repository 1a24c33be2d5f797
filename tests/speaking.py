"""What tests share that speak."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import infer
from orpheus.settings import read_settings
from orpheus.tokens import SLOTS

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


def say(monkeypatch, *words):
    """Runs infer.py in this process."""
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words)])
    infer.main()
