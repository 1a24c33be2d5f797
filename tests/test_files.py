"""orpheus/files.py: files and folders that are whole or not there."""

import fcntl

import pytest
from running import contents

from orpheus.files import atomic_file, atomic_folder, staging_folder, write_text
from orpheus.settings import UserError


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "new/merged"
    with atomic_folder(out) as part:
        (part / "a.txt").write_text("whole")
        assert not out.exists()
    assert (out / "a.txt").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "other") as part:
        (part / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("left", ["folder", "file", "link"])
def test_what_a_killed_process_left_is_removed(left, tmp_path):
    path = tmp_path / ".adapter.part"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").touch()
    if left == "folder":
        (path / "torn").mkdir(parents=True)
    elif left == "file":
        path.write_text("torn")
    else:
        path.symlink_to(tmp_path / "mine")
    with staging_folder(path) as part:
        assert part == path and not list(part.iterdir())
    assert not path.exists() and (tmp_path / "mine/a.txt").exists()


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(UserError, match="out: cannot be written"), atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_part_that_a_kill_left_is_taken_up(tmp_path):
    path = tmp_path / "a.wav"
    (tmp_path / ".a.wav.part").write_text("torn and much longer")
    write_text(path, "whole")
    assert contents(tmp_path) == {"a.wav": b"whole"}


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
    for _ in range(200):
        write_text(path, letter * 50_000)


def test_a_part_in_use_is_not_touched(tmp_path):
    path = tmp_path / "a.txt"
    with (tmp_path / ".a.txt.part").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        write_text(path, "ours")
        assert (tmp_path / ".a.txt.part").exists()
    assert path.read_text() == "ours"
