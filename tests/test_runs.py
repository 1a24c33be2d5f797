"""A run's checkpoints, the command that resumes it, and what may change on resume."""

import sys

import pytest
from running import run_here, settings_of

from orpheus.hub import is_adapter
from orpheus.runs import last_checkpoint, resume_command
from orpheus.settings import UserError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"{}"),
        ("trainer_state.json", b"[]"),
        ("trainer_state.json", b'{"global_step": "x"}'),
        ("trainer_state.json", None),
        ("optimizer.pt", b""),
        ("optimizer.pt", b"PK" + b"0" * 5000),
        ("scheduler.pt", b""),
        ("rng_state.pth", b""),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", None),
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
    first, again = settings_of(resume="false"), settings_of(resume="true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["../finetune.py", "--output_dir", "my voice"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    command = resume_command(first)
    assert command == ".venv/bin/python ../finetune.py --output_dir 'my voice' --resume"
    monkeypatch.setattr(sys, "executable", "/opt/py thon")
    command = resume_command(again)
    assert command == "'/opt/py thon' ../finetune.py --output_dir 'my voice'"


def test_a_changed_run_is_not_resumed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_here(monkeypatch, out, save_steps="2")
    (out / "adapter_config.json").unlink()  # as if the end had not been reached
    with pytest.raises(UserError, match=r"lora_r was \d+ and is 4; .* --overwrite") as told:
        run_here(monkeypatch, out, resume="true", lora_r="4", limit="7", max_steps="4")
    assert "limit was 8 and is 7" in str(told.value) and "data has changed" in str(told.value)
    assert "max_steps" not in str(told.value)


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
