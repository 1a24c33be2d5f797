"""The keys of config.json and of SFTConfig: their bounds, and those that are refused."""

import dataclasses
import json
import re
import typing

import pytest
from conftest import ROOT

from orpheus.keys import OWN_KEYS, REFUSED, TRAINER_TYPES, Settings
from orpheus.settings import UserError, parse_json, read_settings, trainer_keys


def test_every_key_is_read():
    """config.json's keys are SFTConfig's, or ours and read in the code."""
    from trl import SFTConfig

    config = json.loads((ROOT / "config.json").read_text())
    files = [ROOT / "infer.py", ROOT / "finetune.py", *ROOT.glob("orpheus/*.py")]
    source = "".join(file.read_text() for file in files)
    hints = typing.get_type_hints(SFTConfig)
    for name in config:
        assert name in hints or re.search(rf"settings\.{name}\b", source), name
    assert set(Settings.model_fields) == set(config)


BAD = {
    "temperature": ["-1", "inf", "nan", "1e-300", "1e300"],
    "repetition_penalty": ["0", "1e-300", "inf", "nan"],
    "top_p": ["0", "1e-300", "1.1", "nan"],
    "max_seconds": ["0", "inf", "nan", "1e18"],
    "best_of": ["0", "1000000000"],
    "speak_batch_size": ["0", "1000000000"],
    "keep_silence": ["-1", "inf", "1e18", "nan"],
    "silence_db": ["0", "inf", "nan", "1e9"],
    "limit": ["0", "1" + "0" * 30, "9" * 5000],
    "held_out": ["-0.1", "1", "nan"],
    "max_length": ["0", "1" + "0" * 12],
    "lora_r": ["0", "1000000"],
    "lora_alpha": ["0", "1" + "0" * 12],
    "lora_dropout": ["1", "nan"],
    "seed": ["-1", str(2**32), str(2**64)],
    "sample_steps": ["0", "1" + "0" * 12],
    "fit": ["0", "-1", "nan", "inf"],
    "learning_rate": ["nan", "-1", "0", "inf", "2", "2e4"],
    "num_train_epochs": ["0", "-3", "nan", "inf"],
    "max_steps": ["0", "-2"],
    "per_device_train_batch_size": ["0", "-1", "1000000000"],
    "gradient_accumulation_steps": ["0", "-1", "1000000000"],
    "warmup_steps": ["-1", "nan"],
    "weight_decay": ["-1", "nan", "inf"],
    "max_grad_norm": ["-1", "nan", "inf"],
    "logging_steps": ["0", "-1", "nan"],
    "save_steps": ["0", "-1", "nan"],
    "save_total_limit": ["0", "-1"],
    "adam_beta1": ["1", "-1", "nan"],
    "adam_epsilon": ["0", "nan"],
    "data_seed": ["-1", str(2**64)],
    "neftune_noise_alpha": ["-1", "inf"],
    "device_map": ["nonsense"],
    "language": ["", "English", "e"],
    "dataset": ["", " ", "a\0b", "\udcff"],
    "model": ["", "a\0b", "null"],
    "torch_compile_mode": ["nonsense"],
    "output_dir": ["", "a\0b", "\udcff"],
    "cache_dir": ["", "a\0b"],
    "voice": ["", "\udcff"],
    "sample_texts": ['[""]', '["a", " "]', '["a\\u0000"]', "[" * 100_000],
}


@pytest.mark.parametrize("name", BAD)
def test_a_value_out_of_bounds_is_named(name, tmp_path):
    """From the command line and, where JSON can say it, from a config."""
    for text in BAD[name]:
        with pytest.raises(UserError, match=f"^command line: {name}") as caught:
            read_settings(None, {name: text})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        given = parse_json(text)
        if given is None or text.startswith("[[") or len(text) > 1000:
            continue
        config = tmp_path / "mine.json"
        config.write_text(json.dumps({name: given}))
        with pytest.raises(UserError, match=rf"mine\.json: {name}"):
            read_settings(config)


def test_a_value_out_of_bounds_is_answered_with_the_default(tmp_path):
    """As 2 for 2e-4. Not the default of config.json itself, nor one too long for a line."""
    config = tmp_path / "mine.json"
    config.write_text('{"learning_rate": 2}')
    bound = "Input should be less than or equal to 1; the default is 0.0002"
    for given in ((config, {}), (None, {"learning_rate": "2"})):
        with pytest.raises(UserError, match=f'learning_rate is "?2"?: {bound}$'):
            read_settings(*given)
    config.write_text('{"learning_rate": 0.1}')
    with pytest.raises(UserError, match=f"{bound}$"):
        read_settings(config, {"learning_rate": "2"})
    for name in ("adam_beta2", "sample_texts"):
        with pytest.raises(UserError, match=f"^command line: {name} is ") as caught:
            read_settings(None, {name: "2"})
        assert "default" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0),
        ("temperature", "0.01", 0.01),
        ("fit", "1", 1.0),
        ("fit", "true", True),
        ("fit", "False", False),
        ("voice", "7", "7"),
        ("voice", "true", "true"),
        ("voice", "null", None),
        ("overwrite", "True", True),
        ("seed", str(2**32 - 1), 2**32 - 1),
        ("learning_rate", "1", 1.0),
    ],
)
def test_a_value_within_bounds(name, text, value):
    found = getattr(read_settings(None, {name: text}), name)
    assert found == value and isinstance(found, bool) == isinstance(value, bool)


def test_bounds_are_of_keys_that_exist():
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    assert trainer_keys() == known
    config = json.loads((ROOT / "config.json").read_text())
    assert set(TRAINER_TYPES) | set(REFUSED) | (set(config) - set(OWN_KEYS)) <= known
    assert not set(REFUSED) & set(config)


@pytest.mark.parametrize("name", REFUSED)
def test_trainer_keys_that_would_not_be_used_are_refused(name):
    line = f"^command line: {name} cannot be set, leave it out: [a-z`-]"
    with pytest.raises(UserError, match=line):
        read_settings("data/demo/config.json", {name: "1"})


def test_a_changed_copy_leaves_the_settings_alone():
    settings = read_settings(None, {"adam_beta2": "0.9"})
    changed = settings.replace(limit=5, adam_beta2=0.8, adam_beta1=0.7, learning_rate=1.0)
    assert (settings.limit, settings.trainer["adam_beta2"]) == (None, 0.9)
    assert "adam_beta1" not in settings.flat() and settings.learning_rate == 2e-4
    given = {"adam_beta2": 0.8, "adam_beta1": 0.7, "learning_rate": 1.0}
    assert changed.limit == 5 and given.items() <= changed.trainer.items()
    assert changed.flat().keys() == settings.flat().keys() | {"adam_beta1"}
    assert not set(OWN_KEYS) & set(changed.trainer)
