from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from framework.runtime.lock import NAME, RunLock

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from framework.runtime.lock import RunLock
with RunLock(Path(sys.argv[1]), print):
    worker = os.fork() if sys.argv[2] == "with worker" else None
    if worker != 0:
        print("held", worker, flush=True)
    time.sleep(60)
    os._exit(0)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def take(folder: Path) -> None:
    with RunLock(folder, pytest.fail):
        pass


def refusal(folder: Path) -> str:
    with pytest.raises(BlockingIOError) as caught:
        take(folder)
    return str(caught.value)


def test_one_after_the_other_in_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with RunLock(folder, pytest.fail):
            assert f"process {os.getpid()} on host {platform.node()} since 2" in (folder / NAME).read_text()
        assert (folder / NAME).read_bytes() == b""  # held by nobody, and saying so


def test_another_process_is_refused_with_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert says(process) == "held None"
        text = (tmp_path / NAME).read_text()
        message = refusal(tmp_path)
        assert message.startswith(f"{tmp_path} is in use by process {process.pid} on host {platform.node()} since 2")
        assert message.endswith("alone): wait for it, stop it, or choose another run.dir")
        refusal(tmp_path)  # being refused frees nothing
        assert (tmp_path / NAME).read_text() == text


def test_a_kill_frees_it_though_a_worker_lives(tmp_path: Path) -> None:
    with holder(tmp_path, "with worker") as process:
        worker = int(says(process).removeprefix("held "))
        try:
            refusal(tmp_path)
            process.kill()
            process.wait()
            os.kill(worker, 0)  # it is alive
            assert (tmp_path / NAME).read_text() != ""  # what the dead one left says nothing
            take(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_forked_child_that_ends_frees_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path, pytest.fail):
        child = multiprocessing.get_context("fork").Process(target=time.time)
        child.start()
        child.join()
        code = "import sys; from pathlib import Path; from framework.runtime.lock import RunLock\n"
        code += "with RunLock(Path(sys.argv[1]), print): pass"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(tmp_path)]
        other = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert other.returncode != 0 and f"in use by process {os.getpid()}" in other.stderr


def test_another_thread_of_the_process_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with RunLock(tmp_path / "run", pytest.fail):
        for name in ("run", "link", "run/../run"):
            thread = threading.Thread(target=lambda name=name: refused.append(refusal(tmp_path / name)))
            thread.start()
            thread.join()
        assert len(refused) == 3 and all("in use by another thread of this process" in text for text in refused)
    take(tmp_path / "run")


def test_a_directory_that_is_moved_while_it_is_locked_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf = fcntl.lockf

    def move(descriptor: int, how: int) -> None:
        lockf(descriptor, how)
        (tmp_path / "run").rename(tmp_path / "aside")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", move)
        assert "by a process that is moving it aside" in refusal(tmp_path / "run")
    take(tmp_path / "run")


def test_a_file_system_without_locks_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert "process" in (tmp_path / NAME).read_text()
    assert said == [
        f"the file system of {tmp_path} has no locks (No locks available): "
        "take care that only one process at a time trains there"
    ]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path}/file/run"):
        take(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        take(tmp_path / "file" / "run")  # and leaves nothing held


def test_a_full_disk_does_not_free_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(tmp_path, pytest.fail):
        assert "another thread" in refusal(tmp_path)
    take(tmp_path)
