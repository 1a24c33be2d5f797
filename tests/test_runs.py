"""orpheus/runs.py: the folder of a run, what may change on resume, its card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, change, one_line
from running import KEYS, contents, run_here, same_file, settings_of

import finetune
from orpheus import runs
from orpheus.files import is_adapter
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT, find_checkpoint, last_checkpoint, lock_folder
from orpheus.settings import UserError

WEIGHTS = "adapter_model.safetensors"
TAGGED = KEYS | {"sample_texts": '["two"]', "max_seconds": "0.3", "report_to": "tensorboard"}


# ---------------------------------------------------------------- whose folder it is


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-7", "adapter_config.json", "samples"])
def test_a_folder_with_something_else_is_refused_by_name(name, overwrite, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, and no run of finetune.py: choose another"):
        find_checkpoint(settings_of(output_dir=str(tmp_path), overwrite=overwrite))


def test_what_a_start_that_failed_leaves_blocks_no_second_one(tmp_path, monkeypatch):
    """The same command again, after a failure before the first checkpoint; nothing is renamed."""
    out = tmp_path / "out"
    (out / "runs/Nov28_host").mkdir(parents=True)
    for name in ("error.log", "train.log", ".DS_Store", "data_report.json", "data_report.png"):
        (out / name).touch()  # of the doctor, a shell, a file manager
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_here(patch, out, **KEYS)
    assert (out / SAVED_CONFIG).is_file()
    run_here(monkeypatch, out, overwrite="true", **KEYS)
    assert is_adapter(out) and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / runs.LOCK).exists()


def test_a_run_is_named_with_what_to_type(run_copy, monkeypatch, capsys):
    """Exactly: the commands that go on, train longer and start anew are those that then do so."""
    words = ["finetune.py", *DEMO, "--output_dir", str(run_copy)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "executable", os.getcwd() + "/.venv/bin/python")
    settings = settings_of(output_dir=str(run_copy))
    start = " ".join([".venv/bin/python", *words])
    anew = f"`{start} --overwrite` starts anew, and keeps this one"
    with pytest.raises(UserError) as told:
        find_checkpoint(settings)
    longer = f"`{start} --resume --max_steps 6` trains it longer"
    assert str(told.value) == f"{run_copy} holds a finished run: {longer}; {anew}"
    (run_copy / "adapter_config.json").unlink()
    with pytest.raises(UserError) as told:
        find_checkpoint(settings)
    more = f"`{start} --resume` continues it"
    assert str(told.value) == f"{run_copy} holds an unfinished run: {more}; {anew}"


def test_overwrite_renames_the_whole_folder(run_copy, monkeypatch, capsys):
    (run_copy / "notes.txt").write_text("mine")
    (run_copy.parent / "out.old1").mkdir()
    before = contents(run_copy)
    link = run_copy.parent / "link"
    link.symlink_to(run_copy)  # as to a larger disk: what it points to is renamed, not the link
    run_here(monkeypatch, link, overwrite="true", **KEYS)
    kept = run_copy.parent / "out.old2"
    assert f"kept     the earlier run, as {kept}\n" in capsys.readouterr().out
    assert contents(kept) == before
    assert is_adapter(run_copy) and not (run_copy / "notes.txt").exists()
    assert link.is_symlink() and not list(run_copy.glob(".*"))


def test_a_data_mistake_costs_the_run_to_be_replaced_nothing(run_copy, monkeypatch):
    before = contents(run_copy)
    for keys in ({"dataset": "data/demo"}, {"max_length": "30"}, {"codec": "gone"}):
        with pytest.raises(UserError):
            run_here(monkeypatch, run_copy, overwrite="true", **KEYS | keys)
    assert contents(run_copy) == before and [run_copy] == [*run_copy.parent.iterdir()]


def test_overwrite_of_the_current_folder(run_copy, monkeypatch):
    before = contents(run_copy)
    settings = settings_of(output_dir=".", overwrite="true")
    monkeypatch.chdir(run_copy)
    with lock_folder(Path()):
        runs.set_aside(settings)
        runs.save_config(settings)
    assert [*contents(run_copy)] == [SAVED_CONFIG]
    assert contents(run_copy.with_name("out.old1")) == before


def test_a_second_run_in_the_same_folder_is_refused(run_copy, monkeypatch):
    """Also once the first has renamed the folder; and what a killed run leaves is no lock."""
    words = [*DEMO, "--output_dir", run_copy, "--overwrite"]
    (run_copy / runs.LOCK).touch()
    with lock_folder(run_copy):
        assert "another run is writing to" in one_line(finetune.main, monkeypatch, *words)
        runs.set_aside(settings_of(output_dir=str(run_copy), overwrite="true"))
        assert not list(run_copy.glob("[!.]*"))
        assert "another run is writing to" in one_line(finetune.main, monkeypatch, *words)
    assert not list(run_copy.parent.rglob(".*"))
    with lock_folder(run_copy):
        pass


HOLD = """
import sys, time
from pathlib import Path
from orpheus.runs import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("started", flush=True)
    time.sleep(60)
"""


def test_a_process_keeps_the_folder_until_it_is_killed(tmp_path, monkeypatch):
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as first:
        assert first.stdout.readline() == "started\n"
        second = one_line(finetune.main, monkeypatch, *DEMO, "--output_dir", tmp_path / "out")
        assert second.startswith(f"another run is writing to {tmp_path}/out: wait for it, or")
        first.kill()
    with lock_folder(tmp_path / "out"):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_folder(tmp_path):
        pass
    assert "cannot be locked (Operation not supported): start no second" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["/proc/x", "file/out", "n" * 300, "/dev/null"])
def test_a_folder_that_cannot_be_made_is_one_line(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written: .*; try another"),
        lock_folder(Path(out)),
    ):
        pytest.fail("a run began")


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"{"),
        ("trainer_state.json", None),
        ("optimizer.pt", b""),
        ("rng_state.pth", b"PK" + b"0" * 5000),
        (WEIGHTS, b""),
        (WEIGHTS, None),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(name, content, run_copy, capsys):
    newest, before = sorted(run_copy.glob("checkpoint-*"), reverse=True)[:2]
    assert last_checkpoint(run_copy) == newest
    if content is None:
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content)
    assert last_checkpoint(run_copy) == before
    assert f"{newest} is incomplete or damaged: passed over" in capsys.readouterr().out


def test_the_command_to_go_on_names_python_and_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["../finetune.py", "--output_dir", "my voice"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    expected = ".venv/bin/python ../finetune.py --output_dir 'my voice' --resume"
    assert runs.command("--resume") == expected
    sys.argv.append("--resume")
    assert runs.command("--resume") == expected
    assert runs.command("--resume", "--max_steps", "4") == f"{expected} --max_steps 4"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere/py thon"))
    monkeypatch.setattr(runs, "WORLD_SIZE", 2)
    launch = "'elsewhere/py thon' -m torch.distributed.run --nproc-per-node 2 ../finetune.py"
    assert runs.command("--resume").startswith(launch)


def test_a_finished_run_is_trained_longer(run_copy, tmp_path, monkeypatch, capsys):
    """With the bits of a run that was that long at once, and also after a kill in between."""
    run_here(monkeypatch, run_copy, resume="true", **TAGGED)
    assert "holds a finished run of this length: nothing to resume" in capsys.readouterr().out
    keys = TAGGED | {"max_steps": "5", "sample_texts": "[]"}
    run_here(monkeypatch, tmp_path / "whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_here(patch, run_copy, resume="true", **keys)
    run_here(monkeypatch, run_copy, resume="true", **keys | {"max_steps": "4"})
    assert "nothing to resume" in capsys.readouterr().out  # the adapter may be older, or newer
    shutil.rmtree(run_copy / "checkpoint-5")
    run_here(monkeypatch, run_copy, resume="true", **keys)
    assert "steps    5" in capsys.readouterr().out
    assert same_file(tmp_path / "whole" / WEIGHTS, run_copy / WEIGHTS)
    run_here(monkeypatch, run_copy, resume="true", **keys | {"max_steps": "-1"})
    assert "nothing to resume" not in capsys.readouterr().out


def test_a_run_without_checkpoints_is_not_trained_over(run_copy):
    for path in run_copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"it has no checkpoint to resume; `.* anew"):
        find_checkpoint(settings_of(output_dir=str(run_copy), resume="true"))


def test_the_data_may_move(run_copy, monkeypatch):
    """The digest of the rows decides: their folder, its form and the codec's may be others."""
    moved = Path(shutil.copytree("data/numbers", run_copy.parent / "moved"))
    codec = shutil.copytree("data/demo/codec", run_copy.parent / "codec")
    keys = TAGGED | {"max_steps": "4", "dataset": str(moved), "codec": str(codec), "limit": "null"}
    lines = (moved / "metadata.csv").read_text().splitlines()[:9]
    (moved / "metadata.csv").write_text("\n".join(lines) + "\n")
    run_here(monkeypatch, run_copy, resume="true", **keys)
    (moved / "metadata.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="cannot resume: the training data has changed; "):
        run_here(monkeypatch, run_copy, resume="true", **keys | {"max_steps": "5"})


def test_what_shapes_the_training_may_not_change(run_copy, monkeypatch):
    keys = TAGGED | {"lora_r": "4", "seed": "1", "adam_beta2": "0.9", "limit": "7", "held_out": "0"}
    keys |= {"per_device_train_batch_size": "1", "max_steps": "4", "logging_steps": "2"}
    with pytest.raises(UserError, match=r"cannot resume: .* --overwrite starts anew$") as told:
        run_here(monkeypatch, run_copy, resume="true", **keys)
    reasons = str(told.value).split("cannot resume: ")[1].split("; ")
    assert [reason.split()[0] for reason in reasons] == [
        *("adam_beta2", "lora_r", "seed"), "a", "the", "--overwrite"
    ]  # fmt: skip
    assert reasons[1] == "lora_r was 64 and is 4" and reasons[3].startswith("a step had 2 rows on")


def test_a_run_older_than_a_key_goes_on(run_copy, monkeypatch, capsys):
    """A key that its settings lack has its default; one that is no more does not count."""
    change(run_copy / SAVED_CONFIG, too_long=None, lora_dropout=None, gone=3)
    saved = json.loads((run_copy / SAVED_CONFIG).read_text())
    assert "too_long" not in saved and saved["gone"] == 3
    run_here(monkeypatch, run_copy, resume="true", **TAGGED | {"max_steps": "4"})
    assert "steps    4" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_its_optimiser_is_only_taken_if_that_is_meant(
    name, run_copy, monkeypatch, capsys
):
    (last_checkpoint(run_copy) / name).unlink()
    keys = TAGGED | {"max_steps": "4"}
    with pytest.raises(UserError, match=r"checkpoint-3: without .*: .* --resume weights"):
        run_here(monkeypatch, run_copy, resume="true", **keys)
    run_here(monkeypatch, run_copy, resume="weights", **keys)
    assert "steps    4" in capsys.readouterr().out


def test_the_rows_of_a_step_stay_on_another_number_of_ranks(run_copy, monkeypatch):
    checkpoint = last_checkpoint(run_copy)
    digest = json.loads((run_copy / SAVED_REPORT).read_text())["digest"]
    change(run_copy / SAVED_CONFIG, gradient_accumulation_steps=1)
    settings = settings_of(**json.loads((run_copy / SAVED_CONFIG).read_text()))
    settings = settings.replace(output_dir=str(run_copy))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    with pytest.raises(UserError, match=r"had 4 rows on 2 GPUs .*accumulation_steps 2 keeps"):
        runs.check_resumed(settings, digest, checkpoint)
    halves = settings.replace(gradient_accumulation_steps=4, per_device_train_batch_size=1)
    runs.check_resumed(halves, digest, checkpoint)
    monkeypatch.setattr(runs, "WORLD_SIZE", 2)
    runs.check_resumed(settings, digest, checkpoint)


@pytest.mark.parametrize("largest", [100_000, 8_000_000])  # bytes: fails in adapter, in optimiser
def test_a_full_disk_leaves_the_last_checkpoint(largest, tmp_path, monkeypatch):
    """The system itself refuses to write on, in the second checkpoint; then --resume goes on."""
    import resource

    from trl import SFTTrainer

    save, (soft, hard) = SFTTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_and_fill(self, *words):
        try:
            save(self, *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))

    keys = {"save_steps": "1", "save_total_limit": "1", "report_to": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "_save_checkpoint", save_and_fill)
        with pytest.raises(UserError) as caught:
            run_here(patch, tmp_path, **keys)
    told = f"{tmp_path} cannot be written, its disk is full: free some of it, then --resume; "
    assert str(caught.value) == f"step 2: {told}last checkpoint: {tmp_path}/checkpoint-1"
    run_here(monkeypatch, tmp_path, **keys, resume="true")
    assert is_adapter(tmp_path)


# ---------------------------------------------------------------- the card


def test_the_card_speaks_with_plain_libraries(demo_run, monkeypatch):
    """Its code, run as it stands but greedily and on this machine's folders, gives our codes."""
    from orpheus.voice import load_voice

    out = demo_run[0]
    card = (out / "README.md").read_text()
    assert "you/out" in card and str(out.parent) not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len([line for line in code.splitlines() if line]) < 20
    names = {"you/out": str(out), '"codec"': '"data/demo/codec"', "Hello there.": "seven two nine"}
    for name, ours in names.items():
        assert name in code
        code = code.replace(name, ours)
    code = re.sub("do_sample=True,.*?top_p=[0-9.]+", "do_sample=False", code, flags=re.S)
    monkeypatch.setattr("soundfile.write", lambda *words: said.append(words))
    names, said = {}, []
    with torch.no_grad():
        exec(code, names)
    voice = load_voice(out, temperature=0, repetition_penalty=1)
    (part,) = next(voice.speak(["seven two nine"])).parts
    size = names["codec"].codebook_size
    codes = names["codes"].numpy()
    assert ((codes >= 0) & (codes < size)).all() and len(codes)
    np.testing.assert_array_equal(codes, np.array(part.codes))
    assert len(said) == 1 and said[0][2] == 24_000


def test_the_card_has_what_the_hub_and_a_reader_want(run_copy):
    from huggingface_hub import ModelCard

    card = ModelCard.load(run_copy / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-to-speech")
    assert "8 clips of numbers, 0.3 minutes; voices: slt; 0 clips held out." in card.text
    assert "a LoRA of rank 64 over 16bit weights, learning rate 0.002" in card.text
    assert (run_copy / "sample.wav").is_file() and "[A sample](sample.wav)" in card.text
    settings = settings_of(full_finetuning="true", model="you/base")
    text = runs.model_card(run_copy, settings, "anna")
    assert "all weights, learning" in text and "transformers import AutoModelForCausalLM" in text
    assert "base_model: you/base" in text and "Merged: equal." in runs.model_card(
        run_copy, settings, "anna", "equal"
    )
    (run_copy / "README.md").write_text("mine")
    runs.save_card(settings.replace(output_dir=str(run_copy)))
    assert (run_copy / "README.md").read_text() == "mine"
