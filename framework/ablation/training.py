"""Training a grid: each cell in a process of its own, so that whatever ends it ends no other."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Literal

from framework import runs
from framework.ablation.grid import Cell, Grid
from framework.ablation.report import write_report
from framework.engine.stop import StopFlag
from framework.runtime.files import append_text

SECONDS_BETWEEN_LOOKS = 0.1
LAST_LINES = 8
"""Of a failed cell's log, shown on the terminal."""


def survey(cells: Sequence[Cell]) -> tuple[list[Cell], dict[Cell, str]]:
    """The finished cells; and those whose folder holds another run, with the difference."""
    finished, refused = [], {}
    for cell in cells:
        try:
            if runs.is_finished(cell.config):
                finished.append(cell)
        except runs.RunError as error:
            refused[cell] = str(error)
    return finished, refused


def train_cells(
    grid: Grid,
    cells: Sequence[Cell],
    chosen: Sequence[Cell],
    program: Sequence[str],
    jobs: int,
    say: Callable[[str], None],
) -> Literal["finished", "failed", "stopped"]:
    """Train those of the chosen cells that are not finished, and write the report after each.

    Args:
        grid: where results go.
        cells: all of them, for the report.
        chosen: some of them.
        program: what trains a cell when it gets the cell's ``command`` as arguments.
        jobs: cells at a time.
        say: told which cell starts, ends or fails and why, and how long the rest takes.

    Returns:
        ``stopped`` if a signal came; the cells that ran then were told to save and stop, and the same call continues.

    Raises:
        RunError: if several cells at a time leave their threads to the machine, or a metric is not there.
    """
    if jobs > 1 and any(cell.config.tree["run"].get("threads") is None for cell in chosen):
        raise runs.RunError(
            f"{jobs} cells at a time would each take all cores, and the number of threads changes the last bits of "
            "results: say how many, such as run.threads=1, here or in the grid's overrides"
        )
    finished, refused = survey(cells)
    failed = [cell for cell in chosen if cell in refused]
    waiting = [cell for cell in chosen if cell not in finished and cell not in refused]
    running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}
    seconds: list[float] = []

    def settle(cell: Cell, code: int, took: float) -> None:
        """Account for a cell that has ended by itself."""
        if code == 0:
            finished.append(cell)
            seconds.append(took)
            write_report(grid, cells, finished)
            say(f"finished {cell.name}")
        else:
            failed.append(cell)
            lines = cell.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            say("\n  ".join([f"failed {cell.name}, {_end(code)}, log in {cell.log}:", *lines]))
        left = len(waiting) + len(running)
        done = len(chosen) - len(failed) - left
        text = f"{done} of {len(chosen)} cells done, {len(running)} running, {len(failed)} failed"
        if seconds and left:
            mean = sum(seconds) / len(seconds)
            text += f", {mean:.0f} s a cell, {timedelta(seconds=round(mean * left / jobs))} left"
        say(text)

    for cell in failed:
        say(f"failed {cell.name}: {refused[cell]}")
    say(f"{len(chosen)} cells, {len(waiting)} to train")
    write_report(grid, cells, finished)
    with StopFlag() as stop:
        try:
            while (waiting or running) and not stop.is_set:
                while waiting and len(running) < jobs:
                    running[waiting[0]] = _start(waiting[0], program), time.monotonic()
                    say(f"started {waiting[0].name}, log in {waiting[0].log}")
                    del waiting[0]
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for cell, (process, began) in list(running.items()):
                    if process.poll() is not None and not stop.is_set:
                        del running[cell]
                        settle(cell, process.returncode, time.monotonic() - began)
        finally:  # told once: a second signal would end them while they save
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()
    if stop.is_set:
        return "stopped"
    return "failed" if failed else "finished"


def _start(cell: Cell, program: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [*program, *cell.command]
    append_text(cell.log, f"$ {shlex.join(command)}\n")
    with open(cell.log, "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _end(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}" + (", as for want of memory" if code == -signal.SIGKILL else "")
