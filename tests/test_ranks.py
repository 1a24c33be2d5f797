"""Two ranks over gloo: the same losses as one, one report, one adapter."""

import json
import socket
import sys

import pytest
from conftest import DEMO, script

import finetune
from orpheus.files import is_adapter
from orpheus.settings import UserError, read_settings
from orpheus.trainer import resolve_settings

WORDS = [*DEMO, "--limit", "16", "--held_out", "0.2", "--max_steps", "3", "--logging_steps", "1"]
WORDS += ["--sample_texts", '["one"]', "--max_seconds", "0.5", "--save_steps", "3"]


def losses(out):
    state = json.loads((out / "checkpoint-3/trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_two_ranks_learn_what_one_does(backend, tmp_path):
    words = [*WORDS, "--backend", backend, "--cache_dir", tmp_path / "cache"]
    rows = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps"]
    code, _, errors = script("finetune.py", *words, *rows, "2", "--output_dir", tmp_path / "one")
    assert code == 0, errors
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    words += ["--output_dir", tmp_path / "two"]
    code, printed, errors = script(*launch, "finetune.py", *words, *rows, "1")
    assert code == 0, errors
    assert printed.count("adapter  ") == printed.count("data    ") == 1  # one rank speaks
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert is_adapter(tmp_path / "two")
    checks = [(tmp_path / name / "checks.csv").read_text() for name in ("one", "two")]
    assert checks[0].split("\n")[0] == checks[1].split("\n")[0]
    longer = ["--resume", "--max_steps", "4"]
    code, _, errors = script("finetune.py", *words, *rows, "1", *longer)  # on one rank
    assert code == 2 and "gradient_accumulation_steps 2 keeps them" in errors
    code, printed, errors = script(*launch, "finetune.py", *words, *rows, "1", *longer)
    assert code == 0 and "steps    4" in printed, errors


def test_fsdp_reaches_the_trainer_and_unsloth_refuses_it():
    layers = '{"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'
    words = {"fsdp": "full_shard", "fsdp_config": layers, "backend": "transformers"}
    settings = resolve_settings(read_settings("data/demo/config.json", words))
    arguments = finetune.make_sft_config(settings)
    assert arguments.fsdp and "LlamaDecoderLayer" in str(arguments.fsdp_config)
    with pytest.raises(UserError, match='fsdp needs backend "transformers"'):
        finetune.make_sft_config(settings.replace(backend="unsloth"))
    assert "unsloth" not in sys.modules
