"""Two tasks on a real SLURM: preempted, cancelled, killed, and in the end bit for bit the run that was left alone.

Needs a cluster that this machine can submit to, with a node of two cores. It takes about eight minutes, of which SLURM
waits two before it starts a job again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.launch.queue import last_job, queued
from framework.launch.status import describe
from tests.tiny_run import ROOT, TINY, files_of

STEPS = 150
JOBS: list[str] = []
CHANGES = [*TINY, f"train.max_steps={STEPS}", "train.log_every=10", "run.threads=1", "data.num_workers=1"]


def has_slurm() -> bool:
    return bool(shutil.which("sbatch")) and subprocess.run(["sinfo"], capture_output=True).returncode == 0


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_slurm(), reason="no SLURM that answers")]


def submit(run: Path, *flags: str) -> str:
    """The run as a job of two tasks; returns its id."""
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config", str(ROOT / "projects/adatok/ntm.yaml")]
    command += [*CHANGES, f"run.dir={run}", "--slurm", "--sbatch", "ntasks-per-node=2", "--time", "30", *flags]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    JOBS.append(last_job(run)["job"])
    return JOBS[-1]


def wait(what: str, has_come: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not has_come():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.1)


def start(run: Path, *flags: str) -> str:
    """Submit it, and wait until it is in the middle."""
    job = submit(run, *flags)
    log = run / "log.txt"
    wait("training", lambda: log.exists() and "step 20/" in log.read_text(), 120)
    return job


def state(run: Path) -> str:
    return describe(run, queued())[1]


def wait_for(run: Path, wanted: str, seconds: float) -> None:
    wait(f"{wanted}, but {state(run)}", lambda: state(run).startswith(wanted), seconds)


def results(run: Path) -> dict[str, bytes]:
    return files_of(run / f"checkpoints/step_{STEPS:08d}") | {"metrics": (run / "metrics.jsonl").read_bytes()}


def tell(run: Path) -> None:
    print(f"\n{describe(run, queued())}")
    print((run / "slurm" / f"{last_job(run)['job']}_0_log.out").read_text())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    subprocess.run(["scancel", "--quiet", *JOBS])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("slurm") / "undisturbed"
    submit(run)
    wait_for(run, "finished", 180)
    return results(run)


def test_preemption_queues_again_and_changes_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    forms = {"job": ["{}"], "step": ["{}.0"], "full": ["--full", "{}"]}
    for name, words in forms.items():
        job = start(tmp_path / name)
        subprocess.run(["scancel", "--signal=USR2", *(word.format(job) for word in words)], check=True)
        wait_for(tmp_path / name, "pending", 60)
        assert "preempted, and saved at step" in (tmp_path / name / f"slurm/{job}_0_log.out").read_text()
    for name in forms:
        wait_for(tmp_path / name, "finished", 400)
        tell(tmp_path / name)
        assert describe(tmp_path / name, {})[7] == "2, 1 after preemption"
        assert results(tmp_path / name) == undisturbed


def test_the_time_limit_is_a_preemption(tmp_path: Path) -> None:
    # SLURM sends the signal up to a minute early: here half a minute to one and a half after the start.
    job = start(tmp_path, "--time", "2", "--sbatch", "signal_delay_s=30", f"train.max_steps={STEPS * 100}")
    wait_for(tmp_path, "pending", 150)
    tell(tmp_path)
    subprocess.run(["scancel", job], check=True)
    wait_for(tmp_path, "preempted", 30)


def test_cancelling_saves_and_does_not_queue_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    job = start(tmp_path / "run")
    after = submit(tmp_path / "after", "--after", job)
    assert state(tmp_path / "after").startswith("pending (Dependency)")
    subprocess.run(["scancel", job], check=True)
    wait_for(tmp_path / "run", "stopped", 60)
    wait("DependencyNeverSatisfied", lambda: "Never" in queued().get(after, ""), 60)
    subprocess.run(["scancel", after], check=True)
    tell(tmp_path / "run")
    submit(tmp_path / "run")
    wait_for(tmp_path / "run", "finished", 120)
    assert results(tmp_path / "run") == undisturbed


def test_the_end_of_one_task_ends_all_with_its_reason(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    job = start(tmp_path)
    rows = subprocess.run(["scontrol", "listpids", f"{job}.0"], capture_output=True, text=True, check=True).stdout
    victim = next(row.split()[0] for row in rows.splitlines() if row.split()[3:] == ["1", "1"])
    os.kill(int(victim), signal.SIGKILL)
    wait_for(tmp_path, "failed: srun: error: ", 60)
    assert "task 1: Killed" in state(tmp_path)
    tell(tmp_path)
    submit(tmp_path)
    wait_for(tmp_path, "finished", 120)
    assert results(tmp_path) == undisturbed
