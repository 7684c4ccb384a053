"""What two processes do together; each leaves what it saw in FOLDER/rank_N.pt. Run by test_ranks.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framework.data.interface import Batch
from framework.engine.optimizers import AdamW
from framework.engine.trainer import Trainer
from framework.engine.turns import NonFiniteError
from framework.launch.environment import joined
from framework.nn.between_steps import LearnsBetweenSteps
from framework.runtime.ranks import Ranks
from framework.runtime.records import JsonLines, LogFile, Records
from framework.tasks.interface import Context, Report, StepOutput, Task, Turn
from tests.engine.fakes import FakeData, training


class Average(LearnsBetweenSteps):
    """Follows the mean of all ranks' images; and has a parameter that takes its noise from the main one's."""

    mean: torch.Tensor
    total: torch.Tensor
    count: torch.Tensor
    first: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(48))
        self.register_buffer("total", torch.zeros(48), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("first", torch.zeros(48), persistent=False)
        self.own = nn.Parameter(torch.zeros(48), requires_grad=False)

    def forward(self, flat: torch.Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            self.total += flat.detach().sum(0)
            self.count += len(flat)
            self.first = flat.detach()[0]

    def averaged(self) -> list[torch.Tensor]:
        return [self.total, self.count]

    def shared(self) -> list[torch.Tensor]:
        return [self.first]

    def learn(self) -> None:
        self.mean.lerp_(self.total / self.count, 0.1)
        self.own.copy_(self.first)
        self.total.zero_()
        self.count.zero_()


class PlainTask(Task):
    """No noise; one parameter that one image alone uses, and a buffer that learns from its own rank."""

    seen: torch.Tensor
    turns = (Turn("all"),)

    def __init__(self, poison: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(48, 48)
        self.rare = nn.Parameter(torch.zeros(48))
        self.register_buffer("seen", torch.zeros(48))
        self.average = Average()
        self.poison = poison

    @property
    def model(self) -> nn.Module:
        return self.net

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        flat = batch.images.flatten(1)
        self.seen += flat.mean(0)
        self.average(flat)
        made = self.net(flat)
        if rows := [row for row, key in enumerate(batch.keys) if key == "image0"]:
            made[rows] = made[rows] + self.rare
        loss = (made - flat).square().mean()
        if self.poison in batch.keys and context.step >= 1:
            loss = loss * float("nan")
        return StepOutput({"pixel": loss}, {"largest": flat.amax(1).mean()})

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        errors = [self.net(batch.images.flatten(1)).mean(1) for batch in batches]
        self.validated_at_once = len(errors[0])
        return {"mse": float(torch.cat(errors).mean())}

    def report(self, wanted: Report) -> None:
        raise NotImplementedError


def train(folder: Path, ranks: Ranks, steps: int, task: PlainTask | None = None, **changes: Any) -> PlainTask:
    """Steps on batches of six of twelve images, the same on one rank as on two."""
    task = task or PlainTask()
    options = training(max_steps=8, batch_size=6, optimizer=partial(AdamW, lr=1e-2), checkpoint_every=2, **changes)
    files = [JsonLines(folder / "metrics.jsonl", "values"), LogFile(folder / "log.txt")]
    records = Records(files if ranks.is_main else [])
    trainer = Trainer(task, FakeData(12), FakeData(4), options, 1, folder, records=records, ranks=ranks)
    if steps < options.max_steps:
        trainer.periodic.append((steps, _interrupt))
    trainer.fit()
    return task


def _interrupt(step: int) -> None:
    """As Ctrl-C on the main process only."""
    if os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), 2)


def main(folder: Path) -> None:
    with joined() as ranks:
        found: dict[str, Any] = {"any": [ranks.any(False), ranks.any(ranks.rank == 1)]}
        found["gathered"] = ranks.gather(ranks.rank)
        tensors = [torch.full((3,), float(ranks.rank)), torch.full((2, 2), 2.0 * ranks.rank, dtype=torch.float64)]
        ranks.average(tensors)
        found["averaged"] = [tensor.clone() for tensor in tensors]
        tensors[0] += ranks.rank
        ranks.spread(tensors)
        found["spread"] = tensors
        for name, changes in {"plain": {}, "accumulated": {"accumulate": 3}}.items():
            task = train(folder / name, ranks, 8, **changes)
            found[name] = task.state_dict()
            found[f"{name} validated at once"] = task.validated_at_once
        train(folder / "stopped", ranks, 3)
        found["resumed"] = train(folder / "stopped", ranks, 8).state_dict()
        try:
            train(folder / "poisoned", ranks, 8, PlainTask("image7"))
        except NonFiniteError as error:
            found["error"] = str(error)
    found["threads"] = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    torch.save(found, folder / f"rank_{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
