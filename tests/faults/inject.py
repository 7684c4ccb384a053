"""Faults at the n-th operation on the disk, through the seams of framework/runtime/files.py."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framework.runtime import files

OPERATIONS = ("_write", "_fsync", "_replace", "_remove")


class Killed(BaseException):
    """The process ends here: no handler of Exception may run."""


def kill() -> BaseException:
    return Killed()


def disk_full() -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_disk() -> BaseException:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def read_only() -> BaseException:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


def _half(name: str, arguments: tuple[Any, ...]) -> None:
    """Do an operation by half, where it has halves."""
    if name == "_write":
        file, content = arguments
        file.write(content[: len(content) // 2])
        file.flush()
    elif name == "_remove" and arguments[0].is_dir():
        for path in sorted(arguments[0].iterdir())[::2]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def faults(
    error: Callable[[], BaseException] = kill, at: int | None = None, half: bool = False, from_then_on: bool = False
) -> Iterator[list[str]]:
    """Raise an error at the operation number ``at``, counted from 0; yields the operations so far, as they come.

    Args:
        error: makes what is raised.
        at: no operation fails where it is ``None``.
        half: the operation is half done before.
        from_then_on: all later operations fail too.
    """
    real = {name: getattr(files, name) for name in OPERATIONS}
    real["_fsync"] = lambda descriptor: None  # what survives a power cut is not the question here, and it takes long
    done: list[str] = []

    def operation(name: str) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            number = len(done)
            done.append(f"{name} {_file_of(arguments[0])}")
            if at is not None and (number == at or (from_then_on and number > at)):
                if half:
                    _half(name, arguments)
                failure = error()
                if isinstance(failure, OSError) and name in ("_replace", "_remove"):
                    failure.filename = str(arguments[0])  # as the real ones have it
                raise failure
            real[name](*arguments)

        return run

    saved = {name: getattr(files, name) for name in OPERATIONS}
    for name in OPERATIONS:
        setattr(files, name, operation(name))
    try:
        yield done
    finally:
        for name, function in saved.items():
            setattr(files, name, function)


def _file_of(argument: Any) -> str:
    if isinstance(argument, Path):
        return argument.name
    if isinstance(argument, int):
        return Path(os.readlink(f"/proc/self/fd/{argument}")).name
    return Path(argument.name).name
