"""Stopping cleanly: a signal sets a flag, and the loop saves at the next step boundary.

SIGINT and SIGTERM end the run for now; SIGUSR2, which SLURM sends before it takes the machine away, asks for a requeue.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """While entered, signals set ``is_set``, and SIGUSR2 ``is_preempted``; a second SIGINT raises KeyboardInterrupt.

    The previous handlers come back on leaving. Outside the main thread Python takes no handlers: the flag stays unset.
    """

    def __init__(self) -> None:
        self.is_set = False
        self.is_preempted = False
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker inherited this handler: Ctrl-C is its parent's to answer
            if number == signal.SIGINT:
                return
            raise SystemExit(128 + number)
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        # What was asked for last counts: SIGTERM after SIGUSR2 may be somebody who cancels the job.
        self.is_preempted = number == signal.SIGUSR2
        if not self.is_set:
            self.is_set = True
            # os.write, since print may be interrupted in itself and refuse to be entered again.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving after this step, then stopping; Ctrl-C again stops now\n".encode())
