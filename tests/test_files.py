"""orpheus/files.py: folders that are whole or not there. (Files: test_runs.py.)"""

import pytest

from orpheus.files import atomic_folder, staging_folder
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
