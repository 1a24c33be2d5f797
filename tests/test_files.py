"""orpheus/files.py: files and folders that are whole or not there."""

import pytest
from running import contents

from orpheus.files import atomic_file, write_text
from orpheus.settings import UserError


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "new/merged"
    with atomic_file(out) as part:
        part.mkdir()
        (part / "a.txt").write_text("whole")
        assert not out.exists()
    assert (out / "a.txt").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "other") as part:
        part.mkdir()
        (part / "a.txt").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="merged: cannot be written"), atomic_file(out) as part:
        part.mkdir()
    assert contents(tmp_path) == {"new/merged/a.txt": b"whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.txt": b"old"}


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
