"""Ten steps equal five, a resume, and five more: bit for bit, whatever ended the first five."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.engine.checkpoint import Best, CheckpointError, checkpoint_folders
from framework.engine.optimizers import AdamW, Muon
from framework.tasks.interface import Context
from tests.engine.fakes import FakeTask, TwoTurnTask, differences, tensors, trainer


class Killed(BaseException):
    pass


def interrupt(at: int, how: str) -> Any:
    done: list[int] = []

    def before(context: Context) -> None:
        if context.step == at and not done:  # once, not in each micro-batch: a second Ctrl-C ends at once
            done.append(at)
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)

    return before


CASES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Muon": {"optimizer": partial(Muon, lr=1e-2)},
    "bfloat16": {"precision": "bfloat16"},
    "no average": {"ema_decay": None},
    "no clipping": {"clip_norm": None},
    "tight clipping": {"clip_norm": 1e-2},
    "accumulation": {"accumulate": 3},
    "recomputation": {"recompute": True},
    "a frozen parameter": {"freeze": ("net.positions",)},
    "two workers": {"num_workers": 2},
    "accumulation, workers, best": {
        "batch_size": 6,
        "accumulate": 2,
        "num_workers": 2,
        "best": Best("validation/mse"),
        "keep_last": 1,
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_ten_steps_equal_five_and_five(tmp_path: Path, changes: dict[str, Any]) -> None:
    # Three images (or six) a step of seven: the stop after five steps lies inside an epoch, between two log lines.
    whole = trainer(tmp_path / "whole", **changes)
    assert whole.fit() == ("finished", 10)

    task = FakeTask()
    task.before = interrupt(4, "ctrl-c")
    assert trainer(tmp_path / "parts", task, **changes).fit() == ("stopped", 5)
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "parts", FakeTask(), **changes)
    assert resumed.fit() == ("finished", 10)

    assert differences(tensors(whole), tensors(resumed)) == []
    assert len(tensors(whole)) > 9
    metrics = [(tmp_path / part / "metrics.jsonl").read_bytes() for part in ("whole", "parts")]
    assert metrics[0] == metrics[1] and metrics[0].count(b"\n") == 4 + 3
    assert torch.equal(whole.generators("noise").get_state(), resumed.generators("noise").get_state())
    assert next(whole.stream).keys == next(resumed.stream).keys
    saved = [tmp_path / part / "checkpoints/step_00000010" for part in ("whole", "parts")]
    weights = [sorted(folder.glob("*.safetensors")) for folder in saved]
    assert len(weights[0]) == len(weights[1]) == (1 if whole.average is None else 2)
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("how", ["killed", "terminated"])
@pytest.mark.parametrize("at", [0, 6, 8])
def test_any_end_at_any_step_changes_nothing(tmp_path: Path, how: str, at: int) -> None:
    whole = trainer(tmp_path / "whole", checkpoint_every=3, log_every=1)
    whole.fit()
    task = FakeTask()
    task.before = interrupt(at, how)
    parts = trainer(tmp_path / "parts", task, checkpoint_every=3, log_every=1)
    if how == "killed":
        with pytest.raises(Killed):
            parts.fit()
    else:
        assert parts.fit() == ("stopped", at + 1)
    resumed = trainer(tmp_path / "parts", checkpoint_every=3, log_every=1)
    resumed.fit()
    assert differences(tensors(whole), tensors(resumed)) == []
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("more", [{}, {"batch_size": 4, "accumulate": 2, "num_workers": 2}], ids=["plain", "parts"])
def test_two_turns_resume(tmp_path: Path, more: dict[str, Any]) -> None:
    changes = {"turn_optimizers": {"critic": partial(AdamW, lr=1e-3)}, "log_every": 2, **more}
    whole = trainer(tmp_path / "whole", TwoTurnTask(), **changes)
    whole.fit()
    trainer(tmp_path / "parts", TwoTurnTask(), checkpoint_every=5, **changes).fit()
    (tmp_path / "parts/checkpoints/step_00000010").rename(tmp_path / "aside")
    resumed = trainer(tmp_path / "parts", TwoTurnTask(), **changes)
    resumed.fit()
    assert differences(tensors(whole), tensors(resumed)) == []
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = trainer(tmp_path)
    start = tensors(again)
    assert again.fit() == ("finished", 10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert differences(start, tensors(again))  # it holds the finished weights, not the initial ones
    assert len(checkpoint_folders(tmp_path / "checkpoints")) == 1


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(tmp_path: Path) -> None:
    whole = trainer(tmp_path, checkpoint_every=5)
    whole.fit()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    damaged = tmp_path / "checkpoints/step_00000010/trainer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = trainer(tmp_path, checkpoint_every=5)
    assert resumed.fit() == ("finished", 10)
    assert differences(tensors(whole), tensors(resumed)) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert f"checkpoint skipped: {damaged} has" in (tmp_path / "log.txt").read_text()


def test_another_frozen_part_is_refused(tmp_path: Path) -> None:
    def task_with_frozen_part(value: float) -> FakeTask:
        task = FakeTask()
        norm = torch.nn.BatchNorm1d(2)
        torch.nn.init.constant_(norm.weight, value)
        task.judge = torch.nn.Sequential(norm).requires_grad_(False)
        task.judge.is_frozen = True  # type: ignore[assignment]
        return task

    task = task_with_frozen_part(1.0)
    modes: list[list[bool]] = []
    judge = task.get_submodule("judge")
    task.before = lambda context: modes.append([task.training, judge.training, judge.get_submodule("0").training])
    trainer(tmp_path, task).fit()
    assert modes == [[True, False, False]] * 10
    assert trainer(tmp_path, task_with_frozen_part(1.0)).fit() == ("finished", 10)
    with pytest.raises(CheckpointError, match="other weights in the frozen part 'judge': SHA-256 .* then, .* now"):
        trainer(tmp_path, task_with_frozen_part(2.0)).fit()
    with pytest.raises(CheckpointError, match="now"):
        trainer(tmp_path).fit()
