"""Generators that are told the length before they make the first token.

Shapes: b batch, n tokens of the longest sequence, t of those of one length, d channels of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from framework.config.registry import Factory
from framework.data.token_file import TokenFile
from framework.generators.guidance import Guidance
from framework.generators.interface import Generator, GeneratorLoss, TokenSpace
from framework.generators.length_prior import EmpiricalLengthPrior, LengthPrior, equal_lengths
from framework.tokens import Tokens


class LengthFirst(Generator):
    """Lengths come from a ``LengthPrior``; sequences of one length are made together, and none has padding.

    Args:
        space: which sequences there are.
        label_dropout: share of training sequences without class.
        length_prior: where lengths come from; ``None`` for ``EmpiricalLengthPrior``.
        batch_size: sequences of the longest length at a time when generating; of shorter ones, as many tokens.

    Raises:
        ValueError: if a number does not fit.
    """

    def __init__(
        self, space: TokenSpace, label_dropout: float, length_prior: Factory[LengthPrior] | None, batch_size: int
    ) -> None:
        super().__init__(space, label_dropout)
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}")
        self.batch_size = batch_size
        self.prior: LengthPrior = (length_prior or EmpiricalLengthPrior)(space=space)

    def learn_from(self, file: TokenFile) -> None:
        """Lengths of each class."""
        self.prior.learn_from(file)

    @abstractmethod
    def token_loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        """``loss`` without what the length prior learns."""

    def loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        found, sums = self.token_loss(tokens, labels, generator), self.prior.losses(labels, tokens.lengths)
        return replace(found, losses=found.losses | {name: each / found.count for name, each in sums.items()})

    @abstractmethod
    def make(self, labels: Tensor, length: int, seed: int, sample_ids: Tensor, guidance: Guidance) -> Tensor:
        """Sequences of one length, codes ``(b, t)`` or latents ``(b, t, d)`` as the tokenizer makes them."""

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        seed: int,
        sample_ids: Tensor,
        guidance: Guidance,
        lengths: Tensor | None = None,
    ) -> Tokens:
        labels, sample_ids, lengths = self.space.checked(labels, sample_ids, lengths, self.prior.budgets.device)
        if self.training:
            raise ValueError("the generator is in training mode, which is another model: call eval() first")
        if lengths is None:
            lengths = self.prior.draw(labels, seed, sample_ids)
        continuous, shape = self.space.vocabulary is None, (len(labels), self.space.longest)
        latents = torch.zeros(*shape, self.space.dim if continuous else 0, device=labels.device)
        codes = None if continuous else labels.new_zeros(shape)
        for length, rows in equal_lengths(lengths, self.batch_size * self.space.longest):
            made = self.make(labels[rows], length, seed, sample_ids[rows], guidance)
            (latents if codes is None else codes)[rows, :length] = made
        return Tokens(latents, lengths, codes)
