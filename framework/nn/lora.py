"""Low-rank corrections of a linear layer, several of them, of which each sample takes one.

LoRA (Hu et al. 2022) with a head for each range of token lengths, as in AdaTok-D. Each sample's matrices are gathered.
The alternative, one product with the matrices of all heads and a mask, does more arithmetic in larger pieces, and its
cost grows with the heads. Training on a CPU in bfloat16, through the four layers of a block, it takes 12% less time at
width 128, rank 8, 4 heads and 64 samples of 32 positions (6% of projects/adatok/ntm.yaml's step), but 10% more at width
512, rank 16, 8 heads and 8 samples of 512.

Shapes: b batch, n sequence, h heads, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankHeads(nn.Module):
    """The ``adapter`` of a ``nn.transformer.Linear``: alpha / r times x A B, with the A and B of each sample's head.

    B starts at zero, so every head starts by correcting nothing. A ``(h, in, r)`` and B ``(h, r, out)`` are 3-D, which
    leaves them to AdamW where Muon trains matrices, and no other parameter's name ends in A or B: the glob ``*[!AB]``
    is everything but adapters.

    Args:
        in_features: of the linear layer.
        out_features: likewise.
        num_heads: h.
        rank: r.
        alpha: scale of the corrections, over r.
    """

    def __init__(self, in_features: int, out_features: int, num_heads: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(num_heads, in_features, rank) * in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(num_heads, rank, out_features))

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        """Inputs ``(b, n, in)`` and each sample's head ``(b,)`` int64 -> corrections ``(b, n, out)``."""
        # Not A[route], whose gradients on several threads add up in an order that differs from run to run.
        return (x @ self.A.index_select(0, route) * self.scale) @ self.B.index_select(0, route)

    def weight(self, head: int) -> Tensor:
        """What one head adds to the layer's weight, ``(out, in)``."""
        return (self.A[head] @ self.B[head]).T * self.scale
