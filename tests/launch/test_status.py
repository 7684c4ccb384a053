from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from framework.launch.queue import record_job
from framework.launch.status import HEADER, describe, find_runs, table
from framework.runtime.lock import RunLock, is_held
from tests.launch.conftest import FakeSlurm
from tests.tiny_run import ROOT, run_tool

BEGUN = {"started": "2026-01-01T00:00:00+0000"}
SAVED = {"outcome": "preempted", "step": 30, "ended": "2026-01-01T00:00:00+0000"}


def write_run(folder: Path, *sessions: dict[str, Any], steps: int = 2) -> Path:
    """A run that has logged every ten steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {max_steps: 100}")
    (folder / "run.json").write_text(json.dumps({"sessions": sessions}))
    for step in range(10, 10 * steps + 10, 10):
        line(folder, "metrics.jsonl", {"step": step, "all/loss": 1 / step, "all/lr": 1.0})
        line(folder, "timing.jsonl", {"step": step, "images_per_second": 5.0, "eta_seconds": 1000.0})
    return folder


def line(folder: Path, name: str, values: dict[str, Any]) -> None:
    with open(folder / name, "a") as file:
        file.write(json.dumps(values) + "\n")


def cells(run: Path, **queue: str) -> dict[str, str]:
    jobs = {key.removeprefix("job"): state for key, state in queue.items()}
    return dict(zip(HEADER, describe(run, jobs), strict=True))


def write_log(run: Path, *lines: str) -> None:
    log = run / "slurm/41_0_log.out"
    record_job(run, "41", log)
    log.write_text("\n".join(["failed: of an older start", "I - Starting with JobEnvironment(...)", *lines, ""]))


# States


@pytest.mark.parametrize("outcome", ["finished", "stopped", "preempted"])
def test_a_run_that_has_ended(tmp_path: Path, outcome: str) -> None:
    run = write_run(tmp_path / "run", SAVED, SAVED, {"outcome": outcome, "step": 20})
    line(run, "metrics.jsonl", {"step": 20, "validation/mse@1": 0.25, "validation/mse@4": 0.125})
    told = cells(run)
    assert told["state"] == outcome and told["step"] == "30/100" and told["left"] == ""
    assert told["loss"] == "all 0.05" and told["validation"] == "mse@1 0.25, mse@4 0.125"
    assert told["starts"] == f"3, {3 if outcome == 'preempted' else 2} after preemption" and told["alarms"] == ""


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"started": "now"})
    os.utime(run / "timing.jsonl", (time.time() - 100,) * 2)
    code = "import sys; from pathlib import Path; from framework.runtime.lock import RunLock\n"
    code += "with RunLock(Path(sys.argv[1]), print): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(run)]
    holder = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        told = cells(run)
        assert is_held(run) and told["state"] == "running" and told["starts"] == "1" and told["alarms"] == ""
        assert told["left"] in ("0:15:00", "0:14:59") and told["last line"].startswith("0:01:4")
    finally:
        holder.kill()
        holder.communicate()
    told = cells(run)
    assert not is_held(run) and told["left"] == ""
    assert told["state"].startswith("failed: killed, or ") and told["alarms"] == "its last start has no end"


def test_asking_does_not_take_the_lock(tmp_path: Path) -> None:
    assert not is_held(tmp_path) and not (tmp_path / "run.lock").exists()
    with RunLock(tmp_path, print):
        assert not is_held(tmp_path)  # by another process
    assert not is_held(tmp_path)


def test_a_job_that_waits_or_runs(tmp_path: Path) -> None:
    new = tmp_path / "new"
    record_job(new, "41", new / "slurm/41_0_log.out")
    (new / "slurm/config_1.yaml").write_text("train: {max_steps: 7}")
    told = cells(new, job41="pending (Resources)")
    assert told["state"] == "pending (Resources), job 41" and told["step"] == "0/7" and told["starts"] == "0"
    assert cells(new)["state"] == "never started"

    run = write_run(tmp_path / "run", SAVED)
    write_log(run)
    assert cells(run, job41="pending (BeginTime)")["state"] == "pending (BeginTime), job 41"
    assert cells(run, job41="running")["state"] == "running, job 41"
    assert cells(run, job40="running")["state"] == "preempted"


KILLED = "srun: error: gpu07: task 1: Killed"
LIMIT = "slurmstepd-gpu07: error: *** STEP 41.0 ON gpu07 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"
UNKNOWN = "failed: killed, or an error that its terminal showed"
OWN = "failed: rank 3 of 8 on gpu08: NonFiniteError: step 20, turn 'all': the losses are nan"


@pytest.mark.parametrize(
    ("sessions", "lines", "state"),
    [
        ([BEGUN], ["step 10", KILLED, "srun: error: gpu07: task 0: Exited with exit code 3"], f"failed: {KILLED}"),
        ([BEGUN], ["step 10", LIMIT, KILLED], f"failed: {LIMIT}"),
        ([BEGUN], [OWN, "Traceback", KILLED], OWN),
        ([], [OWN], OWN),
        ([SAVED], ["srun: error: gpu07: task 0: Exited with exit code 255"], "preempted"),
        ([SAVED], [OWN], OWN),
        ([BEGUN], ["step 10"], UNKNOWN),
    ],
)
def test_the_reason_of_a_failure_is_in_the_log_of_the_job(
    tmp_path: Path, sessions: list[dict[str, Any]], lines: list[str], state: str
) -> None:
    run = write_run(tmp_path / "run", *sessions)
    write_log(run, *lines)
    assert cells(run)["state"] == state
    os.utime(run / "slurm/41_0_log.out", (1, 1))  # the run was started by hand since
    if sessions:
        assert cells(run)["state"] == sessions[-1].get("outcome", UNKNOWN)


def test_alarms(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"outcome": "stopped", "step": 20})
    line(run, "metrics.jsonl", {"step": 25, "all/loss": None, "not_finite": ["all/loss"], "data/broken": 3.0})
    told = cells(run)
    assert told["alarms"] == "1 lines not finite, last at step 25; 3 broken images"
    assert told["loss"] == "all 0.05"


# Tables


def test_runs_are_found_and_shown_in_a_table(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs/b", {"outcome": "a|b"})
    write_run(tmp_path / "runs/grid/x/seed_0", {"outcome": "finished"})
    write_run(tmp_path / "runs/grid/x/seed_0/checkpoints/no_run")
    record_job(tmp_path / "runs/a", "41", tmp_path / "log")
    (tmp_path / "runs/grid/slurm").mkdir()
    (fake_slurm.folder / "queue").write_text("41|PENDING|Priority\n")
    names = [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path / "runs")]
    assert names == ["runs/a", "runs/b", "runs/grid/x/seed_0"]

    monkeypatch.chdir(tmp_path)
    assert run_tool(monkeypatch, "info", "runs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and len({len(text) for text in lines}) == 1 and len({text.count("|") for text in lines}) == 1
    rows = [[cell.strip() for cell in text.strip("|").split("|")] for text in lines]
    assert rows[0] == HEADER and [row[:2] for row in rows[2:]] == [
        ["runs/a", "pending (Priority), job 41"], ["runs/b", "a/b"], ["runs/grid/x/seed_0", "finished"]
    ]  # fmt: skip
    assert run_tool(monkeypatch, "info", "runs", "runs/b", "runs/a") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_where_there_are_no_runs(
    tmp_path: Path, no_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "info", "runs", tmp_path) == 2
    assert "there are no runs" in capsys.readouterr().err
    assert run_tool(monkeypatch, "info", "runs", tmp_path / "nowhere") == 2
    assert f"there is no folder {tmp_path}/nowhere" in capsys.readouterr().err


def test_damaged_files_are_no_obstacle(tmp_path: Path) -> None:
    """Bytes are cut, flipped and exchanged for other JSON; a line comes of it each time, and nothing is written."""
    draw = random.Random(0)
    whole = write_run(tmp_path / "whole", SAVED, {"outcome": "stopped", "step": 20})
    write_log(whole, OWN)
    files = {str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    others = [b"", b"null", b"[1]", b'{"sessions": 3}', b'{"sessions": [3]}', b"[" * 3000, b"\xff\0", b"- a"]
    others += [b"train: 3", b'{"sessions": [{"outcome": [], "step": "x"}]}', b'{"step": {}, "eta_seconds": 1e999}\n']
    others += [b'{"step": 1, "all/loss": "x", "data/broken": 1e400, "not_finite": 0}\n']
    others += [b'{"job": [1], "log": "\\u0000"}\n']
    run = write_run(tmp_path / "run")
    for trial in range(100):
        for name, content in files.items():
            (run / name).parent.mkdir(exist_ok=True)
            cut = draw.randrange(len(content) + 1)
            flipped = content[:cut] + bytes([draw.randrange(256)]) + content[cut + 1 :]
            choice = draw.choice([content, content[:cut], flipped, draw.choice(others)])
            (run / name).write_bytes(choice)
        assert len(describe(run, {})) == len(HEADER), trial
    assert len(table([run]).splitlines()) == 3
    (run / "run.json").write_text("{")
    assert "run.json is damaged" in cells(run)["alarms"]
