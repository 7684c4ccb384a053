"""What a run tells while it goes on: numbers in files, lines in a log, a bar on a terminal.

Numbers that a repeated run gives again bit for bit (losses, norms, learning rates) go to ``metrics.jsonl``; wall-clock
values (images/s, memory) go to ``timing.jsonl``. So the first file of a run that was stopped and resumed equals the
first file of a run that was not, byte for byte.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from framework.runtime import files


@dataclass(frozen=True)
class Record:
    """Numbers of one step.

    Args:
        step: steps taken so far.
        total: steps of the whole run.
        values: what a repeated run gives again exactly, such as ``tokenizer/loss`` or ``validation/mse``.
        timings: what the wall clock and the machine decide: ``images_per_second``, ``data_wait`` (share of the time),
            ``eta_seconds``, ``memory_mib``.
    """

    step: int
    total: int
    values: Mapping[str, float]
    timings: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The record for people to read."""
        parts = [f"step {self.step}/{self.total}"]
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        return ", ".join(parts + _describe(self.timings))


def _describe(timings: Mapping[str, float]) -> list[str]:
    forms = {
        "images_per_second": lambda value: f"{value:.3g} images/s",
        "data_wait": lambda value: f"{value:.0%} waiting for data",
        "memory_mib": lambda value: f"{value:.0f} MiB",
        "eta_seconds": lambda value: f"{timedelta(seconds=round(value))} left",
    }
    return [forms[name](value) for name, value in timings.items()]


class Destination(ABC):
    """A place that records go to."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record."""

    def say(self, text: str) -> None:
        """Take a message for people."""
        return None

    def rewind(self, step: int) -> None:
        """Forget the records after ``step``: the run goes on from there. Comes once, before the first record."""
        return None

    def sync(self) -> None:
        """Make what was written durable, before a checkpoint that counts on it."""
        return None

    def close(self) -> None:
        """Nothing more comes."""
        return None


class JsonLines(Destination):
    """One JSON object a line, ``{"step": 20, ...}``; what is not finite is ``null`` and named under ``not_finite``.

    Args:
        path: of the file.
        part: which of a record's numbers it takes; records without any are left out.
    """

    def __init__(self, path: Path, part: Literal["values", "timings"]) -> None:
        self.path = path
        self.part = part

    def write(self, record: Record) -> None:
        numbers: Mapping[str, float] = record.values if self.part == "values" else record.timings
        if not numbers:
            return
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        line: dict[str, object] = {"step": record.step}
        line |= {name: None if name in bad else value for name, value in numbers.items()}
        if bad:
            line["not_finite"] = bad
        files.append_text(self.path, json.dumps(line, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Keep the whole lines of ``step`` and before; a line that a kill or the disk has damaged is lost."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _belongs(line, step)]
        if len(kept) < len(lines):
            files.write_bytes(self.path, b"".join(kept))

    def sync(self) -> None:
        if self.path.exists():
            files.sync(self.path)


def _belongs(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class LogFile(Destination):
    """Plain lines in a file, added to for as long as the run directory lives."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        self.say(record.line())

    def say(self, text: str) -> None:
        files.append_text(self.path, text + "\n")


class PlainLines(Destination):
    """The log's lines on standard error, for terminals that are files or pipes."""

    def write(self, record: Record) -> None:
        self.say(record.line())

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class ProgressBar(Destination):
    """A bar on a terminal: losses, learning rate, images/s, memory, time left; other records are lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
        # Drawn when a record comes, not by a thread that takes time from the step.
        self.progress = Progress(*columns, console=console or Console(stderr=True), auto_refresh=False)
        self.bar = self.progress.add_task("")

    def write(self, record: Record) -> None:
        if not record.timings:
            self.say(record.line())
            return
        self.progress.start()
        shown = [f"{name} {value:.4g}" for name, value in record.values.items() if name.endswith(("/loss", "/lr"))]
        text = ", ".join(shown + _describe(record.timings))
        self.progress.update(self.bar, total=record.total, completed=record.step, description=text, refresh=True)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.progress.stop()


class Records(Destination):
    """Several destinations as one."""

    def __init__(self, destinations: Sequence[Destination]) -> None:
        self.destinations = destinations

    def write(self, record: Record) -> None:
        for destination in self.destinations:
            destination.write(record)

    def say(self, text: str) -> None:
        for destination in self.destinations:
            destination.say(text)

    def rewind(self, step: int) -> None:
        for destination in self.destinations:
            destination.rewind(step)

    def sync(self) -> None:
        for destination in self.destinations:
            destination.sync()

    def close(self) -> None:
        for destination in self.destinations:
            destination.close()


def run_records(folder: Path, others: Sequence[Destination] = ()) -> Records:
    """``metrics.jsonl``, ``timing.jsonl`` and ``log.txt`` in the run directory, the terminal, and others."""
    return Records(
        [
            JsonLines(folder / "metrics.jsonl", "values"),
            JsonLines(folder / "timing.jsonl", "timings"),
            LogFile(folder / "log.txt"),
            ProgressBar() if sys.stderr.isatty() else PlainLines(),
            *others,
        ]
    )


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that the process has held so far, in MiB: resident, or allocated on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
