"""A small data set and small tasks that exercise everything the engine does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.data.interface import Batch, ImageData
from framework.engine.optimizers import AdamW
from framework.engine.schedules import WarmupCosine
from framework.engine.trainer import Trainer
from framework.engine.training import Training
from framework.runtime.records import JsonLines, LogFile, Records
from framework.tasks.interface import Context, Report, StepOutput, Task, Turn


class FakeData(ImageData):
    """Noise that depends on (epoch, index): seven images of 4x4."""

    image_size = 4

    def __init__(self, count: int = 7) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        def image(index: int) -> Tensor:
            return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1000 * epoch + index))

        names = [f"image{index}" for index in indices]
        return Batch(torch.stack([image(index) for index in indices]), names, names)

    def whole(self, group: str) -> Tensor:
        raise NotImplementedError

    def protocol(self) -> dict[str, object]:
        return {"source": "noise"}


class FakeModel(nn.Module):
    """A matrix in a block, a bare parameter, dropout (torch's global generator), and both kinds of buffers."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(48, 48)])
        self.positions = nn.Parameter(torch.randn(1, 48) * 0.1)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("mean", torch.zeros(48))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(flat.mean(0), 0.1)
                self.count.add_(1)
        return self.blocks[0](self.dropout(flat) - self.mean) + self.positions


class FakeTask(Task):
    """Reconstruction with noise from a generator; ``poison`` may change the losses, ``before`` sees each context."""

    turns: tuple[Turn, ...] = (Turn("tokenizer"),)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = FakeModel()
        self.poison: Callable[[int, Tensor], Tensor] = lambda step, loss: loss
        self.before: Callable[[Context], object] = lambda context: None

    @property
    def model(self) -> nn.Module:
        return self.net

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        self.before(context)
        target = batch.images.flatten(1)
        noise = torch.randn(target.shape, generator=context.generator("noise"))
        pixel = (self.net(batch.images) - target - 0.1 * noise).square().mean()
        losses = {"pixel": self.poison(context.step, pixel), "size": 1e-3 * self.net.positions.square().mean()}
        return StepOutput(losses, {"noise": noise.mean()})

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        assert not self.training and not torch.is_grad_enabled()
        errors = [(self.net(b.images) - b.images.flatten(1)).square().mean(1) for b in batches]
        return {"mse": float(torch.cat(errors).mean()), "images": float(len(torch.cat(errors)))}

    def report(self, wanted: Report) -> None:
        raise NotImplementedError


class TwoTurnTask(FakeTask):
    """A generator and a critic that starts at step 2 and is taken every second step."""

    turns = (Turn("generator", ("net.*",)), Turn("critic", ("critic.*",), start=2, period=2))

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(48, 1)
        self.taken: list[tuple[int, str]] = []
        self.leaks: list[str] = []

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        self.taken.append((context.step, turn))
        own = "critic." if turn == "critic" else "net."
        self.leaks += [name for name, p in self.named_parameters() if p.requires_grad != name.startswith(own)]
        made = self.net(batch.images)
        if turn == "generator":
            return StepOutput({"adversarial": self.critic(made).mean()})
        return StepOutput({"critic": (self.critic(made) - self.critic(batch.images.flatten(1))).mean()})


def training(**changes: Any) -> Training:
    """Ten steps that log, validate and save in between."""
    settings: dict[str, Any] = {
        "max_steps": 10,
        "batch_size": 3,
        "optimizer": partial(AdamW, lr=1e-2),
        "schedule": partial(WarmupCosine, warmup_steps=3),
        "ema_decay": 0.9,
        "log_every": 3,
        "validate_every": 4,
        "validate_images": 5,
        "checkpoint_every": 100,
    }
    return Training(**(settings | changes))


def trainer(folder: Path, task: Task | None = None, num_workers: int = 0, **changes: Any) -> Trainer:
    """A trainer over fakes whose records go to files only."""
    records = Records(
        [
            JsonLines(folder / "metrics.jsonl", "values"),
            JsonLines(folder / "timing.jsonl", "timings"),
            LogFile(folder / "log.txt"),
        ]
    )
    task = FakeTask() if task is None else task
    sets, options = (FakeData(), FakeData(6)), training(**changes)
    return Trainer(task, *sets, options, seed=1, folder=folder, records=records, num_workers=num_workers)


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a step moves: weights, buffers, averages, optimizers' states."""
    found = {f"task.{name}": value for name, value in trainer.task.state_dict().items()}
    if trainer.average is not None:
        found |= {f"average.{name}": value for name, value in trainer.average.average.items()}
    for turn in trainer.turns:
        for i, part in enumerate(turn.optimizer.parts):
            for key, entry in part.state_dict()["state"].items():
                found |= {f"{turn.turn.name}.{i}.{key}.{name}": value for name, value in entry.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit for bit equal."""
    names = sorted(first.keys() | second.keys())
    return [n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n])]
