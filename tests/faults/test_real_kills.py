"""Runs in processes of their own that SIGKILL ends; kill_runs.py does it at random times, and many times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework import runs
from framework.engine.run_directory import RunError
from tests.faults.kill_runs import children, differences, is_alive, kill, left, start, step_reached, wait_for_end
from tests.tiny_run import ROOT, TINY, tiny_config

SETTINGS = [
    "run.threads=1",
    "data.num_workers=2",
    "train.max_steps=60",
    "train.accumulate=2",
    "train.log_every=1",
    "train.validate_every=8",
    "train.checkpoint_every=5",
    "train.best={metric: validation/mse@4}",
]


def kill_at(step: int, folder: Path) -> list[int]:
    """Start a run, and kill it when it has come so far; returns its workers."""
    process = start(folder, [*TINY, *SETTINGS])
    deadline = time.monotonic() + 120
    while step_reached(folder) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # on a busy machine it may finish while this process looks at it
    assert process.poll() is None and len(children(process.pid)) >= 2
    if step > 15:  # it holds the directory
        with pytest.raises(RunError, match=f"{folder} is in use by process {process.pid} on host .*train_net.py"):
            runs.train(tiny_config(folder, *SETTINGS), lambda text: None)
    return kill(process)


def test_two_kills_and_a_third_start_end_like_one_run(tmp_path: Path, quick_report: None) -> None:
    runs.train(tiny_config(tmp_path / "whole", *SETTINGS), lambda text: None)
    folder = tmp_path / "parts"
    workers = kill_at(12, folder)
    assert any(map(is_alive, workers))  # they notice within seconds, and nothing waits for that
    workers += kill_at(30, folder)
    assert runs.train(tiny_config(folder, *SETTINGS), lambda text: None) == ("finished", 60)
    assert (folder / "log.txt").read_text().count("continuing from") == 2
    assert differences(left(tmp_path / "whole"), left(folder)) == []
    wait_for_end(workers)


@pytest.mark.slow
def test_twenty_runs_killed_at_random() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/faults/kill_runs.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.endswith("20 of 20 bit-identical\n"), result.stdout + result.stderr
