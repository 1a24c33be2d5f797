"""What tests share that run finetune.py in this process."""

import sys
from pathlib import Path

from conftest import DEMO

import finetune
from orpheus.settings import read_settings

# In this process without unsloth, which would patch TRL for all tests that follow.
PLAIN = ["--backend", "transformers", "--gradient_checkpointing", "false"]
KEYS = {"save_steps": "1", "report_to": "none", "sample_steps": "3"}


def settings_of(**overrides):
    return read_settings("data/demo/config.json", overrides)


def run_here(monkeypatch, out, **overrides):
    """finetune.main in this process, on the transformers backend and eight of the clips."""
    overrides = {
        "output_dir": out, "backend": "transformers", "gradient_checkpointing": "false",
        "limit": "8", "max_steps": "3", "held_out": "0", "logging_steps": "1", "sample_texts": "[]",
        "per_device_train_batch_size": "2", "lr_scheduler_type": "constant", **overrides,
    }  # fmt: skip
    words = [str(word) for name, value in overrides.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *DEMO, *words])
    finetune.main()
    assert "unsloth" not in sys.modules


def same_file(a, b):
    return a.read_bytes() == b.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
