"""Options of training: frozen globs, the best checkpoint, broken images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from framework import runs
from framework.data.interface import Batch
from framework.engine.checkpoint import Best, checkpoint_folders, latest_checkpoint
from framework.engine.trainer import Trainer
from framework.tasks.interface import Context
from tests.engine.fakes import FakeData, FakeTask, TwoTurnTask, trainer
from tests.tiny_run import tiny_config


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Frozen globs


def test_frozen_globs_are_not_trained_and_stay_in_checkpoints(tmp_path: Path) -> None:
    task = FakeTask()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer(tmp_path, task, freeze=("net.blocks.*",)).fit()
    after = task.state_dict()
    assert torch.equal(after["net.blocks.0.weight"], before["net.blocks.0.weight"])
    assert torch.equal(after["net.blocks.0.bias"], before["net.blocks.0.bias"])
    assert not torch.equal(after["net.positions"], before["net.positions"])
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.frozen == {}
    assert torch.equal(checkpoint.weights("model")["net.blocks.0.weight"], before["net.blocks.0.weight"])
    assert torch.equal(checkpoint.weights("ema")["blocks.0.weight"], before["net.blocks.0.weight"])


def test_frozen_globs_stay_frozen_through_other_turns(tmp_path: Path) -> None:
    task = TwoTurnTask()
    before = task.critic.bias.detach().clone()
    trainer(tmp_path, task, freeze=("critic.bias",)).fit()
    assert torch.equal(task.critic.bias, before) and not task.critic.bias.requires_grad
    assert task.critic.weight.requires_grad


def test_a_glob_that_freezes_nothing_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.freeze: 'net.block.\*' matches nothing: did you mean 'net.blocks.\*'"):
        trainer(tmp_path, freeze=("net.positions", "net.block.*"))
    with pytest.raises(runs.RunError, match=r"'tokenizer.encodr.\*' matches nothing: .* 'tokenizer.encoder.\*'"):
        runs.dry_run(tiny_config(tmp_path, "train.freeze=['tokenizer.encodr.*']"))


def test_a_dry_run_counts_frozen_globs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.freeze=['tokenizer.encoder.*']")
    encoder = runs.experiment_from(config).task.model.get_submodule("encoder")
    numel = sum(parameter.numel() for parameter in encoder.parameters())
    (row,) = [line.split() for line in runs.dry_run(config).splitlines() if line.startswith("  encoder")][:1]
    assert row == ["encoder", "0", f"{numel:,}", f"{numel:,}"]


# The best checkpoint


class ScriptedTask(FakeTask):
    """Validations give the next of ``errors``."""

    errors: list[float] = []

    def validate(self, batches: Any) -> dict[str, float]:
        return {"images": float(sum(len(batch.keys) for batch in batches)), "mse": next(self.script)}

    def __init__(self) -> None:
        super().__init__()
        self.script = iter([9.0, *self.errors])  # the first is the check that the metric exists


def scripted(folder: Path, errors: list[float], **changes: Any) -> Trainer:
    task = type("Task", (ScriptedTask,), {"errors": errors})()
    settings = {"best": Best("validation/mse"), "validate_every": 2, "keep_last": 1, "ema_decay": None, **changes}
    return trainer(folder, task, **settings)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint_folders(folder / "checkpoints")]


def saved_steps(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every save."""
    saved: list[int] = []
    save = run.store.save

    def watched(step: int, *rest: Any) -> Path:
        saved.append(step)
        return save(step, *rest)

    monkeypatch.setattr(run.store, "save", watched)
    return saved


def test_a_validation_that_improves_saves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scripted(tmp_path, [5.0, 3.0, 4.0, 3.0, float("nan")])
    saved = saved_steps(run, monkeypatch)
    run.fit()
    assert saved == [2, 4, 10] and steps(tmp_path) == [4, 10]
    best = json.loads((tmp_path / "checkpoints/step_00000004/manifest.json").read_text())
    assert best["body"]["metrics"] == {"validation/images": 5.0, "validation/mse": 3.0}


def test_a_checkpoint_that_is_also_due_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scripted(tmp_path, [5.0, 4.0, 3.0, 2.0, 1.0], checkpoint_every=4, keep_last=9)
    saved = saved_steps(run, monkeypatch)
    run.fit()
    assert saved == [2, 4, 6, 8, 10]


def test_higher_may_be_better(tmp_path: Path) -> None:
    scripted(tmp_path, [5.0, 3.0, 6.0, 4.0, 2.0], best=Best("validation/mse", higher=True)).fit()
    assert steps(tmp_path) == [6, 10]


def test_a_resumed_run_knows_the_best_so_far(tmp_path: Path) -> None:
    run = scripted(tmp_path, [1.0, 2.0], checkpoint_every=4)

    def kill(context: Context) -> None:
        if context.step == 5:
            raise KeyboardInterrupt

    assert isinstance(run.task, FakeTask)
    run.task.before = kill
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert steps(tmp_path) == [2, 4]
    scripted(tmp_path, [3.0, 1.5, 4.0], checkpoint_every=4).fit()
    assert steps(tmp_path) == [2, 10]


def test_a_metric_that_does_not_exist_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, best=Best("validation/msee"))
    assert str(caught.value) == (
        "train.best.metric: a validation gives no 'validation/msee': did you mean 'validation/mse'? "
        "It gives validation/mse, validation/images"
    )
    assert list(tmp_path.iterdir()) == []


def test_best_is_written_in_yaml(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "train.best={metric: validation/mse@16}", "train.max_steps=8")
    assert runs.experiment_from(config).trainer().fit() == ("finished", 8)
    assert steps(tmp_path / "run") == [4, 8]
    with pytest.raises(runs.RunError, match="no 'validation/mse@3': .* It gives validation/mse@1, validation/mse@4, "):
        runs.train(tiny_config(tmp_path / "other", "train.best={metric: validation/mse@3}"), print)
    assert not (tmp_path / "other").exists()


# Broken images


class BrokenData(FakeData):
    """Some images cannot be read."""

    max_broken = 0.5

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        good = [index for index in indices if index not in (2, 5)]
        batch = super().fetch(good, epoch) if good else Batch(torch.empty(0, 3, 4, 4), [], [])
        return replace(batch, broken={f"image{i}": "truncated" for i in indices if i in (2, 5)})

    def key(self, index: int) -> str:
        return f"image{index}"


def broken_trainer(folder: Path, **changes: Any) -> Trainer:
    run = trainer(folder, **changes)
    run.stream.data = BrokenData()
    run.validation_data = BrokenData(6)
    return run


def test_broken_images_are_told_once_and_counted(tmp_path: Path) -> None:
    broken_trainer(tmp_path, log_every=1, checkpoint_every=5).fit()
    said = (tmp_path / "log.txt").read_text().splitlines()
    told = sorted(line for line in said if "cannot be read" in line)
    assert told == [f"left out, since it cannot be read: image{i}: truncated" for i in (2, 5)]
    counts = [line.get("data/broken") for line in lines(tmp_path) if "tokenizer/loss" in line]
    assert counts[0] in (None, 1.0) and counts[-1] == 2.0 and 0.0 not in counts

    (tmp_path / "checkpoints/step_00000010").rename(tmp_path / "aside")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    broken_trainer(tmp_path, log_every=1).fit()
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    again = (tmp_path / "log.txt").read_text().splitlines()[len(said) :]
    assert [line for line in again if "cannot be read" in line] == []
