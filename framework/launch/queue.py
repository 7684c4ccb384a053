"""The jobs of a run, as its folder lists them, and what SLURM says of those that it has not done with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from framework.runtime.files import append_text

FOLDER = "slurm"
JOBS = f"{FOLDER}/jobs.jsonl"


def record_job(run: Path, job: str, log: Path) -> None:
    """List a job that was submitted for the run."""
    append_text(run / JOBS, json.dumps({"job": job, "log": str(log)}) + "\n")


def last_job(run: Path) -> dict[str, str]:
    """The job that was submitted last, with its ``log``; empty where there is none."""
    return next(({key: str(job[key]) for key in ("job", "log")} for job in reversed(read_lines(run / JOBS, "job"))), {})


def queued() -> dict[str, str]:
    """The state of one's jobs that SLURM has not done with, by id; none where there is no SLURM."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.split("|", 2) for line in found.stdout.splitlines()]
        return {job: f"{state.lower()}{'' if why == 'None' else f' ({why})'}" for job, state, why in rows}
    return {}


def read_lines(file: Path, key: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects that have a key; none of a file that cannot be read."""
    lines, content = [], b""
    with suppress(OSError):
        content = file.read_bytes()
    for text in content.splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, Mapping) and key in line:
                lines.append(dict(line))
    return lines
