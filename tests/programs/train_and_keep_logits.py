"""Runs finetune.py and saves the trained model's logits beside the adapter."""

import torch

import finetune
import infer

save = finetune.save_model


def save_and_look(trainer, tokenizer, out):
    save(trainer, tokenizer, out)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.arange(300)[None]).logits
        torch.save(logits, out / "logits.pt")


finetune.save_model = save_and_look
infer.run(finetune.main)
