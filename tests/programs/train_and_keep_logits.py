"""Runs finetune.py and saves the trained model's logits beside the adapter."""

import torch

import finetune
from orpheus.settings import run

save = finetune.save_model


def save_and_look(trainer, tokenizer, out):
    save(trainer, tokenizer, out)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.arange(300)[None]).logits
        torch.save(logits, out / "logits.pt")


finetune.save_model = save_and_look
run(finetune.main)
