"""Trackers get the numbers, go on where the run goes on, and say what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from framework import runs
from framework.config import ConfigError
from framework.engine import trackers
from framework.engine.trackers import TensorBoard, WandB
from framework.runtime.records import Record
from tests.tiny_run import run_tool, tiny_config, train_tiny

CONFIG = "projects/adatok/ntm.yaml"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_values_and_timings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    board.rewind(0)
    board.write(Record(2, 9, {"tokenizer/loss": 0.5}, {"images_per_second": 8.0}))
    board.write(Record(4, 9, {"validation/mse": 0.25}))
    board.say("not for dashboards")
    board.close()
    assert scalars(tmp_path / "tensorboard") == {
        "tokenizer/loss": [(2, 0.5)],
        "timing/images_per_second": [(2, 8.0)],
        "validation/mse": [(4, 0.25)],
    }


def test_tensorboard_purges_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(folder=tmp_path)
        board.rewind(start)
        for step in steps:
            board.write(Record(step, 9, {"loss": float(10 * start + step)}))
        board.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_a_run_writes_to_its_own_directory(tmp_path: Path, quick_report: None) -> None:
    pytest.importorskip("tensorboard")
    train_tiny(tmp_path / "run", "run.trackers=[{name: TensorBoard}]")
    shown = scalars(tmp_path / "run/tensorboard")
    assert [step for step, _ in shown["tokenizer/loss"]] == [2, 4, 6]
    assert [step for step, _ in shown["validation/mse@16"]] == [4, 6]


class FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.logged: list[dict[str, float]] = []
        self.axes: list[tuple[str, str]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A module of that name; the runs that it started."""
    started: list[FakeRun] = []
    module: Any = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})

    def init(**settings: Any) -> FakeRun:
        if settings["mode"] == "online":
            raise module.Error("api_key not configured")
        started.append(FakeRun(settings))
        return started[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return started


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, wandb: list[FakeRun]) -> None:
    for start in (0, 2):
        board = WandB("tokens", mode="offline", folder=tmp_path / "run")
        assert len(wandb) == (1 if start else 0)
        board.rewind(start)
        board.write(Record(start + 2, 9, {"loss": 0.5}, {"images_per_second": 8.0}))
        board.close()
    first, second = wandb
    assert first.settings == second.settings
    assert first.settings["id"] == (tmp_path / "run/wandb_id.txt").read_text() and first.settings["resume"] == "allow"
    assert first.settings["project"] == "tokens" and first.settings["dir"] == str(tmp_path / "run")
    assert first.logged == [{"step": 2, "loss": 0.5, "timing/images_per_second": 8.0}]
    assert first.axes == [("*", "step")] and first.finished and second.finished


def test_wandb_without_a_login_is_told_in_words(tmp_path: Path, wandb: list[FakeRun]) -> None:
    board = WandB("tokens", folder=tmp_path)
    with pytest.raises(OSError, match="api_key not configured. Log in with `wandb login`, or set mode: offline"):
        board.rewind(0)
    board.close()


def test_a_missing_package_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    tracker = "run.trackers=[{name: WandB, project: x}]"
    message = "WandB needs the package wandb, .*: pip install wandb"
    config = tiny_config(tmp_path / "run", tracker)
    for call in (runs.check, runs.dry_run):
        with pytest.raises(runs.RunError, match=f"run.trackers: {message}"):
            call(config)
    with pytest.raises(ConfigError, match=f"run.trackers.0: WandB refuses its arguments: {message}"):
        train_tiny(tmp_path / "run", tracker)
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, "--check", tracker) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
