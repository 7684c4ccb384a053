from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from framework.config import load_config
from framework.launch.job import TrainingJob
from framework.launch.queue import last_job, queued
from framework.launch.slurm import launch_options
from framework.runtime.json_lines import read_lines
from tests.launch.conftest import FakeSlurm
from tests.test_ablation import finish, write_grid
from tests.tiny_run import ROOT, TINY, run_tool

CONFIG = str(ROOT / "projects/adatok/ntm.yaml")


def options(script: str) -> dict[str, str]:
    """What a script asks sbatch for."""
    return {key: value for key, value in re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE)}


def submitted(pickle: Path) -> TrainingJob:
    job = DelayedSubmission.load(pickle).function
    assert isinstance(job, TrainingJob)
    return job


# One run


def test_the_script_is_printed_without_slurm(
    tmp_path: Path, no_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    flags = "--slurm --dry-run --nodes 2 --gpus-per-node 8 --time 1-12 --after 7 --sbatch cpus-per-task=12".split()
    written = "time: 5, qos: high, requeue: false, dependency: singleton"
    setup = f'launch.slurm={{setup: "module load cuda\\nexport A=1", {written}}}'
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, f"run.dir={folder}", setup, *flags) == 0
    script = capsys.readouterr().out
    assert options(script) == {
        "job-name": "'my run'", "nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8", "time": "2160",
        "qos": "high", "dependency": "singleton,afterok:7", "cpus-per-task": "12", "signal": "USR2@90",
        "open-mode": "append", "output": f"'{folder}/slurm/%j_0_log.out'",
    }  # fmt: skip
    lines = script.rstrip().splitlines()
    assert lines.index("trap : USR2") < lines.index("module load cuda") < lines.index("export A=1") < len(lines) - 1
    command = lines[-1]
    assert command.startswith("srun ") and "--kill-on-bad-exit=1" in command and "--cpus-per-task=12" in command
    assert command.endswith(f"{sys.executable} -u -m submitit.core._submit '{folder}/slurm'")
    assert not folder.exists()


def test_without_options_a_job_has_a_limit_and_may_be_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, "--slurm", "--dry-run", f"run.dir={tmp_path}/r") == 0
    asked = options(capsys.readouterr().out)
    assert (asked["time"], asked["nodes"], asked["ntasks-per-node"], asked["requeue"]) == ("240", "1", "1", "")
    assert "dependency" not in asked and "wckey" not in asked


def test_a_run_is_submitted_as_it_is_now(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLACE", "somewhere")
    file, folder = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text(f"_base_: {CONFIG}\nlaunch: {{slurm: {{partition: slow, nodes: 2}}}}\nx: $env:PLACE\ny: $$a")
    command = ("--config", file, *TINY, f"run.dir={folder}", "--slurm", "--partition", "fast")
    assert run_tool(monkeypatch, "train_net", *command) == 0
    out = capsys.readouterr().out
    assert out.startswith("submitted job 41: 2 nodes x 1 tasks. The configuration is checked when it starts\n")
    for words in (f"info.py runs {folder}", "tail -F", "41_0_log.out", "scancel 41"):
        assert words in out
    assert options(fake_slurm.scripts[0])["partition"] == "fast"

    file.write_text("")  # what comes later does not matter
    job = submitted(folder / "slurm/41_submitted.pkl")
    tree = load_config(job.config).tree
    assert job.config == folder / "slurm/config_1.yaml" and "launch" not in tree
    assert (tree["x"], tree["y"], tree["train"]["max_steps"], tree["run"]["dir"]) == ("somewhere", "$a", 6, str(folder))
    assert job.checkpoint().function == job
    pickle = DelayedSubmission.load(folder / "slurm/41_submitted.pkl")
    assert (pickle._timeout_min, pickle._timeout_countdown) == (240, 1000)  # minutes, and times that it may hit them
    assert last_job(folder) == {"job": "41", "log": f"{folder}/slurm/41_0_log.out"}


def test_a_run_is_not_in_the_queue_twice(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--config", CONFIG, f"run.dir={tmp_path}/run", "--slurm")
    assert run_tool(monkeypatch, "train_net", *command) == 0
    (fake_slurm.folder / "queue").write_text("7|RUNNING|None\n41|PENDING|Resources\n")
    assert queued() == {"7": "running", "41": "pending (Resources)"}
    assert run_tool(monkeypatch, "train_net", *command) == 2
    assert f"{tmp_path}/run is job 41 already, pending (Resources)" in capsys.readouterr().err
    assert run_tool(monkeypatch, "train_net", *command, "--after", "41") == 0
    (fake_slurm.folder / "queue").write_text("")
    assert run_tool(monkeypatch, "train_net", *command) == 0
    assert [line["job"] for line in read_lines(tmp_path / "run/slurm/jobs.jsonl", "job")] == ["41", "42", "43"]
    configs = [submitted(tmp_path / f"run/slurm/{job}_submitted.pkl").config.name for job in (41, 42, 43)]
    assert configs == ["config_1.yaml", "config_2.yaml", "config_3.yaml"]


def test_what_sbatch_refuses_is_told_once(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_slurm.folder / "refuse").write_text("sbatch: error: invalid partition specified: gpu\n")
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, f"run.dir={tmp_path}/run", "--slurm") == 2
    told = "SLURM does not take the job:\nsbatch: error: invalid partition specified: gpu\n"
    assert capsys.readouterr() == ("", told)
    assert not list((tmp_path / "run/slurm").glob("config_*")) and last_job(tmp_path / "run") == {}


REFUSED: dict[str, tuple[list[str], str]] = {
    "no slurm": (["--config", CONFIG, "run.dir={}"], "there is no SLURM here: no srun"),
    "misspelt": (["--config", CONFIG, "launch.slurm.acount=x"], "launch: unknown sbatch option 'acount' in slurm"),
    "no such key": (["--config", CONFIG, "launch.processes=2"], "launch: Launch.__init__() got an unexpected keyword"),
    "unset variable": (["--config", CONFIG, "data.root=$env:NO_SUCH"], "the environment variable NO_SUCH is not set"),
    "no folder": (["--config", CONFIG, "run.dir=3"], "run.dir: expected the folder of the run, as a string"),
    "no file": (["--config", "no/such.yaml"], "there is no configuration no/such.yaml"),
    "fresh": (["--config", CONFIG, "--fresh"], "--fresh does not go with --slurm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_submitted_is_told(
    case: str, tmp_path: Path, no_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    words = [word.replace("{}", str(tmp_path / "run")) for word in words]
    assert run_tool(monkeypatch, "train_net", *words, "--slurm") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("written", "flags", "wanted"),
    [
        ("{}", {}, {}),
        ("{slurm: null}", {"qos": "a"}, {"qos": "a"}),
        ("{slurm: {qos: b, mem: 1}}", {"qos": "a"}, {"qos": "a", "mem": 1}),
        ("{slurm: {dependency: after:1}}", {"after": "2"}, {"dependency": "after:1,afterok:2"}),
        ("{slurm: {dependency: a}}", {"after": "2", "dependency": "b"}, {"dependency": "b,afterok:2"}),
    ],
)
def test_flags_win_over_yaml(tmp_path: Path, written: str, flags: dict[str, Any], wanted: dict[str, Any]) -> None:
    (tmp_path / "c.yaml").write_text(f"launch: {written}")
    assert launch_options(load_config(tmp_path / "c.yaml"), flags).slurm == wanted


def test_submitting_and_queueing_again_import_no_torch(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    code = f"""
import pickle, runpy, sys
sys.argv = ["tools/train_net.py", "--config", {CONFIG!r}, "run.dir={tmp_path}/run", "--slurm"]
try:
    runpy.run_path({str(ROOT / 'tools/train_net.py')!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
job = pickle.load(open("{tmp_path}/run/slurm/41_submitted.pkl", "rb"))
assert job._checkpoint_function().function.config.name == "config_1.yaml"
sys.argv[1:] = ["runs", "{tmp_path}"]
try:
    runpy.run_path({str(ROOT / 'tools/info.py')!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "submitted job 41" in done.stdout and f"{tmp_path}/run" in done.stdout.splitlines()[-1]


# A grid


def test_a_grid_becomes_an_array_of_what_is_left(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from framework.ablation.grid import load_grid

    file = write_grid(tmp_path, seeds=[0])
    _, cells = load_grid(file)
    finish(cells[1], {1: 0.2, 16: 0.1})
    command = ("ablate", "--config", file, "--slurm", "--jobs", "2", "--time", "30")
    assert run_tool(monkeypatch, *command, "--dry-run") == 0
    script = capsys.readouterr().out
    assert options(script)["array"] == "0-2%2" and not fake_slurm.scripts

    assert run_tool(monkeypatch, *command) == 0
    out = capsys.readouterr().out
    assert "4 cells, 1 finished, 0 queued or running, 3 to submit\nsubmitted job 41: 3 runs of 1 nodes x 1 tasks" in out
    assert fake_slurm.scripts == [script.rstrip("\n") + "\n"] and options(script)["time"] == "30"
    for number, cell in enumerate([cells[0], *cells[2:]]):
        job = submitted(tmp_path / f"grid/slurm/41_{number}_submitted.pkl")
        assert load_config(job.config).tree == cell.config.tree and job.config.parents[1] == cell.folder
        log = f"{tmp_path}/grid/slurm/41_{number}_0_log.out"
        assert last_job(cell.folder) == {"job": f"41_{number}", "log": log}

    finish(cells[0], {1: 0.2, 16: 0.1})
    (fake_slurm.folder / "queue").write_text("41_1|RUNNING|None\n")
    assert run_tool(monkeypatch, *command) == 0
    assert "4 cells, 2 finished, 1 queued or running, 1 to submit\nsubmitted job 42: 1 nodes" in capsys.readouterr().out
    assert submitted(tmp_path / "grid/slurm/42_submitted.pkl").config.parents[1] == cells[3].folder
    assert run_tool(monkeypatch, "ablate", "--config", file, "--report") == 0
    assert "2 of 4 cells finished" in capsys.readouterr().out


def test_cells_that_ask_for_different_machines_are_no_array(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"size": {"small": {"launch.slurm.qos": "low"}, "big": {"launch.slurm.qos": "high", "train.max_steps": 3}}}
    command = ("ablate", "--config", write_grid(tmp_path, seeds=[0], grid=axes), "--slurm", "--dry-run")
    assert run_tool(monkeypatch, *command) == 2
    assert "cells that differ in launch: cannot be one array: submit them apart, with --only" in capsys.readouterr().err
    assert run_tool(monkeypatch, *command, "--only", "big/*") == 0
    assert options(capsys.readouterr().out)["qos"] == "high"


def test_a_grid_with_nothing_left(
    tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from framework.ablation.grid import load_grid

    file = write_grid(tmp_path, seeds=[0])
    _, cells = load_grid(file)
    for cell in cells[:3]:
        finish(cell, {1: 0.2, 16: 0.1})
    cells[3].folder.mkdir(parents=True)
    (cells[3].folder / "config.yaml").write_text("run: {dir: another}")
    assert run_tool(monkeypatch, "ablate", "--config", file, "--slurm") == 0
    out = capsys.readouterr().out
    assert f"failed {cells[3].name}: " in out and "3 finished, 0 queued or running, 0 to submit" in out
    assert not fake_slurm.scripts
    assert run_tool(monkeypatch, "ablate", "--config", file, "--slurm", "--report") == 2
