"""Progress of work whose amount is known: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Stages:
    """Call it with the name of a stage, how much of it is done, and how much there is; a context manager.

    Where much is done before the first call, call it with 0 at the start, for the time left to be right.

    Args:
        console: where a bar is drawn, standard error unless given; if it is no terminal, lines go to standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        name, bar = TextColumn("{task.description}"), BarColumn(bar_width=24)
        columns = (name, bar, MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self.console, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._said = perf_counter()

    def __enter__(self) -> Stages:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = perf_counter()
        began = self._began.setdefault(stage, now)
        if self.console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total, refresh=True)
        elif now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            left = f", {(now - began) / done * (total - done):.0f} s left" if done else ""
            print(f"{stage}: {done}/{total}{left}", file=sys.stderr, flush=True)
