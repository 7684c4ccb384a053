"""Lengths that are chosen before a sequence is made, and batches of sequences of equal length.

Shapes: b batch, k budgets, c classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.config.registry import Registry
from framework.data.token_file import TokenFile
from framework.generators.interface import TokenSpace
from framework.generators.sampling import race
from framework.runtime.hashing import hashed, purpose_key


class LengthPrior(nn.Module, ABC):
    """Which lengths sequences of a class have.

    Keyword-only argument from what owns it: ``space``, whose budgets are the lengths.
    """

    budgets: Tensor

    def __init__(self, *, space: TokenSpace) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("budgets", torch.tensor(space.budgets), persistent=False)

    def learn_from(self, file: TokenFile) -> None:
        """Told all training tokens before the first step.

        Raises:
            ValueError: if the file has no labels, classes or lengths that the space has not.
        """
        if file.labels is None:
            raise ValueError(f"{file.path} has no labels, and lengths are learned by class: encode labelled images")
        self.space.check_labels(file.labels)
        self.space.check_lengths(file.lengths)

    def losses(self, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Sums over a batch of sequences, ``(b,)`` each, for what is trained by steps."""
        return {}

    @property
    @abstractmethod
    def chances(self) -> Tensor:
        """Of each class the chance of each budget, ``(c, k)`` float64."""

    def places(self, lengths: Tensor) -> Tensor:
        """Lengths ``(b,)`` -> their numbers among the budgets."""
        return torch.searchsorted(self.budgets, lengths.to(self.budgets.device))

    @torch.no_grad()
    def draw(self, labels: Tensor, seed: int, sample_ids: Tensor) -> Tensor:
        """One length for each label ``(b,)``, a function of (seed, number, class) alone."""
        keys = hashed(purpose_key(seed, "length"), sample_ids)
        return self.budgets[race(self.chances[labels].log().float(), keys)]


LENGTH_PRIORS = Registry("length prior", LengthPrior)


@LENGTH_PRIORS.register()
class EmpiricalLengthPrior(LengthPrior):
    """How often each class has each length in the training data, smoothed towards all classes together.

    Args:
        strength: kappa of ``(n_cl + kappa p(l)) / (n_c + kappa)``: so many images of a class weigh as much as what all
            classes have in common.
        space: whose budgets are the lengths.

    Attributes:
        counts: images ``(c, k)`` int64.

    Raises:
        ValueError: if ``strength`` is not above 0.
    """

    counts: Tensor

    def __init__(self, strength: float = 50.0, *, space: TokenSpace) -> None:
        super().__init__(space=space)
        if not 0 < strength < float("inf"):
            raise ValueError(f"the strength of a length prior is a number of images above 0, got {strength}")
        self.strength = strength
        self.register_buffer("counts", torch.zeros(space.num_classes, len(space.budgets), dtype=torch.int64))

    def learn_from(self, file: TokenFile) -> None:
        """Count the rows of a file anew."""
        super().learn_from(file)
        assert file.labels is not None
        numbers = file.labels * len(self.budgets) + self.places(file.lengths).cpu()
        self.counts.copy_(torch.bincount(numbers, minlength=self.counts.numel()).view_as(self.counts))

    @property
    def chances(self) -> Tensor:
        """Smoothed shares, ``(c, k)`` float64.

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


@LENGTH_PRIORS.register()
class PredictedLength(LengthPrior):
    """A layer over a few channels of each class, trained together with the generator.

    Classes with similar lengths come to share what they have learned, where a count knows only a class and all of them:
    it is for many classes of few images each.

    Args:
        width: channels of a class; few of them make classes share more, and many learn the training images by heart.
        space: whose budgets are the lengths.

    Raises:
        ValueError: if ``width`` is below 1.
    """

    def __init__(self, width: int = 16, *, space: TokenSpace) -> None:
        super().__init__(space=space)
        if width < 1:
            raise ValueError(f"the width of a length prior is 1 or more, got {width}")
        self.class_embedding = nn.Parameter(torch.randn(space.num_classes, width) / 2)
        self.head = nn.Linear(width, len(space.budgets))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def losses(self, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Cross entropy of the budgets; the labels are never dropped, as lengths are not guided."""
        logits = self.head(F.embedding(labels, self.class_embedding)).float()
        return {"budget": F.cross_entropy(logits, self.places(lengths), reduction="sum")}

    @property
    def chances(self) -> Tensor:
        """What is predicted now, ``(c, k)`` float64."""
        return self.head(self.class_embedding).double().softmax(dim=1)


def equal_lengths(lengths: Tensor, num_tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Every length that occurs in ``lengths (b,)``, with the numbers of rows that have it.

    Args:
        num_tokens: at most so many are in a batch, unless a single row has more.
    """
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        yield from ((length, some) for some in rows.split(max(1, num_tokens // length)))
