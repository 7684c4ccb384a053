"""Tokens: an ordered token sequence whose prefixes decode; what every part of the framework passes on.

Shapes: b batch, n tokens in the padded sequence, d channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """A batch of token sequences, each with its own length; what stands behind a length is padding.

    Args:
        latents: what the decoder reads, ``(b, n, d)`` float.
        lengths: how many tokens of each row count, ``(b,)`` int64, each from 1 to n.
        codes: codebook indices ``(b, n)`` int64; ``None`` where tokens are continuous.

    Raises:
        ValueError: if the shapes or types do not fit each other.
    """

    latents: Tensor
    lengths: Tensor
    codes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents.ndim != 3:
            raise ValueError(f"latents must be (b, n, d), got shape {tuple(self.latents.shape)}")
        if self.lengths.shape != self.latents.shape[:1] or self.lengths.dtype != torch.int64:
            raise ValueError(
                f"lengths must be int64 of shape ({len(self.latents)},), "
                f"got {self.lengths.dtype} of shape {tuple(self.lengths.shape)}"
            )
        if self.codes is not None and self.codes.shape != self.latents.shape[:2]:
            raise ValueError(
                f"codes must have shape {tuple(self.latents.shape[:2])}, got {tuple(self.codes.shape)}"
            )

    @property
    def mask(self) -> Tensor:
        """True where a token counts: bool ``(b, n)``, a prefix of each row."""
        return torch.arange(self.latents.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.latents)

    def with_lengths(self, lengths: Tensor) -> Tokens:
        """The same sequences read up to other ``lengths`` (b,); nothing is copied."""
        return replace(self, lengths=lengths)

    def truncate(self, num_tokens: int) -> Tokens:
        """Cut the padded sequence to its first ``num_tokens`` positions and lengths to at most that."""
        return Tokens(
            self.latents[:, :num_tokens],
            self.lengths.clamp(max=num_tokens),
            None if self.codes is None else self.codes[:, :num_tokens],
        )

    def select(self, rows: Tensor) -> Tokens:
        """The given rows, by index ``(r,)`` or by bool mask ``(b,)``."""
        return Tokens(
            self.latents[rows], self.lengths[rows], None if self.codes is None else self.codes[rows]
        )

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        latents, lengths = (each.to(device, non_blocking=True) for each in (self.latents, self.lengths))
        return Tokens(latents, lengths, None if self.codes is None else self.codes.to(device, non_blocking=True))

    def padded(self, num_tokens: int) -> Tokens:
        """With zeros behind the sequences, up to ``num_tokens`` positions."""
        more = num_tokens - self.latents.shape[1]
        codes = None if self.codes is None else F.pad(self.codes, (0, more))
        return Tokens(F.pad(self.latents, (0, 0, 0, more)), self.lengths, codes)

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """The rows of all parts, at least one, padded to the longest; all or none have codes."""
        longest = max(part.latents.shape[1] for part in parts)
        parts = [part.padded(longest) for part in parts]
        codes = [part.codes for part in parts if part.codes is not None]
        latents, lengths = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "lengths"))
        return Tokens(latents, lengths, torch.cat(codes) if codes else None)
