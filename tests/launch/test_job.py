from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.core.submission import process_job
from submitit.core.utils import DelayedSubmission

from framework import runs
from framework.config import ConfigError
from framework.engine.trainer import Outcome
from framework.launch import environment as processes
from framework.launch.job import TrainingJob, rendezvous
from framework.runtime.ranks import PeerError, Ranks
from tests.launch.conftest import FakeSlurm

SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)


@pytest.fixture
def task(tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process is task 0 of 2 of job 41; returns the folder of its logs."""
    variables = {
        "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path / "slurm"), "SLURM_JOB_ID": "41",
        "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "gpu07",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in processes.VARIABLES:
        monkeypatch.setenv(name, "from outside")
    monkeypatch.setattr(processes, "joined", alone)
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    (tmp_path / "config.yaml").write_text("run: {dir: here}")
    (tmp_path / "slurm").mkdir()
    submission = DelayedSubmission(TrainingJob(tmp_path / "config.yaml"))
    submission.set_timeout(60, 3)
    submission.dump(tmp_path / "slurm/41_submitted.pkl")
    yield tmp_path / "slurm"
    for number, handler in previous.items():
        signal.signal(number, handler)


@contextmanager
def alone() -> Iterator[Ranks]:
    yield Ranks()


def training(monkeypatch: pytest.MonkeyPatch, end: str | Exception) -> list[Any]:
    """In place of training; returns the configurations that it gets."""
    seen: list[Any] = []

    def train(config: Any, say: Any, ranks: Ranks) -> Outcome:
        seen.append(config.tree)
        if isinstance(end, Exception):
            raise end
        return Outcome(end, 3)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "train", train)
    return seen


def test_two_nodes_of_eight(monkeypatch: pytest.MonkeyPatch, task: Path) -> None:
    changed = {"NTASKS": "16", "JOB_NUM_NODES": "2", "NODEID": "1", "JOB_NODELIST": "gpu[07-08]", "PROCID": "11"}
    for name, value in (changed | {"LOCALID": "3", "JOB_ID": "1234567"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert rendezvous(submitit.JobEnvironment()) == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24567"
    }  # fmt: skip


def test_jobs_of_an_array_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch, task: Path) -> None:
    ports = []
    for number, job in enumerate(("41", "42", "19999", "20000", str(2**31))):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        monkeypatch.setenv("SLURM_JOB_ID", job)
        ports.append(int(rendezvous(submitit.JobEnvironment())["MASTER_PORT"]))
    assert len(set(ports)) == 5 and all(10_000 <= port < 30_000 for port in ports)


def test_a_job_trains_what_was_submitted(monkeypatch: pytest.MonkeyPatch, task: Path) -> None:
    seen = training(monkeypatch, "finished")
    process_job(task)
    assert seen == [{"run": {"dir": "here"}}]
    assert [os.environ[name] for name in processes.VARIABLES[:4]] == ["0", "2", "0", "gpu07"]
    assert (task / "41_0_result.pkl").exists()


def test_a_preempted_job_is_queued_again_as_it_was(
    monkeypatch: pytest.MonkeyPatch, task: Path, fake_slurm: FakeSlurm
) -> None:
    training(monkeypatch, "preempted")
    (task / "41_submitted.pkl.save_tmp").write_text("a kill while the job was queued again left this")
    before = DelayedSubmission.load(task / "41_submitted.pkl").function
    with pytest.raises(SystemExit) as ended:
        process_job(task)
    assert ended.value.code == -1
    assert (fake_slurm.folder / "scontrol").read_text() == "requeue 41\n"
    assert DelayedSubmission.load(task / "41_submitted.pkl").function == before
    assert not (task / "41_0_result.pkl").exists() and not list(task.glob("*.save_tmp"))


def test_other_tasks_of_a_preempted_job_wait(
    monkeypatch: pytest.MonkeyPatch, task: Path, fake_slurm: FakeSlurm
) -> None:
    class Ended(BaseException):
        pass

    def sleep(seconds: float, times: list[float] = []) -> None:  # noqa: B006
        times.append(seconds)
        if len(times) == 3:
            os.kill(os.getpid(), signal.SIGUSR2)  # SLURM may send it again
        if len(times) == 5:
            raise Ended

    training(monkeypatch, "preempted")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr("framework.launch.job.time.sleep", sleep)
    with pytest.raises(Ended):
        process_job(task)
    assert not (fake_slurm.folder / "scontrol").exists()


def test_a_stopped_job_is_not_queued_again_and_has_not_succeeded(
    monkeypatch: pytest.MonkeyPatch, task: Path, fake_slurm: FakeSlurm
) -> None:
    training(monkeypatch, "stopped")
    with pytest.raises(SystemExit) as ended:
        process_job(task)
    assert ended.value.code == 130 and not (fake_slurm.folder / "scontrol").exists()
    monkeypatch.setenv("SLURM_PROCID", "1")  # its code would end the first task before that is done
    process_job(task)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_fails_is_told_in_the_log_of_the_first_task(
    rank: str, monkeypatch: pytest.MonkeyPatch, task: Path
) -> None:
    monkeypatch.setenv("SLURM_PROCID", rank)
    told, codes = [], []
    for error in (runs.RunError("the disk\n  is full"), ConfigError([]), ZeroDivisionError("of all things")):
        training(monkeypatch, error)
        with pytest.raises((SystemExit, ZeroDivisionError)) as caught:
            process_job(task)
        codes.append(getattr(caught.value, "code", None))
        told.append(type(error).__name__)
    assert codes == ["the disk\n  is full", "0 errors in the configuration:", None]
    lines = [line for line in (task / "41_0_log.out").read_text().splitlines() if line.startswith("failed: ")]
    assert [line.split(": ")[2] for line in lines] == told
    assert lines[0].startswith(f"failed: rank {rank} of 2 on ") and lines[0].endswith(": RunError: the disk is full")


def test_who_only_misses_another_does_not_give_the_reason(monkeypatch: pytest.MonkeyPatch, task: Path) -> None:
    training(monkeypatch, PeerError("another has ended"))
    with pytest.raises(SystemExit) as ended:
        process_job(task)
    assert ended.value.code == "another has ended" and not (task / "41_0_log.out").exists()
