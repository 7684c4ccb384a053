"""What a decoder does about tokens behind a sample's length.

Each strategy runs ``decode(tokens, mask)``, where ``mask`` is bool ``(b, n)`` or ``None`` for "all tokens count".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from framework.tokens import Tokens

DropMode = Literal["key_padding", "remove"]
Decode = Callable[[Tokens, Tensor | None], Tensor]


def key_padding(decode: Decode, tokens: Tokens) -> Tensor:
    """One padded batch, cut to its longest length; dropped tokens are masked as attention keys (AdaTok, eq. 4)."""
    shortest, longest = torch.stack([tokens.lengths.amin(), tokens.lengths.amax()]).tolist()
    tokens = tokens.truncate(longest)
    return decode(tokens, None if shortest == longest else tokens.mask)


def remove(decode: Decode, tokens: Tokens) -> Tensor:
    """One dense batch for each distinct length, without the dropped tokens (One-D-Piece slices so)."""
    parts, rows = [], []
    for length in tokens.lengths.unique().tolist():
        chosen = (tokens.lengths == length).nonzero()[:, 0]
        parts.append(decode(tokens.select(chosen).truncate(length), None))
        rows.append(chosen)
    return torch.cat(parts)[torch.cat(rows).argsort()]


DROP_MODES: dict[DropMode, Callable[[Decode, Tokens], Tensor]] = {"key_padding": key_padding, "remove": remove}
