"""Prints the layers that are quantised to 4 bits: for training by Unsloth, or for speaking."""

import sys
from pathlib import Path

import torch

import finetune
from orpheus.models import load_base
from orpheus.settings import read_settings

settings = read_settings("data/demo/config.json", {"weights": "4bit"})
if sys.argv[1] == "training":
    model = finetune.load_with_unsloth(Path(settings.model), settings, torch.float32)
    model = model.get_base_model()
    layers = {n.removesuffix(".base_layer"): m for n, m in model.named_modules()}
else:
    model = load_base(Path(settings.model), "4bit", torch.float32)
    layers = dict(model.named_modules())
for name, layer in sorted(layers.items()):
    if type(layer).__name__ == "Linear4bit":
        state = layer.weight.quant_state
        print("layer", name, state.quant_type, state.blocksize, state.nested)
