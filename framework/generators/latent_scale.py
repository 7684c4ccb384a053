"""Latents at unit scale, which is what noise is added to.

Shapes: b batch, n tokens, d channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from framework.data.token_statistics import TokenStatistics
from framework.generators.interface import TokenSpace


class LatentScale(nn.Module):
    """Mean and standard deviation of each position and channel over kept tokens; 0 and 1 before anything was learned.

    With one scale for all positions, those at the end of an ordered sequence, which vary less, would be little but
    noise at nearly all times. Few images keep them, so that their statistics are drawn towards those of all positions.

    Args:
        space: whose latents.
        shrinkage: so many rows weigh as much as all positions together; large numbers make one scale of a channel.

    Raises:
        ValueError: if ``shrinkage`` is below 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: TokenSpace, shrinkage: float = 16.0) -> None:
        super().__init__()
        if not 0 <= shrinkage < float("inf"):
            raise ValueError(f"the shrinkage of statistics is a number of rows from 0, got {shrinkage}")
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(space.longest, space.dim))
        self.register_buffer("std", torch.ones(space.longest, space.dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentScale:
        """Moves with its owner, and stays float32 where that becomes bfloat16: a mean may be many deviations large."""
        exact = self.mean, self.std
        super()._apply(fn, recurse)
        self.mean, self.std = (old.to(new.device) for old, new in zip(exact, (self.mean, self.std), strict=True))
        return self

    def learn(self, statistics: TokenStatistics) -> None:
        """Take over what a file's tokens have."""
        total = statistics.sums.sum(0)
        shrunk = TokenStatistics(statistics.sums + self.shrinkage * total / total[0].clamp(min=1))
        length = len(self.mean)
        self.mean.copy_(shrunk.mean[:length])
        self.std.copy_(shrunk.std[:length])

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents ``(b, m, d)``, m at most n, to mean 0 and variance 1; padding does not stay 0."""
        return (latents.float() - self.mean[: latents.shape[1]]) / self.std[: latents.shape[1]]

    def denormalise(self, latents: Tensor) -> Tensor:
        """The way back from ``normalise``."""
        return latents * self.std[: latents.shape[1]] + self.mean[: latents.shape[1]]
