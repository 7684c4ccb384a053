from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import framework
from framework.engine.checkpoint import latest_checkpoint
from framework.launch import local
from framework.launch.environment import VARIABLES
from framework.launch.local import run_processes
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import ROOT, TINY, run_tool


def command(code: str) -> list[str]:
    """Python that knows its rank."""
    return [sys.executable, "-c", f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{code}"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SECONDS_OF_GRACE", 0.4)


def test_each_is_told_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
    written = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))"
    code = f"{written}\nprint('rank', rank)"
    assert run_processes(command(code), 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [words[:4] for words in told] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({words[4] for words in told}) == 1 and told[0][5] == str(max(1, (os.cpu_count() or 1) // 3))
    assert capfd.readouterr().out == "rank 0\n"


@pytest.mark.parametrize(
    ("code", "wanted", "told"),
    [
        ("if rank == 1: sys.exit('no such')\ntime.sleep(60)", 1, ["process 1 of 2 failed (exit code 1)", "no such"]),
        ("if rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)", 137, ["process 1 of 2 failed (killed by SIGKILL)"]),
        ("if rank == 0: sys.exit(3)\ntime.sleep(.5)\nsys.exit(7)", 7, ["process 1 of 2 failed (exit code 7)"]),
        ("signal.signal(15, signal.SIG_IGN)\nif rank == 0: sys.exit(2)\ntime.sleep(60)", 2, ["process 0 of 2 failed"]),
    ],
    ids=["exception", "kill", "consequence first", "deaf"],
)  # fmt: skip
def test_the_first_failure_ends_all_and_is_told(
    code: str, wanted: int, told: list[str], impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert run_processes(command(code), 2) == wanted
    assert time.monotonic() - began < 30
    said = capfd.readouterr().err
    assert all(text in said for text in told), said


def test_signals_are_passed_on_and_a_stop_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').close()\ntime.sleep(60)"
    )

    def terminate() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    assert run_processes(command(code), 2) == 130
    thread.join()
    assert "failed" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_of_two_processes_from_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = ("--config", ROOT / "projects/adatok/ntm.yaml", *TINY, "launch.num_processes=2")
    assert run_tool(monkeypatch, "train_net", *config, f"run.dir={tmp_path / 'run'}", "run.threads=1") == 0
    assert capfd.readouterr().out.count("results: ") == 1
    tokenizer = framework.load(tmp_path / "run")
    assert isinstance(tokenizer, Tokenizer)
    (session,) = json.loads((tmp_path / "run/run.json").read_text())["sessions"]
    assert session["outcome"] == "finished" and session["step"] == 6
    checkpoint = latest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None
    state: Any = checkpoint.state()
    lengths = [rank["generators"]["lengths"] for rank in state["ranks"]]
    assert len(lengths) == 2 and not torch.equal(*lengths)
    # Elsewhere: launched otherwise it is the same run, which is finished.
    assert run_tool(monkeypatch, "train_net", *config[:-1], f"run.dir={tmp_path / 'run'}", "run.threads=1") == 0
    assert "is finished: 6 steps" in capfd.readouterr().out


def test_a_wrong_configuration_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    config = ("--config", ROOT / "projects/adatok/ntm.yaml", f"run.dir={tmp_path}", "launch.num_processes=2")
    assert run_tool(monkeypatch, "train_net", *config, "train.max_stps=3") == 2
    assert capfd.readouterr().err.count("1 error in the configuration") == 1
