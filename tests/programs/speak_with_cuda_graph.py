"""Speaks three texts with or without a CUDA graph and prints their codes."""

import json
import sys

from orpheus.generation import generate_batch, make_utterance
from orpheus.models import load_model
from orpheus.settings import read_settings
from orpheus.tokens import read_speech_ids

graph, temperature, weights = sys.argv[1:]
overrides = {"cuda_graph": graph, "temperature": temperature}
settings = read_settings("data/demo/config.json", overrides)
model, tokenizer = load_model("data/demo/base", weights)
if weights == "4bit":
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, target_modules="all-linear")
    model = get_peft_model(model, lora).eval()
else:
    model = model.float()
ids = read_speech_ids(tokenizer, 256)
texts = "one two", "seven", "three nine nine four"
rows = [make_utterance(model.config, tokenizer, ids, text, settings, "rms") for text in texts]
generate_batch(model, rows, ids, settings)
print(json.dumps([[row.end, row.codes.tolist()] for row in rows]))
