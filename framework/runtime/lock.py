"""One process at a time: a lock on a run directory that the kernel frees when its holder dies, however it dies.

It is a POSIX record lock on ``run.lock`` in the directory. It belongs to the process, so that forked loader workers,
which may outlive a killed parent by seconds, do not hold it. The file's text is for people: only the kernel knows
whether the lock is held, and what a killed process left in the file means nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shlex
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar

NAME = "run.lock"
_FLOCK, _TYPE = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi", 0)
"""The system's ``struct flock``, and which of its members is the lock's type."""


def is_held(folder: Path) -> bool:
    """Whether another process holds the directory's lock; the kernel is asked, and nothing is locked meanwhile."""
    question = [0] * 5
    question[_TYPE] = fcntl.F_RDLCK
    try:
        with open(folder / NAME, "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, *question))
    except OSError:
        return False
    return bool(struct.unpack(_FLOCK, answer)[_TYPE] != fcntl.F_UNLCK)


class RunLock:
    """While entered, no other process and no other thread can lock the directory.

    Args:
        folder: the run directory; made where there is none.
        say: told where the file system has no locks; the directory is then used without one.
    """

    # The kernel never refuses a process its own lock, and frees it when any descriptor of the file is closed.
    _held_here: ClassVar[dict[Path, RunLock]] = {}

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say

    def __enter__(self) -> None:
        """Take the lock at once, or raise.

        Raises:
            BlockingIOError: if another has it; the text says who, and what to do.
            OSError: if the directory cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder.resolve() / NAME
        if self._held_here.setdefault(self._path, self) is not self:
            raise self._in_use("another thread of this process")
        with ExitStack() as undo:
            undo.callback(self._held_here.pop, self._path)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            undo.callback(os.close, self._descriptor)
            self._lock()
            self._undo = undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self._write("")
        self._undo.close()

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(self._descriptor, 4096).decode(errors="replace").strip()
                raise self._in_use(holder or "another process") from None
            self.say(
                f"the file system of {self.folder} has no locks ({error.strerror}): "
                "take care that only one process at a time trains there"
            )
        if not self._path.exists() or not os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
            raise self._in_use("a process that is moving it aside")
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write(f"process {os.getpid()} on host {platform.node()} since {since} ({shlex.join(sys.argv)})\n")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # on a full disk the lock still holds
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(errors="replace"), 0)

    def _in_use(self, holder: str) -> BlockingIOError:
        return BlockingIOError(f"{self.folder} is in use by {holder}: wait for it, stop it, or choose another run.dir")
