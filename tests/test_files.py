"""Files that are whole or not there; models in the hub's cache, on the hub, and out of reach."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import DryRunError, GatedRepoError, LocalEntryNotFoundError
from running import contents

from orpheus.files import CONFIG_FILES, MODEL_FILES, atomic_file, fetch, write_text
from orpheus.settings import UserError


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "new/merged"
    with atomic_file(out) as part:
        part.mkdir()
        (part / "a.txt").write_text("whole")
        assert not out.exists()
    assert contents(tmp_path) == {"new/merged/a.txt": b"whole"}
    with pytest.raises(UserError, match="merged: cannot be written"), atomic_file(out) as part:
        part.mkdir()
        (part / "a.txt").write_text("another")
    assert contents(tmp_path) == {"new/merged/a.txt": b"whole"}


def test_several_processes_write_one_file(tmp_path):
    """Each writes a long text of one letter many times over: what is read is always whole."""
    from multiprocessing import get_context

    path = tmp_path / "entry.json"
    context = get_context("fork")
    workers = [context.Process(target=write_often, args=(path, c)) for c in "abcd"]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if path.is_file():
            text = path.read_text()
            assert len(text) == 50_000 and len(set(text)) == 1
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["entry.json"]


def write_often(path, letter):
    for _ in range(50):
        write_text(path, letter * 50_000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, of which `hub.size` bytes are missing here; its calls are listed."""
    state = SimpleNamespace(cached=False, error=None, size=3 * 10**9, calls=[], folder=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()

    def snapshot_download(path, local_files_only=False, dry_run=False, tqdm_class=None, **_):
        state.calls.append("cache" if local_files_only else "sizes" if dry_run else "download")
        if local_files_only and not state.cached:
            raise LocalEntryNotFoundError("not here")
        if state.error and not local_files_only:
            raise DryRunError("cannot be accessed") from state.error
        file = SimpleNamespace(file_size=state.size, will_download=True)
        return [file, file] if dry_run else str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    space = SimpleNamespace(free=50 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)
    return state


def test_a_large_download_is_announced(hub, capsys):
    assert fetch("some/model", MODEL_FILES) == hub.folder
    assert hub.calls == ["cache", "sizes", "download"]
    line = f"download some/model: 6.0 GB to download to {hub.folder}, where 50.0 GB are free\n"
    assert capsys.readouterr().out == line
    hub.size = 1000
    fetch("some/model", CONFIG_FILES)
    assert capsys.readouterr().out == ""


def test_a_disk_that_is_too_small_is_told_before_the_download(hub):
    hub.size = 30 * 10**9
    with pytest.raises(UserError, match=r"60.0 GB to .* 50.0 GB are free: make room, or set HF_H"):
        fetch("some/model", MODEL_FILES)
    assert "download" not in hub.calls


def test_what_is_in_the_cache_is_used_without_asking_the_hub(hub):
    hub.cached = True
    assert fetch("some/model", MODEL_FILES) == hub.folder
    assert hub.calls == ["cache"]
    (hub.folder / "model.safetensors").unlink()  # as an older huggingface_hub may have left it
    fetch("some/model", MODEL_FILES)
    assert hub.calls[-1] == "download"


def test_a_hub_out_of_reach_and_a_gated_model_are_one_line(hub):
    import httpx

    hub.error = OSError("no route to host")
    with pytest.raises(UserError, match=r"hub cannot be reached; check the network, .* \(no route"):
        fetch("some/model", MODEL_FILES)
    answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    hub.error = GatedRepoError("403", response=answer)
    with pytest.raises(UserError, match="some/model: gated: accept its terms"):
        fetch("some/model", MODEL_FILES)
    with pytest.raises(UserError, match="tests/none/x: no such folder, and not a hub id"):
        fetch("tests/none/x", MODEL_FILES)
