"""What a decoder does about tokens behind a sample's length: one small strategy for each published answer.

``key_padding`` and ``remove`` compute the same function and save what dropped tokens would cost, the first behind the
batch's longest length, the second all of it. The others put something in a dropped token's place and always decode all
n tokens, so they save nothing: one token costs as much as n.

Shapes: b batch, n the longest token sequence, m tokens handed to the decoder (m <= n), d channels of a token, w width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.tokens import Tokens

DropMode = Literal["key_padding", "remove", "mask_token", "null_token", "zero"]
Embed = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, Tensor | None, Tensor], Tensor]


class DropStrategy(nn.Module, ABC):
    """Decodes the kept tokens; whatever stands behind a length, NaN included, changes nothing and gets no gradient.

    Args:
        token_dim: d.
        num_tokens: n.
        width: w of the decoder.
    """

    def __init__(self, *, token_dim: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    @abstractmethod
    def forward(self, tokens: Tokens, embed: Embed, decode: Decode) -> Tensor:
        """Tokens -> what ``decode`` returns, rows in the order of ``tokens``.

        Args:
            tokens: of n positions or fewer.
            embed: from latents ``(b, m, d)`` to the decoder's width, ``(b, m, w)``, positions added.
            decode: from embedded tokens ``(b, m, w)`` to values, attending where a bool mask ``(b, m)`` is True, or
                everywhere with ``None``; last come the rows' kept lengths ``(b,)``.
        """

    def padded(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Latents ``(b, n, d)``, zero behind each length, and the mask ``(b, n, 1)``, however far tokens were cut."""
        missing = (0, self.num_tokens - tokens.latents.shape[1])
        # Zeroed even where something else takes the place: a gradient of 0 times a NaN or infinity is NaN.
        latents = F.pad(zeroed(tokens), (0, 0, *missing))
        return latents, F.pad(tokens.mask, missing)[..., None]


def zeroed(tokens: Tokens) -> Tensor:
    """Latents with zeros behind each length."""
    return tokens.latents.masked_fill(~tokens.mask[..., None], 0)


class KeyPadding(DropStrategy):
    """One padded batch, cut to its longest length; dropped tokens are masked as attention keys (AdaTok, eq. 4)."""

    def forward(self, tokens: Tokens, embed: Embed, decode: Decode) -> Tensor:
        shortest, longest = torch.stack([tokens.lengths.amin(), tokens.lengths.amax()]).tolist()
        tokens = tokens.truncate(longest)
        if shortest == longest:
            return decode(embed(tokens.latents), None, tokens.lengths)
        # Weight 0 times a NaN or infinity is NaN, so dropped tokens are zeroed besides being masked.
        return decode(embed(zeroed(tokens)), tokens.mask, tokens.lengths)


class Remove(DropStrategy):
    """One dense batch for each distinct length, without the dropped tokens (One-D-Piece slices so)."""

    def forward(self, tokens: Tokens, embed: Embed, decode: Decode) -> Tensor:
        parts, rows = [], []
        for length in tokens.lengths.unique().tolist():
            chosen = (tokens.lengths == length).nonzero()[:, 0]
            parts.append(decode(embed(tokens.latents[chosen, :length]), None, tokens.lengths[chosen]))
            rows.append(chosen)
        return torch.cat(parts)[torch.cat(rows).argsort()]


class MaskToken(DropStrategy):
    """One learned vector takes the place of every dropped token's embedding, its position included (FlexTok).

    All dropped tokens are then one and the same to the decoder, which can tell how many there are, not where.
    """

    def __init__(self, *, token_dim: int, num_tokens: int, width: int) -> None:
        super().__init__(token_dim=token_dim, num_tokens=num_tokens, width=width)
        # Unit scale, like positions: nothing is added to it, and near 0 the slope of the blocks' norms is steep.
        self.dropped_token = nn.Parameter(torch.randn(width))

    def forward(self, tokens: Tokens, embed: Embed, decode: Decode) -> Tensor:
        latents, mask = self.padded(tokens)
        return decode(torch.where(mask, embed(latents), self.dropped_token), None, tokens.lengths)


class NullToken(DropStrategy):
    """A learned vector for each position takes the dropped token's place, before it is embedded (Semanticist)."""

    def __init__(self, *, token_dim: int, num_tokens: int, width: int) -> None:
        super().__init__(token_dim=token_dim, num_tokens=num_tokens, width=width)
        # Near 0, the mean of tokens, as Semanticist has it: at unit scale it would look like a token with content.
        self.null_tokens = nn.Parameter(torch.randn(num_tokens, token_dim) * 0.02)

    def forward(self, tokens: Tokens, embed: Embed, decode: Decode) -> Tensor:
        latents, mask = self.padded(tokens)
        return decode(embed(torch.where(mask, latents, self.null_tokens)), None, tokens.lengths)


class Zero(DropStrategy):
    """Dropped tokens become zeros and are embedded and positioned like any token (ElasticTok)."""

    def forward(self, tokens: Tokens, embed: Embed, decode: Decode) -> Tensor:
        return decode(embed(self.padded(tokens)[0]), None, tokens.lengths)


DROP_MODES: dict[DropMode, type[DropStrategy]] = {
    "key_padding": KeyPadding,
    "remove": Remove,
    "mask_token": MaskToken,
    "null_token": NullToken,
    "zero": Zero,
}
