"""Compares an adapter in plain PEFT with the logits kept after training, without Unsloth."""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

out = Path(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained("data/demo/base", dtype=torch.float32)
model = PeftModel.from_pretrained(base, out).eval()
kept = torch.load(out / "logits.pt")
logits = model(input_ids=torch.arange(300)[None]).logits
with model.disable_adapter():
    base_logits = model(input_ids=torch.arange(300)[None]).logits
assert "unsloth" not in sys.modules
print(float((logits - kept).abs().max()), float((base_logits - kept).abs().max()))
