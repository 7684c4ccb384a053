"""Files that survive a crash: every write of the framework goes through this module.

A file is either the old one or the new one, never a torn one: the content goes to a temporary file in the same folder,
is forced to the disk, and takes the name in one step. What a kill may leave behind ends in ``.partial`` and is
overwritten or removed by the next run.

``_write``, ``_fsync``, ``_replace`` and ``_remove`` are the places that touch the disk; tests replace them to inject
faults. Errors name the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def _replace(source: Path, target: Path) -> None:
    os.replace(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file an error is about, since writing and syncing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # or the name would take the place of the words
            error.filename = error.filename or str(path)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written piece by piece; it takes its name, atomically and durably, at the end of the block.

    Its folder is made if there is none. An error inside the block leaves an existing file untouched, too.

    Raises:
        OSError: if the disk is full or the folder cannot be written; an existing file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with _naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            _fsync(file.fileno())
        _replace(temporary, path)
    except Exception:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextmanager
def growing_file(path: Path, start: bytes) -> Iterator[BinaryIO]:
    """A file that is appended to, for work that takes long; it takes its name, durably, at the end of the block.

    Unlike ``new_file`` an error or a kill leaves what was written, and the next block goes on behind it. The block
    finds the file's position at its end, and may truncate it.

    Args:
        start: what the file begins with; something else there is removed first.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL)
    with _naming(path), open(temporary, "a+b") as file:
        file.seek(0)
        if file.read(len(start)) != start:
            file.truncate(0)
            _write(file, start)
        file.seek(0, os.SEEK_END)
        yield file
        file.flush()
        _fsync(file.fileno())
    _replace(temporary, path)
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, as ``new_file`` does."""
    with new_file(path) as file:
        _write(file, content)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """Add text at the end of a file; a kill may tear the last line, and ``sync`` makes it durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), open(path, "ab") as file:
        _write(file, text.encode())


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    with _naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)


def publish_folder(partial: Path, target: Path) -> None:
    """Give a folder whose files are all written its final name, durably; what had that name is removed first."""
    sync(partial)
    if os.path.lexists(target):
        remove_folder(target)
    _replace(partial, target)
    sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one, so that a kill leaves it whole or under a name that ends in ``.partial``."""
    doomed = path.with_name(path.name + ".removed" + PARTIAL)
    if os.path.lexists(doomed):
        _remove(doomed)
    _replace(path, doomed)
    _remove(doomed)


def remove_partial(folder: Path) -> None:
    """Remove what killed writes and removals left in a folder; only the run that owns the folder may."""
    for path in folder.glob("*" + PARTIAL):
        _remove(path)


def digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()
