"""Modules that learn from batches without gradients: codebooks that follow their latents, running means, counts.

In training ``forward`` only collects. Between steps the engine brings together what all processes have collected and
lets the modules learn from it. So the state stays as it is while a step lasts, for its micro-batches too, and
afterwards it is the same in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class LearnsBetweenSteps(nn.Module, ABC):
    """Collects in ``forward``, in training mode and where gradients are computed, and learns between steps."""

    def averaged(self) -> list[Tensor]:
        """What ``learn`` reads as means over all processes; equal in number and shapes in each."""
        return []

    def shared(self) -> list[Tensor]:
        """What ``learn`` reads as the main process has it; equal in number and shapes in each."""
        return []

    @abstractmethod
    def learn(self) -> None:
        """Take in what was collected since the last call, and forget it; called once after each training step."""


def share_of_step(steps: Tensor, seen: Tensor, least: float) -> Tensor:
    """How much a step counts in a running mean: as much as each before it at first, and never less than ``least``.

    So the start is forgotten at once, and after ``1 / least`` steps old ones fade.

    Args:
        steps: so many were taken in, this one included; int64.
        seen: whether the step brought anything; where not it counts nothing. Bool, of the same shape.
        least: 0.01 looks back about a hundred steps.
    """
    return torch.where(seen, (1 / steps.clamp(min=1)).clamp(min=least), 0)
