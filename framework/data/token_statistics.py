"""Mean and spread of latent tokens at each position and channel, over kept tokens only.

The tokens of an elastic tokenizer are ordered by importance, so that later positions vary less and are kept for fewer
images: one scale for all of them would leave a generator little but noise at the end.

Shapes: b rows, n positions, d channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Sums over rows, which add up over files.

    Args:
        sums: of every position how many rows keep it, then the sums over these rows of its d channels, then those of
            their squares: ``(n, 1 + 2 d)`` float64.
    """

    sums: Tensor

    @staticmethod
    def of(latents: Tensor, mask: Tensor) -> TokenStatistics:
        """Of latents ``(b, n, d)`` and where a token counts, ``(b, n)`` bool."""
        values = latents.double().masked_fill(~mask[..., None], 0)
        sums = [mask.double().sum(0)[:, None], values.sum(0), values.square().sum(0)]
        return TokenStatistics(torch.cat(sums, dim=1))

    def __add__(self, other: TokenStatistics) -> TokenStatistics:
        """Of the rows of both."""
        return TokenStatistics(self.sums + other.sums)

    @property
    def counts(self) -> Tensor:
        """How many rows keep each position, ``(n,)``."""
        return self.sums[:, 0]

    @cached_property
    def _scale(self) -> Tensor:
        """Mean and standard deviation, ``(2, n, d)`` float32."""
        few = self.counts[:, None] < 2  # they tell no spread: those of all positions together stand for theirs
        sums = torch.where(few, self.sums.sum(0), self.sums)
        counts, (first, second) = sums[:, :1], sums[:, 1:].chunk(2, dim=1)
        mean = first / counts.clamp(min=1)
        square = second / counts.clamp(min=1)
        variance = square - mean.square()
        # Of a constant the difference is not 0, but what rounding leaves of it.
        return torch.stack([mean, torch.where(variance > 1e-12 * square, variance, 1).sqrt()]).float()

    @property
    def mean(self) -> Tensor:
        """``(n, d)`` float32; of all positions together where fewer than two rows keep one."""
        return self._scale[0]

    @property
    def std(self) -> Tensor:
        """``(n, d)`` float32, likewise, over the count; 1 where a channel never changes."""
        return self._scale[1]

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents ``(b, m, d)``, m at most n, to mean 0 and variance 1; padding does not stay 0."""
        mean, std = self._scale[:, : latents.shape[1]].to(latents.device)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The way back from ``normalise``."""
        mean, std = self._scale[:, : latents.shape[1]].to(latents.device)
        return latents * std + mean
