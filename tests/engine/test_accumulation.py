"""A step in micro-batches is the step of the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework import runs
from framework.data.interface import Batch
from framework.engine.trainer import Trainer
from framework.engine.turns import NonFiniteError, micro_batches
from tests.engine.fakes import FakeData, FakeTask, TwoTurnTask, differences, tensors, trainer, training
from tests.tiny_run import tiny_config

MASKING = {"nested": "{name: NestedTailMasking}", "full": "{name: FullLength}"}


def trained(folder: Path, *overrides: str) -> Trainer:
    # A large eps keeps Adam from blowing the rounding of tiny gradients up to whole steps.
    optimizer = ["train.optimizer={name: AdamW, lr: 0.01, eps: 0.001}", "train.schedule={name: Constant}"]
    options = ["train.precision=float32", "train.log_every=1", *optimizer]
    run = runs.experiment_from(tiny_config(folder, *options, *overrides)).trainer()
    run.fit()
    return run


@pytest.mark.parametrize("masking", MASKING)
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path, masking: str) -> None:
    schedule = f"tokenizer.masking={MASKING[masking]}"
    whole = trained(tmp_path / "whole", schedule)
    parts = trained(tmp_path / "parts", schedule, "train.accumulate=2")
    expected, found = tensors(whole), tensors(parts)
    start = runs.experiment_from(tiny_config(tmp_path / "start", schedule)).task.state_dict()
    assert max(float((expected[f"task.{name}"] - value).abs().max()) for name, value in start.items()) > 0.01
    for name in (name for name in expected if name.startswith(("task.", "average."))):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    lines = [(tmp_path / part / "metrics.jsonl").read_text().splitlines() for part in ("whole", "parts")]
    assert len(lines[0]) == len(lines[1]) == 8
    for one, other in zip(*map(lambda part: map(json.loads, part), lines), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_a_step_uses_no_more_than_a_micro_batch_at_a_time(tmp_path: Path) -> None:
    task = TwoTurnTask()
    run = trainer(tmp_path, task, batch_size=6, accumulate=3, max_steps=3)
    sizes: list[int] = []
    task.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0].images)))
    run.fit()
    assert set(sizes) == {2} and task.leaks == []
    assert task.taken == [(step, "generator") for step in (0, 1, 2) for _ in range(3)] + [(2, "critic")] * 3


def test_a_batch_is_cut_in_order() -> None:
    batch = FakeData().fetch([3, 1, 4, 5], 0)
    labelled = Batch(batch.images, batch.keys, batch.groups, torch.arange(4))
    first, second = micro_batches(labelled, 2)
    assert torch.equal(torch.cat([first.images, second.images]), batch.images)
    assert (first.keys, second.groups) == (["image3", "image1"], ["image4", "image5"])
    assert first.labels is not None and first.labels.tolist() == [0, 1]
    assert micro_batches(batch, 4)[3].labels is None


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_micro_batch_that_is_not_finite_changes_nothing(tmp_path: Path, bad: int) -> None:
    task = FakeTask()
    run = trainer(tmp_path, task, batch_size=6, accumulate=3)
    before: dict[str, Tensor] = {}
    seen: list[int] = []

    def harm(step: int, loss: Tensor) -> Tensor:
        if step < 2:
            return loss
        if not seen:
            before.update({name: value for name, value in tensors(run).items() if "mean" not in name})
        seen.append(step)
        return loss * torch.nan if len(seen) == bad + 1 else loss

    task.poison = harm
    with pytest.raises(NonFiniteError, match="step 2, turn 'tokenizer': of the losses, pixel is nan;") as caught:
        run.fit()
    assert len(seen) == 3
    after = tensors(run)
    assert [name for name in differences(before, {name: after[name] for name in before}) if "count" not in name] == []
    stream = trainer(tmp_path / "other", batch_size=6).stream
    keys = [next(stream).keys for _ in range(3)][2]
    assert caught.value.keys == keys[2 * bad : 2 * bad + 2]


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of train.accumulate, got 6 images in 4 .* 4 "):
        training(batch_size=6, accumulate=4)
    with pytest.raises(ValueError, match="train.accumulate must be at least 1, got 0"):
        training(accumulate=0)
