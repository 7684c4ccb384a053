"""Several processes on this machine that train one model; when one fails, all end, and its reason is told."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from framework import runs
from framework.config import Config
from framework.launch.environment import joined

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_OF_GRACE = 15.0
"""For the others to end by themselves after one has failed, and again after they were asked to."""
STOPPED = 130
PEER_ERROR = 3
"""Exit codes: saved and stopped as a signal asked, and ended because another process did."""
LAST_LINES = 20


def train(config: Config, command: Sequence[str], fresh: bool = False) -> int:
    """Train in as many processes as ``launch.num_processes`` says: start them, or be one; returns the exit code.

    Args:
        config: checked before any process starts.
        command: what starts this program again, as one of the processes.
        fresh: as in ``runs.train``.
    """
    count = (config.tree.get("launch") or {}).get("num_processes", 1)
    if "WORLD_SIZE" not in os.environ and count != 1:
        runs.check(config)
        return run_processes(command, count)
    with joined() as ranks:
        status = runs.train(config, print, fresh, ranks).status
    return 0 if status == "finished" else STOPPED


def run_processes(command: Sequence[str], count: int) -> int:
    """Run the command ``count`` times with torchrun's environment variables; returns the exit code of all.

    Rank 0 has the terminal; what the others print is told where one of them is the reason of a failure. Signals are
    passed on to all. Threads share the cores, unless OMP_NUM_THREADS is set.
    """
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank_{rank}.log" for rank in range(count)]
        processes: list[subprocess.Popen[bytes]] = []
        previous = {number: signal.signal(number, lambda n, frame: _send(processes, n)) for number in FORWARDED}
        try:
            for rank, log in enumerate(logs):
                variables = threads | dict(os.environ) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                output: Any = None if rank == 0 else log.open("wb")
                # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
                started = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
                processes.append(started)
            return _wait(processes, logs)
        finally:
            _send(processes, signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> int:
    """Until all have ended; the one that failed first, and not because another had, is the reason."""
    failed: int | None = None
    measures: list[tuple[float, signal.Signals]] = []  # when to end the others, and how
    while None in (codes := [process.poll() for process in processes]):
        if failed is None and (failed := _culprit(codes)) is not None:
            soon = time.monotonic() + SECONDS_OF_GRACE
            measures = [(soon, signal.SIGTERM), (soon + SECONDS_OF_GRACE, signal.SIGKILL)]
        while measures and time.monotonic() > measures[0][0]:
            _send(processes, measures.pop(0)[1])
        time.sleep(SECONDS_BETWEEN_LOOKS)
    ends = [process.wait() for process in processes]
    failed = _culprit(ends) if failed is None else failed
    if failed is None:
        return max(ends)
    code = ends[failed]
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    print(f"process {failed} of {len(ends)} failed ({how}), and so all have ended", file=sys.stderr)
    if failed:
        print("\n".join(logs[failed].read_text(errors="replace").splitlines()[-LAST_LINES:]), file=sys.stderr)
    return code if code > 0 else 128 - code


def _culprit(codes: Sequence[int | None]) -> int | None:
    """The first process that has failed for a reason of its own."""
    fine = (None, 0, STOPPED, PEER_ERROR)
    return next((rank for rank, code in enumerate(codes) if code not in fine), None)


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    """On every interface, and below the ports that the system gives to whoever asks for any, so that it stays free."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as listening, suppress(OSError):
            listening.bind(("", port))
            return port
