"""What is measured between two log lines: means of numbers, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter

Phase = Callable[[str], AbstractContextManager[object]]
"""What a step enters around its phases, by their names; a profiler's ``record_function``, unless one measures more."""


class Means:
    """Means of named numbers since they were last taken; a name counts the steps that brought it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, numbers: Mapping[str, float]) -> None:
        """Take in one step's numbers."""
        for name, value in numbers.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means, and start anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Sums and counts, so that a run resumed between two log lines logs the same means."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Continue where ``state`` was taken."""
        self._sums = dict(state)


class Stopwatch:
    """Images a second in training steps (validation and saving not counted), the wait for data, the time left."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        """Begin at ``step``, for the estimate of the time left."""
        self._first_step = step
        self._began = perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._images = 0
        self._seconds = 0.0
        self._waited = 0.0

    @contextmanager
    def step(self, images: int) -> Iterator[None]:
        """Around one training step on so many images."""
        began = perf_counter()
        yield
        self._seconds += perf_counter() - began
        self._images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside a step, around the wait for its batch."""
        began = perf_counter()
        yield
        self._waited += perf_counter() - began

    def take(self, step: int, max_steps: int) -> dict[str, float]:
        """``images_per_second`` and ``data_wait`` since the last call, ``eta_seconds`` at the pace of the session."""
        pace = (perf_counter() - self._began) / (step - self._first_step)
        timings = {
            "images_per_second": self._images / self._seconds,
            "data_wait": self._waited / self._seconds,
            "eta_seconds": pace * (max_steps - step),
        }
        self._reset()
        return timings
