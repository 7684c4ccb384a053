"""Channels brought to zero mean and unit deviation by numbers that stay fixed when the model is used.

Shapes: b batch, c channels, h and w a grid.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from framework.nn.between_steps import LearnsBetweenSteps, share_of_step

MOMENTUM = 0.03


class ChannelStatistics(LearnsBetweenSteps):
    """The mean and standard deviation of each channel, over images and positions.

    They come with a checkpoint, from ``measure``, or from training: what ``collect`` is shown there moves them between
    steps, over all processes; they are then mostly those of the last thirty steps.

    Attributes:
        mean: ``(c,)``, 0 before anything was seen.
        std: ``(c,)``, 1 before anything was seen.
        steps: so many steps were taken in.
    """

    mean: Tensor
    std: Tensor
    steps: Tensor
    pending: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Sums of distances from the mean, of their squares, and how many.
        self.register_buffer("pending", torch.zeros(3, channels), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """``(b, c, h, w)`` -> the same, standardised."""
        return (values - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, values: Tensor) -> Tensor:
        """The way back."""
        return values * self.std[:, None, None] + self.mean[:, None, None]

    @torch.no_grad()
    def collect(self, values: Tensor) -> None:
        """Take note of ``(b, c, h, w)`` in training; ``learn`` takes it in between steps."""
        if self.training:
            distance = rearrange(values.float(), "b c h w -> c (b h w)") - self.mean[:, None]
            count = distance.new_full((len(distance),), distance.shape[1])
            self.pending += torch.stack([distance.sum(1), distance.square().sum(1), count])

    def averaged(self) -> list[Tensor]:
        return [self.pending]

    def learn(self) -> None:
        sums, squares, counts = self.pending
        seen = counts[0] > 0
        self.steps += seen.long()
        weight = share_of_step(self.steps, seen, MOMENTUM)
        moved = sums / counts.clamp(min=1)
        variance = (squares / counts.clamp(min=1) - moved.square()).clamp(min=1e-12)
        self.mean += weight * moved
        self.std.copy_(self.std.square().lerp(variance, weight).sqrt())
        self.pending.zero_()

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set them to those of all the values in batches ``(b, c, h, w)`` together.

        Raises:
            ValueError: if there is no batch.
        """
        count, sums, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            values = rearrange(batch, "b c h w -> c (b h w)").double()
            count += values.shape[1]
            sums, squares = sums + values.sum(1), squares + values.square().sum(1)
        if count == 0:
            raise ValueError("no image to take the latents' mean and deviation from")
        mean = sums / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean.square()).clamp(min=1e-12).sqrt())
