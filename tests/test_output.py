"""What a run does to its output folder: replacing, files of the user, locks."""

import contextlib
import fcntl
import json
import os
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, one_line
from running import KEYS, contents, run_here, settings_of

import finetune
import orpheus.output
from orpheus.hub import is_model
from orpheus.output import (
    MANIFEST,
    MOVING,
    check_location,
    check_output,
    finish_replacement,
    output_lock,
    owned_files,
    record_files,
    save_card,
    set_aside,
)
from orpheus.runs import PREVIOUS, SAVED_CONFIG
from orpheus.settings import UserError, read_settings

MINE = ("samples/mine.wav", "runs/mine/x", "notes/a", "adapter_notes.txt", "model.txt")


def add_mine(out: Path) -> None:
    for name in MINE:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")


def test_the_manifest_lists_all_that_a_run_leaves(run_folder):
    names = json.loads((run_folder / MANIFEST).read_text())["files"]
    for path in contents(run_folder):
        assert any(path == name or path.startswith(name + "/") for name in names), path
    assert not list(run_folder.glob(".*"))


def test_checkpoints_at_an_epochs_end_are_listed(tmp_path, monkeypatch):
    keys = {"max_steps": "-1", "num_train_epochs": "1", "report_to": "none"}
    run_here(monkeypatch, tmp_path, limit="4", save_strategy="epoch", **keys)
    assert tmp_path / "checkpoint-2" in owned_files(tmp_path)


@pytest.mark.parametrize("error", [UserError("a"), KeyboardInterrupt(), SystemExit(1)])
def test_a_run_that_fails_gives_the_replaced_one_back(error, run_copy, monkeypatch, capsys):
    add_mine(run_copy)
    before = contents(run_copy)

    def fail(trainer, *_):
        assert not is_model(run_copy)
        assert (run_copy / SAVED_CONFIG).is_file()
        (run_copy / "samples/later.wav").parent.mkdir(exist_ok=True)
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(finetune, "train", fail)
        run_here(patch, run_copy, overwrite="true", **KEYS)
    assert contents(run_copy) == before
    assert "holds the earlier run again" in capsys.readouterr().out


def test_a_setting_that_the_optimiser_refuses_costs_nothing(run_copy, monkeypatch):
    before = contents(run_copy)
    with pytest.raises(ValueError):
        run_here(monkeypatch, run_copy, overwrite="true", learning_rate="-1", **KEYS)
    assert contents(run_copy) == before


def test_a_new_run_replaces_the_old_and_nothing_else(run_copy, monkeypatch):
    add_mine(run_copy)
    (run_copy / "README.md").unlink()
    (run_copy / "README.md").write_text("mine")
    names = json.loads((run_copy / MANIFEST).read_text())["files"]
    listed = json.dumps({"files": [name for name in names if name != "README.md"]})
    (run_copy / MANIFEST).write_text(listed)
    keys = KEYS | {"save_steps": "2", "max_steps": "2", "sample_steps": "9"}
    run_here(monkeypatch, run_copy, overwrite="true", **keys)
    found = contents(run_copy)
    assert all(found[name] == b"mine" for name in (*MINE, "README.md"))
    assert {p.name for p in run_copy.glob("checkpoint-*")} == {"checkpoint-2"}
    assert {p.name for p in (run_copy / "samples").iterdir()} == {"mine.wav"}
    assert {p.name for p in (run_copy / "runs").iterdir()} == {"mine"}
    assert not list(run_copy.glob(".*"))


def test_the_old_run_goes_at_the_first_checkpoint(run_copy, monkeypatch):
    save = finetune.save_model

    def look(trainer, tokenizer, out):
        assert not (out / PREVIOUS).exists() and (out / "checkpoint-1").is_dir()
        save(trainer, tokenizer, out)

    monkeypatch.setattr(finetune, "save_model", look)
    run_here(monkeypatch, run_copy, overwrite="true", max_steps="1", **KEYS)


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(number: int):
    """From the given call on, nothing changes in the file system any more, as after SIGKILL."""
    calls = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > number:
                raise Killed
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def write_run(out: Path, text: str, *names: str) -> None:
    record_files(out, *(name if "/" not in name else name.rpartition("/")[0] for name in names))
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


NEW = ("checks.csv", SAVED_CONFIG, "samples/step-000001/01.wav", "runs/b/events")
OLD = (*NEW, "runs/a/events", "samples/step-000009/01.wav", "checkpoint-9/a", "checkpoint-9/b")
OLD += ("adapter_model.safetensors", "adapter_config.json")


@pytest.mark.parametrize("saved", [(), ("adapter_config.json",)])
def test_a_kill_at_any_moment_of_a_replacement_loses_nothing(saved, tmp_path):
    """At each change of the file system; the next start finds the old run, or the new one whole."""
    for number in range(200):
        out, ended = tmp_path / str(number), False
        out.mkdir()
        add_mine(out)
        new = {**contents(out), **dict.fromkeys((*NEW, *saved), b"new")}
        write_run(out, "old", *OLD)
        old = contents(out)
        with contextlib.suppress(Killed), killed_at(number):
            set_aside(out)
            write_run(out, "new", *NEW)
            write_run(out, "new", *saved)
            finish_replacement(out)
            ended = True
        finish_replacement(out)
        found = contents(out)
        found.pop(f".{MANIFEST}.part", None)  # the next run overwrites it
        if found["adapter_config.json"] == b"new":
            del found[MANIFEST]
        assert found == (new if len(found) == len(new) else old), number
        assert not (out / PREVIOUS).exists() and not (out / MOVING).exists()
        if ended:
            assert (found == new) == bool(saved)
            return
    pytest.fail("it never came to its end")


def test_a_killed_run_is_followed_by_the_run_it_was_to_replace(run_copy):
    before = contents(run_copy)
    set_aside(run_copy)
    record_files(run_copy, SAVED_CONFIG, "checkpoint-1")
    (run_copy / SAVED_CONFIG).write_text("{}")
    (run_copy / "checkpoint-1").mkdir()  # torn
    check_output(settings_of(output_dir=str(run_copy), overwrite="true"))
    assert contents(run_copy) == before
    with pytest.raises(SystemExit):  # finished: nothing to resume
        check_output(settings_of(output_dir=str(run_copy), resume="true"))


def test_resuming_without_a_checkpoint_starts_anew_and_says_so(tmp_path, capsys):
    out = tmp_path / "anna"
    assert check_output(settings_of(output_dir=str(out), resume="true")) is None
    printed = f"warning  --resume found no complete checkpoint in {out}: training starts from the "
    assert capsys.readouterr().out == f"{printed}beginning\n"


def test_a_killed_run_with_a_checkpoint_is_kept(run_copy):
    set_aside(run_copy)
    os.rename(run_copy / PREVIOUS / "checkpoint-3", run_copy / "checkpoint-3")
    record_files(run_copy, "checkpoint-3")
    settings = settings_of(output_dir=str(run_copy), resume="true")
    assert check_output(settings) == run_copy / "checkpoint-3"
    assert not (run_copy / PREVIOUS).exists()


BAD_MANIFESTS = ["[]", "{", "{}", '{"files": 1}', '{"files": [1]}', '{"files": [""]}']
BAD_MANIFESTS += ['{"files": ["../x"]}', '{"files": ["a/../../x"]}', '{"files": ["/etc"]}']


@pytest.mark.parametrize("text", BAD_MANIFESTS)
def test_a_manifest_of_another_shape_is_refused(text, tmp_path):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=MANIFEST):
        check_output(settings_of(output_dir=str(tmp_path), overwrite="true"))


# ---------------------------------------------------------------- the user's files


@pytest.mark.parametrize("name", ["tokenizer.json", "checkpoint-7", "checkpoint-3-good",
                                  "checkpoint-notes", "samples/step-000010",
                                  "checks.csv", "adapter_config.json", "config.json"])  # fmt: skip
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_file_that_no_run_made_is_not_replaced(name, overwrite, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: finetune.py did not .* --output_dir"):
        check_output(settings_of(output_dir=str(tmp_path), overwrite=overwrite))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["samples", "runs"])
def test_a_file_in_the_place_of_a_folder_is_refused(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is a file"):
        check_output(settings_of(output_dir=str(tmp_path), overwrite="true"))


def test_a_users_readme_is_kept_and_ours_is_a_model_card(run_folder, tmp_path, capsys):
    from huggingface_hub import ModelCard

    card = ModelCard.load(run_folder / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-to-speech"
    for word in ("voices: slt", "infer.py", "8 clips"):
        assert word in card.text
    (tmp_path / "README.md").write_text("mine")
    save_card(settings_of(output_dir=str(tmp_path)))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "kept" in capsys.readouterr().out


def test_the_folders_that_a_run_reads_are_not_its_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voices/anna").mkdir(parents=True)
    (tmp_path / "voices/anna/metadata.csv").write_text("")
    (tmp_path / "link").symlink_to("voices")
    cases = [
        ("voices/anna", "voices/anna", "is the dataset"),
        ("voices", "voices/anna", "holds the dataset"),
        ("link", "voices/anna", "holds the dataset"),
        ("link/anna/../anna", "voices/anna", "is the dataset"),
        (".", "voices/anna/metadata.csv", "holds the dataset"),
        ("voices/anna", "voices/anna/metadata.csv", "holds the dataset"),
        (str(ROOT / "data/demo/base"), "voices/anna", "is the model"),
        (str(ROOT / "data"), "voices/anna", "holds the model"),
        (str(ROOT / "data/demo/codec"), "voices/anna", "is the codec"),
    ]
    paths = {name: str(ROOT / f"data/demo/{name}") for name in ("base", "codec")}
    for out, dataset, told in cases:
        keys = {"model": paths["base"], "codec": paths["codec"]}
        settings = read_settings(None, keys | {"output_dir": out, "dataset": dataset})
        with pytest.raises(UserError, match=told), output_lock(settings):
            pytest.fail("a run began")
    inside = {"output_dir": "voices/anna/out", "dataset": "voices/anna"}
    settings = read_settings(None, inside)
    check_location(settings)
    assert sorted(p.name for p in (tmp_path / "voices/anna").iterdir()) == ["metadata.csv"]


@pytest.mark.parametrize("out", ["/proc/x", "file/out", "n" * 300, "loop/out", "/dev/null",
                                 "d/" * 3000])  # fmt: skip
def test_an_impossible_output_dir_is_one_line(out, tmp_path, monkeypatch):
    settings = settings_of(output_dir=out)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError) as caught, output_lock(settings):
        pytest.fail("a run began")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- two runs


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    settings = settings_of(output_dir=str(tmp_path / "out"))
    with output_lock(settings):
        line = one_line(finetune.main, monkeypatch, *DEMO, "--output_dir", tmp_path / "out")
        assert f"another run (process {os.getpid()}) is writing to" in line
        assert check_output(settings) is None
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out/.finetune.lock").write_text("123")  # as a killed run leaves it
    with output_lock(settings):
        pass


def test_a_lock_on_a_file_that_was_just_removed_does_not_count(tmp_path, monkeypatch):
    """Another run removes the file between our opening it and locking it, as it ends."""
    flock = fcntl.flock

    def remove_and_lock(file, flags):
        os.unlink(file.name)
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    lock = output_lock(settings_of(output_dir=str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"another run .* is writing to"), lock:
        pytest.fail("a run began")


def test_only_the_first_rank_locks(tmp_path, monkeypatch):
    settings = settings_of(output_dir=str(tmp_path / "out"))
    with output_lock(settings):
        monkeypatch.setattr(orpheus.output, "RANK", 1)
        with output_lock(settings):
            assert check_output(settings) is None
