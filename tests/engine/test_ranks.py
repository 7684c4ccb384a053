"""Two real processes over gloo: what they agree on, and that they train as one."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.engine.stop import StopFlag
from framework.launch.environment import joined
from framework.launch.local import run_processes
from framework.runtime.ranks import Ranks
from tests.engine.ranks_script import train
from tests.tiny_run import ROOT


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        assert run_processes([sys.executable, str(ROOT / "tests/engine/ranks_script.py"), str(folder)], 2) == 0
    return folder


def seen(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def test_what_ranks_agree_on(together: Path) -> None:
    for rank, found in enumerate(seen(together)):
        assert found["any"] == [False, True] and found["gathered"] == [0, 1]
        first, second = found["averaged"]
        assert first.tolist() == [0.5] * 3 and second.tolist() == [[1.0, 1.0]] * 2 and second.dtype == torch.float64
        assert found["spread"][0].tolist() == [0.5] * 3, rank


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_two_ranks_train_as_one(together: Path, tmp_path: Path, name: str) -> None:
    alone = train(tmp_path, Ranks(), 8).state_dict()
    first, second = (found[name] for found in seen(together))
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        if key != "seen" and (name == "plain" or key != "average.own"):  # of the main rank's images only
            torch.testing.assert_close(first[key], value, atol=1e-6, rtol=1e-5)
    assert alone["rare"].abs().max() > 0 and alone["average.mean"].min() > 0.2
    mine, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, together / name)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_stop_of_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(together: Path) -> None:
    for found in seen(together):
        assert all(torch.equal(found["resumed"][key], value) for key, value in found["plain"].items())
    logs = [(together / name / "metrics.jsonl").read_text() for name in ("plain", "stopped")]
    assert logs[0] == logs[1]


def test_what_is_not_finite_on_one_rank_is_told_by_all(together: Path) -> None:
    errors = [found["error"] for found in seen(together)]
    assert errors[0] == errors[1]
    assert "of the losses, pixel is nan" in errors[0] and "on rank" in errors[0] and "image7" in errors[0]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_no_thread_of_the_process_group_is_left(together: Path) -> None:
    for found in seen(together):
        assert found["threads"] and not [name for name in found["threads"] if "gloo" in name]


def test_a_run_of_two_ranks_is_continued_by_one(together: Path, tmp_path: Path) -> None:
    run = shutil.copytree(together / "plain", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_00000008")
    alone = train(run, Ranks(), 8).state_dict()
    assert "saved by 2 processes and continued by 1" in (run / "log.txt").read_text()
    torch.testing.assert_close(alone["net.weight"], seen(together)[0]["plain"]["net.weight"], atol=1e-6, rtol=1e-5)


def test_validation_takes_as_many_images_at_once_as_training(together: Path) -> None:
    for found in seen(together):
        assert found["plain validated at once"] == 3 and found["accumulated validated at once"] == 1


def test_batches_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    two = type("Two", (Ranks,), {"size": 2})()
    with pytest.raises(ValueError, match=r"train.batch_size 6 cannot be shared out among 2 processes with train.accu"):
        train(tmp_path, two, 8, accumulate=2)


def test_alone_without_variables_and_missing_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"), joined():
        pass


def test_preemption_is_told_from_a_stop() -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGUSR2)
        assert stop.is_set and stop.is_preempted
        signal.raise_signal(signal.SIGTERM)
        assert not stop.is_preempted
