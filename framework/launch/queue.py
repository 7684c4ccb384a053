"""The jobs of a run, as its folder lists them, and what SLURM says of those that it has not done with."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

from framework.runtime.files import append_text
from framework.runtime.json_lines import read_lines

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
