"""Runs finetune.py and saves the trained model's logits beside the adapter."""

import torch

import finetune
from orpheus.settings import run

save = finetune.save_model


def save_and_look(trainer, tokenizer, out):
    save(trainer, tokenizer, out)
    with torch.no_grad():
        input_ids = torch.arange(300, device=trainer.model.device)[None]
        logits = trainer.model.eval()(input_ids=input_ids).logits
        torch.save(logits.float().cpu(), out / "logits.pt")


finetune.save_model = save_and_look
run(finetune.main)
