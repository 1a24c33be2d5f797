"""Files and folders that are whole or not there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orpheus.settings import UserError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a new name for a file, or a folder, which is renamed to `path` at the end.

    So `path` is whole or not there, whatever other processes write it. A folder can only replace
    an empty one.

    Raises:
        UserError: something cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:  # after an error it is still there
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def make_folder(path: str, name: str) -> None:
    """Makes a folder and tries to write into it; `UserError` names the key that it is set by."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        remedy = f"set --{name} to a folder that can be written"
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
