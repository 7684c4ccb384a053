from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from framework import runs
from framework.engine import step_cost
from framework.engine.plan import count_operations
from framework.engine.step_cost import PhaseClock, peak_operations, step_cost_lines
from framework.runtime.ranks import Ranks
from framework.tokenizers.tokenizer import Tokenizer
from tests.test_runs import stop_at
from tests.tiny_run import tiny_config


def test_phases_add_up() -> None:
    clock = PhaseClock(torch.device("cpu"))
    for name in ("forward", "backward", "forward"):
        with clock(name):
            time.sleep(0.01)
    assert list(clock.seconds) == ["forward", "backward"]
    assert clock.seconds["forward"] > clock.seconds["backward"] >= 0.01


def test_a_step_is_measured_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "peak_operations", lambda device, dtype: 1e12)
    experiment = runs.experiment_from(tiny_config(tmp_path / "run"))
    before = [parameter.clone() for parameter in experiment.task.parameters()]
    speed, phases, used = step_cost_lines(experiment, 2, Ranks())
    assert all(torch.equal(old, new) for old, new in zip(before, experiment.task.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []
    shares = {name: float(share) for name, share in re.findall(r"([a-z ]+) ([-\d.]+)%", phases.removeprefix("time: "))}
    assert {name.strip() for name in shares} == {"data", "forward", "backward", "optimizer", "average", "the rest"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.4)
    images = float(speed.split()[0])
    assert isinstance(experiment.task.model, Tokenizer)
    operations = 6 * count_operations(experiment.task.model)["total"] * images
    assert float(used.split()[0]) == pytest.approx(operations, rel=0.01)
    assert f"{operations / 1e12:.1%} of the 1e+12" in used or f"{1.005 * operations / 1e12:.1%}" in used


def test_a_stop_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        list(step_cost_lines(runs.experiment_from(tiny_config(tmp_path / "run")), 2, Ranks()))


def test_the_peak_is_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "SIDE", 256)
    assert 1e8 < peak_operations(torch.device("cpu"), torch.float32) < 1e14
