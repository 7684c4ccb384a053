"""Requests whose reconstructions have errors that were written down beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.allocation.fidelity import Fidelity
from framework.tokenizers.interface import AllocationRequest


class FirstPixel(Fidelity):
    """A reconstruction's error stands in its first channel; the second tells which image it is of."""

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        assert torch.equal(reconstructions[:, 1], images[:, 1])
        return reconstructions[:, 0, 0, 0]


class Curves:
    """Errors ``(b, n)`` of images at lengths from 1 to n, and a request that looks them up and counts."""

    def __init__(self, errors: Tensor, encoder_passes_per_trial: int = 0, keys: list[str] | None = None) -> None:
        self.errors = errors
        self.trials = torch.zeros(len(errors), dtype=torch.int64)
        self.batches: list[int] = []
        images = torch.zeros(len(errors), 3, 1, 1)
        images[:, 1] = torch.arange(len(errors))[:, None, None] / len(errors)
        self.request = AllocationRequest(
            torch.zeros(len(errors), 4), images, self._reconstruct, encoder_passes_per_trial, keys
        )

    def _reconstruct(self, rows: Tensor, lengths: Tensor) -> Tensor:
        assert rows.dtype == lengths.dtype == torch.int64 and len(rows) == len(lengths) == len(set(rows.tolist()))
        self.trials[rows] += 1
        self.batches.append(len(rows))
        reconstructions = self.request.images[rows]
        reconstructions[:, 0, 0, 0] = self.errors[rows, lengths - 1]
        return reconstructions


def first_below(errors: Tensor, budgets: tuple[int, ...], threshold: float) -> list[int]:
    """By brute force: the first budget of each image at or below the threshold, else the last."""
    return [
        next((budget for budget in budgets if row[budget - 1] <= threshold), budgets[-1]) for row in errors.tolist()
    ]


def random_errors(images: int, num_tokens: int, monotone: bool, seed: int) -> Tensor:
    """Few distinct values, so that ties are common."""
    errors = torch.randint(0, 8, (images, num_tokens), generator=torch.Generator().manual_seed(seed)) / 8
    return errors.sort(dim=1, descending=True).values if monotone else errors
