"""Speaks four texts at once with the demo's base, by a backend, and prints their codes."""

import json
import sys

backend, temperature, cache = sys.argv[1:]
if backend == "unsloth":
    from unsloth import FastLanguageModel  # before transformers, which it patches

import torch  # noqa: E402

from orpheus.codec import load_codec  # noqa: E402
from orpheus.models import load_model  # noqa: E402
from orpheus.settings import read_settings  # noqa: E402
from orpheus.voice import Voice  # noqa: E402

words = {"temperature": temperature, "max_seconds": "1.5", "repetition_penalty": "1.2"}
settings = read_settings("data/demo/config.json", words)
settings = settings.replace(cache_implementation=cache or None)
model, tokenizer = load_model("data/demo/base", dtype=torch.float32)
if backend == "unsloth":
    keys = {"max_seq_length": 512, "dtype": torch.float32, "load_in_4bit": False}
    model, _ = FastLanguageModel.from_pretrained("data/demo/base", **keys)
    FastLanguageModel.for_inference(model)
    if torch.cuda.is_available():  # on a CPU it patches little
        assert type(model.get_decoder()).forward.__module__.startswith("unsloth")
voice = Voice(model, tokenizer, load_codec("data/demo/codec"), settings, "rms")
texts = ["one two", "seven", "three nine nine four", "zero"]
parts = [part for text in texts for part in voice.make_parts(text)]
voice.generate(parts)
print(json.dumps([[part.end, part.codes.tolist()] for part in parts]))
