"""Images of a class: a generator, and the tokenizer that decodes what it makes.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.generators.guidance import Guidance
from framework.generators.interface import Generator, TokenSpace
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens


def token_space(tokenizer: Tokenizer, budgets: Sequence[int], num_classes: int) -> TokenSpace:
    """The sequences of a tokenizer at some lengths.

    Raises:
        ValueError: as ``TokenSpace``.
    """
    vocabulary = tokenizer.quantizer.vocabulary
    return TokenSpace(tokenizer.num_tokens, tokenizer.token_dim, vocabulary, tuple(budgets), num_classes)


class ImageGenerator(nn.Module):
    """What a run of ``TrainGenerator`` gives.

    Args:
        generator: makes tokens.
        tokenizer: frozen; in eval mode whatever mode the generator is in.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.generator = generator
        self.tokenizer = tokenizer.eval()

    def train(self, mode: bool = True) -> ImageGenerator:
        """Set the generator's mode; the tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def num_classes(self) -> int:
        """Of labels from 0."""
        return self.generator.space.num_classes

    @property
    def budgets(self) -> tuple[int, ...]:
        """The lengths that it makes."""
        return self.generator.space.budgets

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        sample_ids: Tensor | None = None,
        guidance: Guidance | None = None,
        lengths: Tensor | None = None,
    ) -> Tokens:
        """One token sequence for each label ``(b,)``, ready to decode; see ``Generator.generate``.

        Args:
            labels: classes, int64.
            seed: of all samples.
            sample_ids: ``(b,)`` int64, the number of each; from 0 on unless given.
            guidance: none unless given.
            lengths: ``(b,)`` of ``budgets``, in place of those that the generator would choose.

        Raises:
            ValueError: if a label, number or length is none.
        """
        numbers = torch.arange(len(labels)) if sample_ids is None else sample_ids
        device = next(self.generator.parameters()).device
        tokens = self.generator.generate(
            labels.to(device),
            seed=seed,
            sample_ids=numbers.to(device),
            guidance=guidance or Guidance(),
            lengths=None if lengths is None else lengths.to(device),
        )
        return tokens if tokens.codes is None else self.tokenizer.codes_to_tokens(tokens.codes, tokens.lengths)

    @torch.no_grad()
    def decode(self, tokens: Tokens, batch_size: int = 64) -> Tensor:
        """Tokens to images ``(b, 3, h, w)`` in [0, 1], so many of similar lengths at a time."""
        order = tokens.lengths.argsort(stable=True)
        images = [self.tokenizer.decode(tokens.select(rows)) for rows in order.split(batch_size)]
        return torch.cat(images)[order.argsort()]
