"""The profiler leaves a trace and tables, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from framework import runs
from framework.data.interface import Batch
from framework.engine import profiler
from framework.engine.profiler import profile_training
from framework.tasks.interface import Context, StepOutput, Turn
from framework.tasks.train_tokenizer import TrainTokenizer
from tests.tiny_run import TINY, files_of, run_tool, tiny_config

CONFIG = "projects/adatok/ntm.yaml"


@pytest.fixture(autouse=True)
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "STEPS", 2)


def test_a_profile_leaves_a_trace_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints/step_00000001.partial").mkdir(parents=True)
    (folder / "checkpoints/step_00000001.partial/model.safetensors").write_bytes(b"somebody is writing this")
    (folder / "metrics.jsonl").write_text("{}\n")
    before = files_of(folder)
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, *TINY, f"run.dir={folder}", "--profile") == 0
    left = files_of(folder)
    results = {name: left.pop(name) for name in ("profile/trace.json", "profile/table.txt")}
    assert left == before

    names = {event.get("name") for event in json.loads(results["profile/trace.json"])["traceEvents"]}
    phases = ("data", "forward", "backward", "optimizer", "average")
    assert names > {f"phase: {name}" for name in phases} | {"aten::addmm"}
    summary, _, tables = results["profile/table.txt"].decode().partition("\n\n")
    rows = {line.split()[0]: float(line.split()[-1].rstrip("%")) for line in summary.splitlines()[1:]}
    assert set(rows) == {*phases, "the"}
    assert sum(rows.values()) == pytest.approx(100, abs=0.5) and rows["forward"] > 5 and rows["backward"] > 5
    assert tables.count("Self CPU Mem") == 2 and tables.count("aten::addmm") >= 2
    out = capsys.readouterr().out
    assert summary in out and f"{folder}/profile/trace.json" in out


def test_turns_that_start_late_are_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainTokenizer, "turns", (Turn("tokenizer", start=10_000),))
    taken: list[int] = []
    forward = TrainTokenizer.forward

    def watched(task: TrainTokenizer, batch: Batch, turn: str, context: Context) -> StepOutput:
        taken.append(context.step)
        return forward(task, batch, turn, context)

    monkeypatch.setattr(TrainTokenizer, "forward", watched)
    folder = profile_training(runs.experiment_from(tiny_config(tmp_path / "run")))
    assert taken == list(range(5)) and folder == tmp_path / "run/profile"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["profile"]


def test_the_directory_of_another_run_is_refused(tiny_run: Path) -> None:
    before = files_of(tiny_run)
    with pytest.raises(runs.RunError, match="holds a run of another configuration"):
        runs.profile(tiny_config(tiny_run, "train.batch_size=2"), print)
    assert files_of(tiny_run) == before


def test_seed_is_an_option(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_run / "config.yaml")
    assert run_tool(monkeypatch, "train_net", "--config", config, "--dry-run", "--seed", 7) == 0
    assert f"run directory: {tiny_run}, seed 7" in capsys.readouterr().out
    assert run_tool(monkeypatch, "train_net", "--config", config, "--seed", 7) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err
    assert run_tool(monkeypatch, "train_net", "--config", config, "--seed", "many") == 2
    assert torch.initial_seed() != 7
