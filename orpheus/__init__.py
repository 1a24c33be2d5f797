"""The package behind finetune.py, infer.py and data/prepare.py; README lists its modules."""
