"""What runs are doing: read from their files and SLURM's queue, whatever state those are in; nothing is written."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from framework.config.errors import ConfigError, shorten
from framework.config.load import load_config
from framework.launch.job import FAILED
from framework.launch.queue import FOLDER, JOBS, last_job, queued
from framework.runtime.json_lines import read_lines
from framework.runtime.lock import is_held

HEADER = ["run", "state", "step", "left", "last line", "loss", "validation", "starts", "alarms"]
MARKS = ("run.json", "run.lock", JOBS)
"""What makes a folder a run."""
STARTED = "Starting with JobEnvironment"
NUM_VALUES = 3
REASON_LENGTH = 200
LOG_BYTES = 1 << 16


def table(folders: Iterable[Path]) -> str:
    """One line for each run below the folders, in aligned Markdown.

    Raises:
        FileNotFoundError: if a folder does not exist, or there is no run in any.
    """
    queue = queued()
    found = [run for folder in folders for run in find_runs(folder)]
    if not found:
        raise FileNotFoundError("there are no runs; give the folder that has them, such as: info.py runs runs")
    rows = [HEADER, *([" ".join(cell.replace("|", "/").split()) for cell in describe(run, queue)] for run in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories at and below a folder.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for path, names, _ in os.walk(folder):
        names.sort()
        if any((Path(path) / mark).exists() for mark in MARKS):
            names.clear()
            yield Path(path)


def describe(run: Path, queue: Mapping[str, str]) -> list[str]:
    """The cells of a run's line; ``queue`` has the states of the jobs that SLURM has not done with."""
    alarms = []
    sessions: list[dict[str, Any]] = []
    try:
        sessions = [dict(session) for session in json.loads((run / "run.json").read_bytes())["sessions"]]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        alarms.append("run.json is damaged")
    last = sessions[-1] if sessions else {}
    metrics, timings = (read_lines(run / name, "step") for name in ("metrics.jsonl", "timing.jsonl"))
    state = _state(run, last, queue)
    if state.startswith("failed") and last and "outcome" not in last:
        alarms.append("its last start has no end")
    if bad := [line["step"] for line in metrics if "not_finite" in line]:
        alarms.append(f"{len(bad)} lines not finite, last at step {bad[-1]}")
    if broken := _latest(metrics, lambda key: key == "data/broken"):
        alarms.append(f"{broken['data/broken']:.0f} broken images")

    age = time.time() - _modified(run / "timing.jsonl")
    left = _latest(timings[-1:], lambda key: key == "eta_seconds") if state.startswith("running") else {}
    steps = [line["step"] for line in [*metrics[-1:], *timings[-1:], *sessions] if isinstance(line.get("step"), int)]
    preempted = sum(session.get("outcome") == "preempted" for session in sessions)
    losses = _latest(metrics, lambda key: key.endswith("/loss"))
    validation = _latest(metrics, lambda key: key.startswith("validation/"))
    return [
        str(run),
        state,
        f"{max(steps, default=0)}/{_max_steps(run)}",
        _duration(left["eta_seconds"] - age) if left else "",
        f"{_duration(age)} ago" if timings else "",
        _values(losses).replace("/loss", ""),
        _values(validation).replace("validation/", ""),
        f"{len(sessions)}, {preempted} after preemption" if preempted else str(len(sessions)),
        "; ".join(alarms),
    ]


def _state(run: Path, last: Mapping[str, Any], queue: Mapping[str, str]) -> str:
    job = last_job(run)
    waiting = queue.get(job.get("job", ""), "")
    where = f", job {job['job']}" if waiting else ""
    if is_held(run) or waiting.startswith("running"):
        return f"running{where}"
    if waiting:
        return f"{waiting}{where}"
    log, outcome = Path(job.get("log", "")), last.get("outcome")
    reasons = _reasons(log) if job and _modified(log) >= _modified(run / "run.json") else []
    told = [reason.removeprefix(FAILED) for reason in reasons if outcome is None or reason.startswith(FAILED)]
    if outcome is not None and not told:
        return str(outcome)
    if not last and not told:
        return "never started" if job else "new"
    return f"failed: {shorten(told[0] if told else 'killed, or an error that its terminal showed', REASON_LENGTH)}"


def _reasons(log: Path) -> list[str]:
    """What the log of a job's last start says of its end: the run's own words, or those of SLURM."""
    try:
        text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace").rpartition(STARTED)[2]
    except (OSError, ValueError):
        return []
    return re.findall(rf"^(?:{FAILED}|(?:srun|slurmstepd)\S*: error: ).*", text, re.MULTILINE)


def _latest(lines: list[dict[str, Any]], wanted: Callable[[str], bool]) -> dict[str, float]:
    """The last numbers of the wanted names."""
    for line in reversed(lines):
        if found := {key: value for key, value in line.items() if wanted(key) and isinstance(value, float | int)}:
            return found
    return {}


def _values(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in [*numbers.items()][:NUM_VALUES])


def _max_steps(run: Path) -> str:
    submitted = sorted((run / FOLDER).glob("config_*.yaml"), key=_modified)[-1:]
    for file in [run / "config.yaml", *submitted]:
        try:
            return str(load_config(file).tree["train"]["max_steps"])
        except (ConfigError, KeyError, TypeError, RecursionError):
            continue
    return "?"


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except (OSError, ValueError):
        return 0.0


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(min(max(0.0, seconds), 1e9))))
