"""Lengths that are chosen before a sequence is made, and batches of sequences of equal length.

Shapes: b batch, k budgets, c classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from framework.data.token_file import TokenFile
from framework.generators.interface import TokenSpace
from framework.generators.sampling import race
from framework.runtime.hashing import hashed, purpose_key


class EmpiricalLengthPrior(nn.Module):
    """How often each class has each length in the training data, smoothed towards all classes together.

    Args:
        space: whose budgets are the lengths.
        strength: kappa of ``(n_cl + kappa p(l)) / (n_c + kappa)``: so many images of a class weigh as much as what all
            classes have in common.

    Attributes:
        counts: images ``(c, k)`` int64.

    Raises:
        ValueError: if ``strength`` is not above 0.
    """

    counts: Tensor
    budgets: Tensor

    def __init__(self, space: TokenSpace, strength: float = 50.0) -> None:
        super().__init__()
        if not 0 < strength < float("inf"):
            raise ValueError(f"the strength of a length prior is a number of images above 0, got {strength}")
        self.space, self.strength = space, strength
        self.register_buffer("counts", torch.zeros(space.num_classes, len(space.budgets), dtype=torch.int64))
        self.register_buffer("budgets", torch.tensor(space.budgets), persistent=False)

    def learn_from(self, file: TokenFile) -> None:
        """Count the rows of a file anew.

        Raises:
            ValueError: if it has no labels, classes or lengths that the space has not.
        """
        if file.labels is None:
            raise ValueError(f"{file.path} has no labels, and lengths are learned by class: encode labelled images")
        self.space.check_labels(file.labels)
        self.space.check_lengths(file.lengths)
        places = torch.searchsorted(self.budgets.cpu(), file.lengths)
        numbers = file.labels * len(self.budgets) + places
        self.counts.copy_(torch.bincount(numbers, minlength=self.counts.numel()).view_as(self.counts))

    @property
    def chances(self) -> Tensor:
        """Of each class the chance of each budget, ``(c, k)`` float64.

        Raises:
            ValueError: if nothing was learned.
        """
        counts = self.counts.double()
        if not len(self.budgets) > 1:
            return torch.ones_like(counts)
        if not counts.any():
            raise ValueError("the length prior has seen no data: train first (learn_from), or give lengths")
        prior = counts.sum(0) / counts.sum()
        return (counts + self.strength * prior) / (counts.sum(1, keepdim=True) + self.strength)

    def draw(self, labels: Tensor, seed: int, sample_ids: Tensor) -> Tensor:
        """One length for each label ``(b,)``, a function of (seed, number, class) alone."""
        keys = hashed(purpose_key(seed, "length"), sample_ids)
        return self.budgets[race(self.chances[labels].log().float(), keys)]


def equal_lengths(lengths: Tensor, num_tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Every length that occurs in ``lengths (b,)``, with the numbers of rows that have it.

    Args:
        num_tokens: at most so many are in a batch, unless a single row has more.
    """
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        yield from ((length, some) for some in rows.split(max(1, num_tokens // length)))
