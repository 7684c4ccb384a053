"""Heads: from the decoder's states at positions to values of the output space.

Shapes: b batch, p positions, w width, c channels.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from framework.nn.transformer import init_linear
from framework.tokenizers.interface import HEADS, Head


@HEADS.register()
class PixelShuffleHead(Head):
    """Each position's state becomes its patch by one linear layer, as in TiTok's single-stage decoder.

    Args:
        width: w of the decoder.
        out_channels: c of the output space.
        patch_size: side of a patch.
    """

    def __init__(self, *, width: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.to_patch = nn.Linear(width, out_channels * patch_size**2)
        init_linear(self.to_patch)

    def forward(self, states: Tensor, positions: tuple[int, int]) -> Tensor:
        """States ``(b, p, w)`` -> values ``(b, c, rows * patch, columns * patch)``."""
        return rearrange(
            self.to_patch(states),
            "b (rows columns) (c p q) -> b c (rows p) (columns q)",
            rows=positions[0],
            p=self.patch_size,
            q=self.patch_size,
        )
