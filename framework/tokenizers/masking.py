"""Masking schedules: how many tokens of each image survive a training step.

A schedule that draws for each sample takes a fixed number of random numbers for it, in the order of the batch. Two half
batches, one after the other, then get the lengths of the whole batch, and gradient accumulation equals the big batch.

Shapes: b batch, n tokens that the encoder makes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from framework.tokenizers.interface import MASKING, MaskingSchedule


class LengthRange(MaskingSchedule):
    """A schedule whose lengths lie in a range.

    Args:
        min_tokens: the shortest prefix, inclusive.
        max_tokens: the longest prefix, inclusive; ``null`` for all tokens.
    """

    def __init__(self, min_tokens: int = 1, max_tokens: int | None = None) -> None:
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {min_tokens}: a decoder needs one token to read")
        if max_tokens is not None and max_tokens < min_tokens:
            raise ValueError(f"max_tokens must be at least min_tokens ({min_tokens}), got {max_tokens}")
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens

    def longest(self, num_tokens: int) -> int:
        """The longest prefix of ``num_tokens`` tokens."""
        return num_tokens if self.max_tokens is None else self.max_tokens

    def check(self, num_tokens: int) -> None:
        """Refuse a range that does not lie within 1 to ``num_tokens``, as a ValueError."""
        longest = self.longest(num_tokens)
        if not self.min_tokens <= longest <= num_tokens:
            raise ValueError(
                f"the encoder makes {num_tokens} tokens, which does not hold the masking schedule's range "
                f"{self.min_tokens} to {longest}: change masking.min_tokens, masking.max_tokens or encoder.num_tokens"
            )


@MASKING.register()
class NestedTailMasking(LengthRange):
    """Each sample keeps a prefix of its own length, uniform over a range (AdaTok, section 4.1).

    Early tokens are kept most often, so training puts what matters most into them, and every prefix decodes.

    Args:
        min_tokens: the shortest prefix, inclusive.
        max_tokens: the longest prefix, inclusive; ``null`` for all tokens.
        full_share: share of samples that keep ``max_tokens`` whatever the draw, from 0 to 1.
    """

    def __init__(self, min_tokens: int = 1, max_tokens: int | None = None, full_share: float = 0.0) -> None:
        super().__init__(min_tokens, max_tokens)
        if not 0 <= full_share <= 1:
            raise ValueError(f"full_share is a share of samples from 0 to 1, got {full_share}")
        self.full_share = full_share

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, independent of each other and of ``progress``."""
        longest = self.longest(num_tokens)
        length, full = torch.rand(batch_size, 2, generator=generator, dtype=torch.float64).unbind(dim=1)
        drawn = self.min_tokens + (length * (longest + 1 - self.min_tokens)).long()
        return drawn.masked_fill(full < self.full_share, longest)


@MASKING.register()
class TailTokenDrop(LengthRange):
    """One length for the whole batch, uniform over a range (One-D-Piece, Miwa et al. 2025).

    As in the official code, each forward pass draws: ranks and accumulated micro-batches have lengths of their own, so
    accumulation does not equal the big batch.

    Args:
        min_tokens: the shortest prefix, inclusive.
        max_tokens: the longest prefix, inclusive; ``null`` for all tokens.
    """

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, all the same."""
        drawn = torch.randint(self.min_tokens, self.longest(num_tokens) + 1, (1,), generator=generator)
        return drawn.repeat(batch_size)


@MASKING.register()
class PowerOfTwoLengths(LengthRange):
    """Each sample keeps a power of two (FlexTok, Bachmann et al. 2025, and its official code's two draws).

    A uniform length leaves half of the samples with more than n/2 tokens; here short prefixes are trained as often.

    Args:
        min_tokens: the shortest prefix, inclusive.
        max_tokens: the longest prefix, inclusive; ``null`` for all tokens.
        draw: ``pow2`` draws uniformly from the powers of two in the range, the longest prefix being one of them;
            ``uniform_pow2`` draws uniformly from the range and rounds up to a power of two, or to the longest prefix.
    """

    def __init__(
        self, min_tokens: int = 1, max_tokens: int | None = None, draw: Literal["pow2", "uniform_pow2"] = "pow2"
    ) -> None:
        super().__init__(min_tokens, max_tokens)
        self.draw = draw

    def check(self, num_tokens: int) -> None:
        """Refuse a range that does not fit or, with ``pow2``, whose end is no power of two, as a ValueError."""
        super().check(num_tokens)
        longest = self.longest(num_tokens)
        below = _round_up(longest // 2 + 1)
        if self.draw == "pow2" and below != longest:
            raise ValueError(
                f"draw=pow2 would never keep tokens {below + 1} to {longest}, since {longest} is no power of two: set "
                f"encoder.num_tokens or masking.max_tokens to {below} or {2 * below}, or masking.draw to uniform_pow2"
            )

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, independent of each other and of ``progress``."""
        longest = self.longest(num_tokens)
        kept = range(self.min_tokens, longest + 1)
        choices = [n for n in kept if n == _round_up(n)]
        if self.draw == "uniform_pow2":
            choices = [min(_round_up(n), longest) for n in kept]
        return torch.tensor(choices)[torch.randint(len(choices), (batch_size,), generator=generator)]


@MASKING.register()
class FixedBudgets(MaskingSchedule):
    """Each sample keeps one of a few lengths, such as those that an allocation policy may choose (AdaTok).

    Args:
        budgets: the lengths.
        probabilities: of each budget, summing to 1; ``null`` for equal ones.
    """

    def __init__(self, budgets: list[int], probabilities: list[float] | None = None) -> None:
        if not budgets or min(budgets) < 1:
            raise ValueError(f"budgets must be one or more lengths of at least 1 token, got {budgets}")
        shares = [1 / len(budgets)] * len(budgets) if probabilities is None else probabilities
        if len(shares) != len(budgets) or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
            raise ValueError(
                f"probabilities must be {len(budgets)} shares that sum to 1, one for each budget, got {shares}"
            )
        self.budgets = budgets
        self.shares = shares

    def check(self, num_tokens: int) -> None:
        """Refuse budgets above ``num_tokens``, as a ValueError."""
        if max(self.budgets) > num_tokens:
            raise ValueError(
                f"the encoder makes {num_tokens} tokens, fewer than the budget {max(self.budgets)}: change "
                "masking.budgets or encoder.num_tokens"
            )

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, independent of each other and of ``progress``."""
        # The last edge is left open, so that shares which sum to 1 only nearly leave no gap.
        edges = torch.tensor(self.shares, dtype=torch.float64).cumsum(dim=0)[:-1]
        drawn = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        return torch.tensor(self.budgets)[torch.bucketize(drawn, edges, right=True)]


@MASKING.register()
class DelayedStart(MaskingSchedule):
    """Every token is kept until a point of training, and from there on another schedule decides (Semanticist,
    Wen et al. 2025).

    Args:
        schedule: what follows.
        start: where it starts, in progress of training from 0 to 1; Semanticist has epoch 50 of 400, 0.125.
    """

    def __init__(self, schedule: MaskingSchedule, start: float) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f"start is a progress of training from 0 to 1, got {start}")
        self.schedule = schedule
        self.start = start

    def check(self, num_tokens: int) -> None:
        """What the delayed schedule checks."""
        self.schedule.check(num_tokens)

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``: all ``num_tokens``, with nothing drawn, before the start."""
        schedule = FullLength() if progress < self.start else self.schedule
        return schedule.lengths(batch_size, num_tokens, progress, generator)


@MASKING.register()
class FullLength(MaskingSchedule):
    """Every sample keeps every token: an ordinary 1D tokenizer (TiTok), the baseline to truncate."""

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, all ``num_tokens``; nothing is drawn."""
        return torch.full((batch_size,), num_tokens)


def _round_up(length: int) -> int:
    """The smallest power of two that is at least ``length``."""
    return 1 << (length - 1).bit_length()
