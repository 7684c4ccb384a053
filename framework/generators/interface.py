"""What a generator promises: tokens of a class, as many as it finds right, the same whenever they are asked for.

Shapes: b batch, n tokens of the longest sequence, d channels of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from framework.config.registry import Registry
from framework.data.token_file import TokenFile
from framework.generators.guidance import Guidance
from framework.tokens import Tokens


@dataclass(frozen=True)
class TokenSpace:
    """Which sequences there are.

    Args:
        num_tokens: n, positions of the tokenizer's longest sequence.
        dim: d.
        vocabulary: number of codes; ``None`` where tokens are continuous.
        budgets: the lengths that occur, increasing; the last may be below n.
        num_classes: of labels from 0.

    Raises:
        ValueError: if a number is out of its range, or budgets do not increase.
    """

    num_tokens: int
    dim: int
    vocabulary: int | None
    budgets: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.dim, self.num_classes, 1 if self.vocabulary is None else self.vocabulary) < 1:
            raise ValueError(f"tokens, channels, codes and classes are at least one each, got {self}")
        budgets = self.budgets
        if not budgets or list(budgets) != sorted(set(budgets)) or budgets[0] < 1 or budgets[-1] > self.num_tokens:
            raise ValueError(f"budgets are lengths from 1 to {self.num_tokens} that increase, got {budgets}")

    @property
    def longest(self) -> int:
        """The longest sequence that occurs."""
        return self.budgets[-1]

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels ``(b,)`` of classes that there are not.

        Raises:
            ValueError: naming one.
        """
        if labels.is_floating_point():
            raise ValueError(f"classes are whole numbers, got {labels.dtype}")
        labels = labels.to(torch.int64)  # in smaller types the number of classes may be none
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"classes are numbers from 0 to {self.num_classes - 1}, got {int(wrong[0])}")

    def check_lengths(self, lengths: Tensor) -> None:
        """Refuse lengths ``(b,)`` that are no budgets.

        Raises:
            ValueError: naming one, and the nearest budget.
        """
        for length in sorted(set(lengths.tolist()) - set(self.budgets)):
            nearest = min(self.budgets, key=lambda budget: abs(budget - length))
            raise ValueError(f"lengths are {list(self.budgets)}, got {length}: the nearest is {nearest}")

    def checked(
        self, labels: Tensor, sample_ids: Tensor, lengths: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What ``Generator.generate`` is asked for, int64 on a device.

        Raises:
            ValueError: if a label, number or length is none, or there is not one for each.
        """
        if labels.ndim != 1 or sample_ids.shape != labels.shape:
            raise ValueError(
                f"labels and sample_ids are (b,) each, got {tuple(labels.shape)} and {tuple(sample_ids.shape)}"
            )
        self.check_labels(labels)
        if (sample_ids < 0).any():
            raise ValueError(f"sample_ids count from 0, got {int(sample_ids.min())}")
        if sample_ids.is_floating_point():
            raise ValueError(f"sample_ids are whole numbers, got {sample_ids.dtype}")
        labels, sample_ids = (values.to(device, torch.int64) for values in (labels, sample_ids))
        if lengths is None:
            return labels, sample_ids, None
        if lengths.shape != labels.shape:
            raise ValueError(f"there is one length for each of {len(labels)} labels, got {tuple(lengths.shape)}")
        self.check_lengths(lengths)
        return labels, sample_ids, lengths.to(device, torch.int64)


@dataclass(frozen=True)
class GeneratorLoss:
    """What training reads.

    Args:
        losses: named, their sum is minimised: each a sum over this batch divided by ``count``.
        count: how many tokens the batch's sequences keep, or as many of them as are predicted. What several batches
            make one step weighs by it, so that every token of the step counts the same.
        metrics: detached scalars that are only logged, means over ``count``.
        image_metrics: likewise, means over the batch's images.
        by_position: detached sums of the tokens' own loss at each position, up to the longest, for evaluations.
    """

    losses: dict[str, Tensor]
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    by_position: Tensor | None = None
    image_metrics: dict[str, Tensor] = field(default_factory=dict)


class Generator(nn.Module, ABC):
    """A distribution over token sequences given a class, and their lengths with them.

    Keyword-only argument from what owns it: ``space``.

    Args:
        space: which sequences there are.
        label_dropout: share of training sequences without class.

    Raises:
        ValueError: if that is no share.
    """

    def __init__(self, space: TokenSpace, label_dropout: float) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is a share from 0 to 1, got {label_dropout}")
        self.space, self.label_dropout = space, label_dropout

    def learn_from(self, file: TokenFile) -> None:  # noqa: B027 - most learn by steps alone
        """Told all training tokens before the first step, for what is counted and not trained, kept in buffers."""

    @abstractmethod
    def loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        """The loss of sequences with labels ``(b,)``; noise and dropped labels come from ``generator``, on the CPU.

        Padding behind a row's length changes nothing.
        """

    @abstractmethod
    def generate(
        self,
        labels: Tensor,
        *,
        seed: int,
        sample_ids: Tensor,
        guidance: Guidance,
        lengths: Tensor | None = None,
    ) -> Tokens:
        """One sequence for each label ``(b,)``, in that order, in eval mode.

        A sample is a function of (seed, its number, class, guidance, weights): neither of the batch nor of the order.

        Args:
            labels: classes, int64.
            seed: of all samples.
            sample_ids: ``(b,)`` int64 from 0, the number of each.
            guidance: away from samples without class.
            lengths: ``(b,)`` of the space's budgets, in place of those that the generator would choose.

        Returns:
            Where the space has a vocabulary, codes with latents ``(b, n, 0)``, as token files have them;
            ``tokenizer.codes_to_tokens`` adds what decoders read. Else latents, as the tokenizer makes them.

        Raises:
            ValueError: if a label, number or length is none.
        """


GENERATORS = Registry("generator", Generator)
