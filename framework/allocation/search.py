"""Searches: decode an image at candidate lengths until one is good enough.

They read the true error, which no learned policy can, and pay a decoding for every look at it. The longest budget is
what remains when all others have failed, so it is never tried.

Shapes: b images of a batch, r rows of it, g budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.allocation.fidelity import Fidelity, SquaredError
from framework.tokenizers.interface import POLICIES, Allocation, AllocationPolicy, AllocationRequest


def candidate_budgets(budgets: Sequence[int] | int | None, num_tokens: int) -> tuple[int, ...]:
    """The budgets; a number stands for every length from it to ``num_tokens``, and none for every length from 1.

    Raises:
        ValueError: if they do not increase from at least 1 to at most ``num_tokens``.
    """
    if budgets is None or isinstance(budgets, int):
        first = 1 if budgets is None else budgets
        budgets = range(first, max(num_tokens, first) + 1)
    chosen = tuple(budgets)
    fitting = tuple(sorted({min(max(budget, 1), num_tokens) for budget in chosen}))
    if not chosen or chosen != fitting:
        raise ValueError(
            f"budgets must increase, from 1 to at most the tokenizer's {num_tokens} tokens, got {list(chosen)}; "
            f"try {list(fitting or (num_tokens,))}"
        )
    return chosen


@dataclass
class Trials:
    """Reconstructs images of a request at lengths on trial, and counts how many it reconstructed.

    Args:
        request: the images.
        fidelity: how a reconstruction is measured.
        made: trials so far, of all images together.
    """

    request: AllocationRequest
    fidelity: Fidelity
    made: int = 0

    def distortions(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Rows ``(r,)`` of the batch and a length for each ``(r,)``, decoded at once -> distortions ``(r,)``."""
        self.made += len(rows)
        return self.fidelity(self.request.reconstruct(rows, lengths), self.request.images[rows])

    def table(self, lengths: Tensor) -> Tensor:
        """Distortions ``(b, k)`` of every image at k lengths of its own, ``(b, k)`` int64, or at ``(k,)`` for all."""
        rows = torch.arange(len(self.request.images), device=self.request.images.device)
        columns = lengths.to(rows.device).expand(len(rows), -1).unbind(dim=1)
        return torch.stack([self.distortions(rows, column) for column in columns], dim=1)

    def allocation(self, lengths: Tensor) -> Allocation:
        """The lengths ``(b,)`` with what the trials cost."""
        passes = self.made / len(lengths)
        return Allocation(lengths, passes * self.request.encoder_passes_per_trial, passes)


class ThresholdSearch(AllocationPolicy):
    """Looks for the shortest budget whose distortion meets a threshold; the longest where none does.

    Args:
        threshold: the highest distortion that will do, in the fidelity's unit.
        budgets: lengths to choose from, increasing; a number for every length from it to n, ``null`` from 1.
        fidelity: how a reconstruction is measured; ``SquaredError`` unless given.
        num_tokens: n of the tokenizer.
        feature_dim: not read; a search looks at errors, not at features.
    """

    def __init__(
        self,
        threshold: float,
        budgets: list[int] | int | None = None,
        fidelity: Fidelity | None = None,
        *,
        num_tokens: int,
        feature_dim: int,
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.budgets = candidate_budgets(budgets, num_tokens)
        self.fidelity = fidelity or SquaredError()


@POLICIES.register()
class BinarySearch(ThresholdSearch):
    """Halves the budgets until one is left: the shortest that meets the threshold, in about log2 g trials.

    That holds where an image's distortions fall from budget to budget. Where they do not, it still returns a budget
    that meets the threshold, or the longest, but a shorter one may meet it too; ``LinearSearch`` finds that.
    ElasticTok's search, and "+Heur" of the AdaTok paper (Table 2). All undecided images are decoded in one batch, each
    at its own length.
    """

    @torch.no_grad()
    def forward(self, request: AllocationRequest) -> Allocation:
        trials = Trials(request, self.fidelity)
        budgets = torch.tensor(self.budgets, device=request.images.device)
        low = budgets.new_zeros(len(request.images))
        high = torch.full_like(low, len(budgets) - 1)
        while len(rows := (low < high).nonzero().flatten()):
            middle = (low[rows] + high[rows]) // 2
            passed = trials.distortions(rows, budgets[middle]) <= self.threshold
            low[rows] = torch.where(passed, low[rows], middle + 1)
            high[rows] = torch.where(passed, middle, high[rows])
        return trials.allocation(budgets[low])


@POLICIES.register()
class LinearSearch(ThresholdSearch):
    """Tries budgets in increasing order: the shortest that meets the threshold, whatever the curve looks like.

    ElasticTok's other search, a scan. An image drops out of the batch as soon as it passes; the longest budget costs
    g - 1 trials.
    """

    @torch.no_grad()
    def forward(self, request: AllocationRequest) -> Allocation:
        trials = Trials(request, self.fidelity)
        rows = torch.arange(len(request.images), device=request.images.device)
        lengths = torch.full_like(rows, self.budgets[-1])
        for budget in self.budgets[:-1]:
            if not len(rows):
                break
            passed = trials.distortions(rows, torch.full_like(rows, budget)) <= self.threshold
            lengths[rows[passed]] = budget
            rows = rows[~passed]
        return trials.allocation(lengths)


@POLICIES.register()
class FirstPassThreshold(LinearSearch):
    """Lets a growing encoder pass over an image until the error meets the threshold (ALIT).

    Each pass adds tokens and is followed by a decoding, so ``encoder_passes`` counts one for each trial, as of an
    encoder that goes on from its last pass. Where ``reconstruct`` begins anew each time, it computes more than that. On
    a tokenizer that truncates there are no passes to save, and this is ``LinearSearch`` in steps.

    Each image stops by its own error; ALIT's official code stops a whole batch by the batch's mean, and so gives all of
    its images one length.

    Args:
        threshold: the highest distortion that will do, in the fidelity's unit; ALIT takes L1 below .07.
        tokens_per_pass: tokens that each pass adds; ALIT adds 32 up to 256.
        fidelity: how a reconstruction is measured; ``SquaredError`` unless given.
        num_tokens: n of the tokenizer; what is left of it for the last pass may be less.
        feature_dim: not read.
    """

    def __init__(
        self,
        threshold: float,
        tokens_per_pass: int,
        fidelity: Fidelity | None = None,
        *,
        num_tokens: int,
        feature_dim: int,
    ) -> None:
        budgets = [*range(tokens_per_pass, num_tokens, tokens_per_pass), num_tokens]
        super().__init__(threshold, budgets, fidelity, num_tokens=num_tokens, feature_dim=feature_dim)
