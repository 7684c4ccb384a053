"""Tasks: what one training step computes. How it is run (optimizer, device, ranks, files) is the engine's business.

A task is one module that owns models and losses. A turn names the parameters that one optimizer trains: a GAN is a
second turn, not a second trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.config.registry import Registry
from framework.data.interface import Batch, ImageData
from framework.evaluation.evaluation import Evaluation


@dataclass(frozen=True)
class Turn:
    """One optimizer's share of a step.

    Args:
        name: such as ``generator`` or ``discriminator``; optimizers and schedules go by it.
        parameters: globs over the task's parameter names.
        start: first step at which the turn is taken.
        period: the turn is taken at every ``period``-th step from there.
        updates: optimizer steps on the same batch whenever the turn is taken.
    """

    name: str
    parameters: tuple[str, ...] = ("*",)
    start: int = 0
    period: int = 1
    updates: int = 1

    def is_due(self, step: int) -> bool:
        """Whether the turn is taken at ``step`` (counted from 0)."""
        return step >= self.start and (step - self.start) % self.period == 0


@dataclass(frozen=True)
class Context:
    """What a step may know of the run: its number (from 0), progress in [0, 1], and one generator per purpose.

    ``generator("lengths")`` is a CPU generator seeded from (seed, purpose, rank); its state is checkpointed. ``update``
    counts a turn's updates on the same batch, from 0.
    """

    step: int
    progress: float
    generator: Callable[[str], torch.Generator]
    update: int = 0


@dataclass(frozen=True)
class StepOutput:
    """Named losses, weighted, whose sum is minimised; and detached numbers that are only logged.

    ``count`` is how many targets the losses and ``metrics`` are means over: micro-batches and ranks then weigh by it,
    so that every target of a step counts the same. Without one they weigh the same. ``image_metrics`` are means over
    images, and weigh by these.
    """

    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    count: Tensor | None = None
    image_metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """An evaluation that is asked of a task.

    Args:
        data: held-out images.
        train_data: what was trained on; ``None`` leaves out what compares with it.
        folder: where everything goes.
        record: which weights these are (run, step, averaged or not, seed); goes into each protocol.
        measures: what to measure, on the task's device.
        limit: measure a fixed random subset of so many images.
        progress: told the name of a stage, how much of it is done, and how much there is.
        histories: the lines of the ``metrics.jsonl`` of each run that is asked about, by the run's name.
        cache: folder for what several runs may share; ``None`` leaves out what needs it.
    """

    data: ImageData
    train_data: ImageData | None
    folder: Path
    record: Mapping[str, object]
    measures: Evaluation = field(default_factory=Evaluation)
    limit: int | None = None
    progress: Callable[[str, int, int], None] | None = None
    histories: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    cache: Path | None = None

    @property
    def baseline_data(self) -> ImageData | None:
        """What principal components are fitted to, if they are asked for."""
        return self.train_data if self.measures.pca else None


def check_frozen(part: nn.Module, name: str, path: str, learner: str) -> None:
    """Refuse a part that a task needs as another run has trained it, where it would change, or has its first weights.

    Raises:
        ValueError: with what to set.
    """
    if not getattr(part, "is_frozen", False) or getattr(part, "is_untrained", False):
        raise ValueError(
            f"the {name} stays as it is while a {learner} is trained for it: set {path}.frozen=true and {path}.weights "
            "to the run that has trained it"
        )


class Task(nn.Module, ABC):
    """Models and losses, and what one turn of one step computes with them.

    Attributes:
        turns: in the order in which they are taken within a step.
    """

    turns: tuple[Turn, ...]

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """What a run is for: what the moving average follows and ``framework.load`` returns."""

    def prepare(self, data: ImageData, cache: Path, progress: Callable[[str, int, int], None]) -> ImageData:
        """Called once before training, for what is computed of all training images beforehand.

        Args:
            data: the training images.
            cache: a folder that runs share, for files that are named by what they were computed of; may not exist.
            progress: as in ``Report``.

        Returns:
            What to train on: the same images, perhaps with something beside them.

        Raises:
            ValueError: if the images do not fit the task.
        """
        return data

    @abstractmethod
    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """The losses of one turn on one micro-batch."""

    @abstractmethod
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """A few numbers on held-out images while training goes on; the model is in eval mode, without gradients."""

    def alarms(self) -> dict[str, str]:
        """What is going wrong in training, by a short name; asked at each line of the log and told when it begins."""
        return {}

    @abstractmethod
    def report(self, wanted: Report) -> None:
        """Leave the evaluation of a trained model in ``wanted.folder``: numbers, ``table.md``, plots and pictures."""

    @classmethod
    def compare(cls, tasks: Mapping[str, Any], wanted: Report) -> None:
        """Measure the models of several runs on the same images; leave ``comparison.md`` and ``comparison.png``.

        Args:
            tasks: of this class, by the run's name, in eval mode.
            wanted: ``record`` is empty.

        Raises:
            ValueError: if models of this kind are not compared.
        """
        raise ValueError(f"what {cls.__name__} has trained is not compared")


TASKS = Registry("task", Task)
