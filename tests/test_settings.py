"""Settings: names and values of keys, config files, paths, and how a script ends."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script
from running import settings_of

import finetune
import orpheus.settings
from orpheus.settings import (
    PARTS,
    Parser,
    Settings,
    SpeakingSettings,
    UserError,
    read_command_line,
    read_json,
    read_settings,
    trainer_keys,
)
from orpheus.trainer import resolve_settings


def test_unknown_and_wrong_trainer_keys():
    for overrides, line in [
        ({"learning_rat": "1"}, "no key is named 'learning_rat'; the nearest is 'learning_rate'"),
        ({"datset": "x"}, "no key is named 'datset'; the nearest is 'dataset'"),
        ({"lora_rank": "8"}, "no key is named 'lora_rank'; the nearest is 'lora_r'"),
        ({"max_seq_length": "8"}, "the nearest is 'max_length'"),
        ({"load_in_4bit": "true"}, 'the nearest is .weights "4bit"'),
        ({"batch_size": "8"}, "the nearest is 'per_device_train_batch_size'"),
        ({"learning_rate": "fast"}, 'learning_rate is "fast": .* valid number'),
        ({"lr_scheduler_type": "bend"}, "settings: bend is not a valid SchedulerType"),
    ]:
        with pytest.raises(UserError, match=line):
            finetune.make_sft_config(resolve_settings(settings_of(**overrides)))


def test_settings_layers(tmp_path):
    config = tmp_path / "mine.json"
    config.write_text('{"lora_r": 8, "temperature": 1}')
    overrides = {"lora_r": "32", "sample_texts": '["a", "b"]', "limit": "null", "voice": "7"}
    settings = read_settings(config, overrides)
    assert (settings.lora_r, settings.temperature, settings.limit) == (32, 1.0, None)
    assert (settings.sample_texts, settings.voice) == (["a", "b"], "7")


def test_every_key_is_read():
    """Those that SFTConfig has reach it by `Settings.trainer`."""
    files = [ROOT / "finetune.py", *ROOT.glob("orpheus/*.py")]
    source = "".join(file.read_text() for file in files)
    own = Settings.model_fields.keys() - trainer_keys()
    assert not [name for name in own if not re.search(rf"settings\.{name}\b", source)]


def test_a_wrong_value_of_a_config_is_named_with_its_file(tmp_path):
    (tmp_path / "mine.json").write_text('{"lora_r": "many\\n"}')
    with pytest.raises(UserError, match=r'mine\.json: lora_r is "many\\n": ') as caught:
        read_settings(tmp_path / "mine.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "-1"), ("temperature", "nan"), ("top_p", "0"), ("best_of", "0"),
        ("limit", "0"), ("held_out", "1"), ("seed", "-1"), ("max_steps", "-2"),
        ("learning_rate", "2e4"), ("per_device_train_batch_size", "0"), ("save_steps", "0"),
        ("device_map", "nonsense"), ("language", "English"), ("dataset", ""), ("model", "null"),
        ("output_dir", ""), ("sample_texts", '[""]'), ("overwrite", "maybe"),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_named(name, text):
    with pytest.raises(UserError, match=f"^command line: {name} is ") as caught:
        read_settings(None, {name: text})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_wrong_value_is_answered_with_the_default(tmp_path):
    """As 2 for 2e-4, and also where a config has another value. Not one too long for a line."""
    config = tmp_path / "mine.json"
    for value in (2, 0.1):
        config.write_text(json.dumps({"learning_rate": value}))
        with pytest.raises(UserError, match=r"equal to 1; the default is 0\.0002$"):
            read_settings(config, {"learning_rate": "2"})
    with pytest.raises(UserError, match="sample_texts is ") as caught:
        read_settings(None, {"sample_texts": "2"})
    assert "default" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("gradient_checkpointing", "False", False),
        ("gradient_checkpointing", "unsloth", "unsloth"),
        ("include_num_input_tokens_seen", "no", "no"),
        ("report_to", '["wandb"]', ["wandb"]),
        ("max_steps", "-1", -1),
        ("voice", "7", "7"),
        ("voice", "null", None),
        ("overwrite", "True", True),
        ("learning_rate", "1", 1.0),
        ("adam_beta2", "0.9", 0.9),
        ("tf32", "False", False),
        ("fsdp", "full_shard", "full_shard"),
        ("fsdp_config", '{"a": 1}', {"a": 1}),
    ],
)
def test_words_of_the_command_line(name, text, value):
    found = getattr(read_settings(None, {name: text}), name)
    assert found == value and type(found) is type(value)


def test_the_keys_of_sftconfig_are_known_before_its_import():
    from trl import SFTConfig

    assert trainer_keys() == {field.name for field in dataclasses.fields(SFTConfig) if field.init}


NOT_USED = ["packing", "train_sampling_strategy", "eval_steps", "push_to_hub", "hub_model_id"]


@pytest.mark.parametrize("name", [*NOT_USED, "resume_from_checkpoint", "eos_token"])
def test_keys_of_sftconfig_that_would_not_be_used_are_refused(name):
    line = f"^command line: {name} cannot be set, leave it out: [a-z`-]"
    with pytest.raises(UserError, match=line):
        read_settings(None, {name: "1"})


def test_a_changed_copy_leaves_the_settings_alone():
    settings = read_settings(None, {"adam_beta2": "0.9"})
    changed = settings.replace(limit=5, adam_beta2=0.8, adam_beta1=0.7, learning_rate=1.0)
    assert (settings.limit, settings.trainer["adam_beta2"]) == (None, 0.9)
    assert "adam_beta1" not in dict(settings) and settings.learning_rate == 2e-4
    given = {"adam_beta2": 0.8, "adam_beta1": 0.7, "learning_rate": 1.0}
    assert changed.limit == 5 and given.items() <= changed.trainer.items()
    assert dict(changed).keys() == dict(settings).keys() | {"adam_beta1"}


# ---------------------------------------------------------------- config files


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"voice": "\xff"}', "invalid start byte at byte 11"),
        ('{"voice": "a"}'.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b'{"limit": 1,\n "lora_r" 8}', "not JSON: .* line 2"),
        (b"", "not JSON"),
        (b"3", "must be one JSON object"),
    ],
)
def test_a_config_that_cannot_be_used(content, line, tmp_path):
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.json: .*{line}|mine\.json: {line}"):
        read_settings(tmp_path / "mine.json")


def test_a_config_that_cannot_be_read(tmp_path):
    for path in (tmp_path, "no.json"):
        with pytest.raises(UserError, match="cannot be read"):
            read_settings(path)


def test_config_json_is_the_user_s(tmp_path, monkeypatch):
    """Edited, with half of its lines deleted, or missing, it changes no other default."""
    monkeypatch.setattr(orpheus.settings, "CONFIG", tmp_path / "config.json")
    defaults, demo = dict(Settings()), read_json("data/demo/config.json")
    assert dict(read_settings()) == defaults
    whole = {"dataset": str(tmp_path), "lora_r": 8, "output_dir": "outputs/anna", "max_steps": 5}
    for edited in (whole, dict(list(whole.items())[:2]), {}):
        (tmp_path / "config.json").write_text(json.dumps(edited))
        assert dict(read_settings()) == defaults | edited
        assert dict(Settings()) == defaults
        settings = read_settings("data/demo/config.json", {"voice": "anna"})
        assert dict(settings) == defaults | demo | {"voice": "anna"}


def test_a_config_with_a_byte_order_mark(tmp_path):
    (tmp_path / "mine.json").write_text('{"limit": 5}', encoding="utf-8-sig")
    assert read_settings(tmp_path / "mine.json").limit == 5


def test_paths_are_looked_for_beside_their_config(tmp_path, monkeypatch):
    (tmp_path / "there/clips").mkdir(parents=True)
    config = tmp_path / "there/mine.json"
    config.write_text('{"dataset": "clips", "output_dir": "out", "model": "you/anna"}')
    monkeypatch.chdir(tmp_path)
    settings = read_settings(config)
    assert settings.dataset == str(tmp_path / "there/clips")
    assert (settings.output_dir, settings.model) == ("out", "you/anna")
    assert read_settings().dataset == str(ROOT / "data/numbers")
    assert read_settings(config, {"dataset": "numbers"}).dataset == "numbers"
    (tmp_path / "clips").mkdir()
    assert read_settings(config).dataset == "clips"


def test_keys_of_a_saved_config_are_not_looked_up(tmp_path):
    (tmp_path / "saved.json").write_text('{"a_key_of_an_earlier_trl": 1}')
    settings = read_settings(tmp_path / "saved.json", saved=True)
    assert dict(settings)["a_key_of_an_earlier_trl"] == 1
    with pytest.raises(UserError, match=r"saved\.json: no key is named 'a_key_of_an_earlier_trl'"):
        read_settings(tmp_path / "saved.json")


# ---------------------------------------------------------------- the command line

PART_NAMES = [part.__name__.removesuffix("Settings").lower() for part in PARTS]
HEAVY = {"torch", "transformers", "trl", "datasets", "unsloth", "peft", "snac"}


@pytest.mark.parametrize("name", ["finetune.py", "data/prepare.py"])
def test_help_and_mistakes_in_keys_need_no_heavy_imports(name):
    mistakes = {
        ("--learning_rate", "nan"): "error: command line: learning_rate is",
        ("--adam_beta_2", "0.9"): "no option is named '--adam_beta_2'; the nearest is 'adam_beta2'",
        ("--lr", "1"): "no option is named '--lr'; the nearest is 'learning_rate'",
        ("--eval_steps", "5"): "error: command line: eval_steps cannot be set, leave it out:",
        ("--help",): "",
    }
    for words, line in mistakes.items():
        code, _, errors = script("-X", "importtime", name, *words)
        assert code == (2 if line else 0) and line in errors
        assert not HEAVY & {line.split("|")[-1].strip() for line in errors.splitlines()}


def test_help_of_infer_needs_no_heavy_imports():
    code, printed, errors = script("-X", "importtime", "infer.py", "--help")
    assert code == 0 and "--codec" in printed
    assert not HEAVY & {line.split("|")[-1].strip() for line in errors.splitlines()}


def test_help_shows_each_key_with_its_meaning_and_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        read_command_line("")
    printed = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        meaning = re.escape(f"{field.description} (default: {json.dumps(field.default)})")
        assert re.search(rf"^  --{name} \S+\s+{meaning}$", printed, re.M), name
    assert re.findall(r"^(\w+):$", printed, re.M)[1:] == PART_NAMES


def command_line(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["script", *words])
    return read_command_line("")


def test_the_grammar_of_the_command_line(monkeypatch):
    words = ["--overwrite", "--tf32", "--max_steps", "-1", "--dataset=a=b", "--plan", "false"]
    settings = command_line(monkeypatch, *words, "--adam_beta2", "0.9")
    assert settings.overwrite and not settings.plan and settings.max_steps == -1
    assert settings.dataset == "a=b"
    assert settings.model_extra == {"tf32": True, "adam_beta2": 0.9}
    for words, line in {
        ("--dataset",): "argument --dataset: expected one argument",
        ("--datset", "x"): "no option is named '--datset'; the nearest is 'dataset'",
        ("--over",): "no option is named '--over'",
        ("my_clips",): "no option is named 'my_clips'",
    }.items():
        with pytest.raises(UserError, match=f"^command line: {line}"):
            command_line(monkeypatch, *words)


def test_a_script_with_some_of_the_settings(monkeypatch, tmp_path):
    """It gets those that --config and the command line give; others in the file may be there."""
    (tmp_path / "mine.json").write_text('{"temperature": 0.3, "lora_r": 8, "seed": 1}')
    words = ["hi", "--config", str(tmp_path / "mine.json"), "--seed", "5"]
    for line, given in [(words, {"temperature": 0.3, "seed": 5}), (["hi"], {})]:
        monkeypatch.setattr(sys, "argv", ["script", *line])
        parser = Parser("")
        parser.add_argument("texts", nargs="*")
        options, found = parser.parse("codec", *SpeakingSettings.model_fields)
        assert options.texts == ["hi"] and found == given
        assert options.settings.temperature == given.get("temperature", 0.6)


# ---------------------------------------------------------------- how a script ends


def test_a_missing_package_is_one_line(capsys):
    def main():
        import no_such_package  # noqa: F401

    with pytest.raises(SystemExit, match="2"):
        orpheus.settings.run(main)
    assert capsys.readouterr().err == (
        "error: No module named 'no_such_package'; `make` installs what is needed\n"
    )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Unsloth: No or negligible GPU memory available for fused cross entropy.",
    ],
)
def test_a_full_gpu_is_one_line(message, capsys):
    def main():
        raise RuntimeError(message)

    with pytest.raises(SystemExit, match="2"):
        orpheus.settings.run(main)
    assert "error: the GPU's memory is full" in capsys.readouterr().err


def crash():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """output_dir and the current folder, as a script that has read its settings knows them."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(orpheus.settings, "log_folders", [tmp_path / "out", Path()])
    return tmp_path / "out", tmp_path


def ends(main, capsys, code):
    """The last line of what a script that calls `main` prints before it exits with `code`."""
    with pytest.raises(SystemExit, match=f"^{code}$"):
        orpheus.settings.run(main)
    return capsys.readouterr().err.splitlines()[-1]


def test_any_other_error_is_one_line_and_a_log(folders, capsys):
    out, current = folders
    line = ends(crash, capsys, 1)
    start = "error: RuntimeError: CUDA error: an illegal memory access was encountered and more; "
    assert line == start + (f"the traceback is in {out / 'error.log'}")
    log = (out / "error.log").read_text()
    assert "in crash" in log and sys.argv[0] in log and not (current / "error.log").exists()


def test_a_log_is_written_where_it_can_be(folders, capsys):
    """In the current folder without an output_dir, and where there is no folder, on the console."""
    out, current = folders
    out.rmdir()
    assert ends(crash, capsys, 1).endswith("; the traceback is in error.log")
    assert "in crash" in (current / "error.log").read_text()
    (current / "error.log").unlink()
    (current / "error.log").mkdir()
    with pytest.raises(SystemExit):
        orpheus.settings.run(crash)
    errors = capsys.readouterr().err
    assert "in crash" in errors
    assert errors.splitlines()[-1].endswith(
        "; the traceback is above, since error.log cannot be written"
    )


def test_each_rank_has_a_log_of_its_own(folders, capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ends(crash, capsys, 1)
    assert sorted(path.name for path in folders[0].iterdir()) == ["error.log", "error.rank1.log"]


def test_a_cause_is_in_the_log_and_a_mistake_has_none(folders, capsys):
    def main():
        try:
            read_settings("no.json")
        except UserError as error:
            raise KeyError("weight_map") from error

    assert ends(main, capsys, 1).startswith("error: KeyError: 'weight_map'; ")
    log = folders[0] / "error.log"
    assert "FileNotFoundError" in log.read_text()
    log.unlink()
    line = "error: no.json: cannot be read: No such file or directory"
    assert ends(lambda: read_settings("no.json"), capsys, 2) == line and not log.exists()


def test_the_log_is_in_the_output_folder_that_is_given(tmp_path, monkeypatch, capsys):
    def main():
        read_command_line("")
        crash()

    monkeypatch.setattr(orpheus.settings, "log_folders", [])
    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", str(tmp_path)])
    assert ends(main, capsys, 1).endswith(f"{tmp_path}/error.log")


def test_a_pipe_gets_each_line_at_once():
    program = "import sys\nfrom orpheus.settings import run\n"
    program += "run(lambda: print(sys.stdout.line_buffering))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_closed_pipe_ends_quietly():
    program = "from orpheus.settings import run; run(lambda: [print('x' * 999) for _ in range(99)])"
    command = f"{sys.executable} -c {json.dumps(program)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.endswith("\n141\n")
