"""Masking schedules: how many tokens of each image survive a training step.

Shapes: b batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.tokenizers.interface import MASKING, MaskingSchedule


@MASKING.register()
class NestedTailMasking(MaskingSchedule):
    """Each sample keeps a prefix of its own length, uniform over a range (AdaTok, section 4.1).

    Early tokens are kept most often, so training puts what matters most into them, and every prefix decodes.

    Args:
        min_tokens: the shortest prefix, inclusive.
        max_tokens: the longest prefix, inclusive; ``null`` for all tokens.
        full_share: share of samples that keep ``max_tokens`` whatever the draw, from 0 to 1.
    """

    def __init__(self, min_tokens: int = 1, max_tokens: int | None = None, full_share: float = 0.0) -> None:
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {min_tokens}: a decoder needs one token to read")
        if max_tokens is not None and max_tokens < min_tokens:
            raise ValueError(f"max_tokens must be at least min_tokens ({min_tokens}), got {max_tokens}")
        if not 0 <= full_share <= 1:
            raise ValueError(f"full_share is a share of samples from 0 to 1, got {full_share}")
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.full_share = full_share

    def check(self, num_tokens: int) -> None:
        """Refuse a range that does not lie within 1 to ``num_tokens``, as a ValueError."""
        longest = num_tokens if self.max_tokens is None else self.max_tokens
        if not self.min_tokens <= longest <= num_tokens:
            raise ValueError(
                f"the encoder makes {num_tokens} tokens, which does not hold the masking schedule's range "
                f"{self.min_tokens} to {longest}: change masking.min_tokens, masking.max_tokens or encoder.num_tokens"
            )

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, independent of each other and of ``progress``."""
        longest = num_tokens if self.max_tokens is None else self.max_tokens
        drawn = torch.randint(self.min_tokens, longest + 1, (batch_size,), generator=generator)
        full = torch.rand(batch_size, generator=generator) < self.full_share
        return drawn.masked_fill(full, longest)


@MASKING.register()
class FullLength(MaskingSchedule):
    """Every sample keeps every token: an ordinary 1D tokenizer (TiTok), the baseline to truncate."""

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        """Lengths ``(b,)``, all ``num_tokens``; nothing is drawn."""
        return torch.full((batch_size,), num_tokens)
