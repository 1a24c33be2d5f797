"""Files and folders that are whole or not there."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orpheus.settings import UserError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which is renamed to `path` at the end: it is whole or not there.

    The name is always the same, so that what a killed process left is overwritten by the next one.
    It is locked: while another process writes to it, a name with random letters is used.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(lock.fileno()), part.stat())
            except OSError:  # another process writes to it, or has just renamed it
                free = False
            if not free:
                part = part.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
            try:
                yield part
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder at `path`, whose files the caller moves into place.

    What a killed process left there is removed first, and what is left of it in the end.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)  # a file or a link
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to write to, which is renamed to `path` at the end.

    `path` is whole or not there. It must not exist before, unless as an empty folder.
    """
    try:
        with staging_folder(path.with_name(f".{path.name}.part")) as part:
            yield part
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
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
