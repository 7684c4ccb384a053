"""DiT's transformer (Peebles and Xie 2023): blocks that a condition shifts, scales and gates.

Shapes: b batch, n sequence, d width.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.nn.transformer import BlockOptions, FeedForward, SelfAttention, init_linear


class TimeEmbedding(nn.Module):
    """Times ``(b,)`` from 0 to 1000 -> ``(b, d)``: cosines and sines of 128 frequencies through an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.apply(init_linear)

    def forward(self, times: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(128, device=times.device) * (-log(10_000) / 128))
        angles = times.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedded: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return embedded


class AdaptiveNorm(nn.LayerNorm):
    """Layer normalisation whose scale and shift are given, ``(b, 1, d)`` each."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return torch.addcmul(shift, super().forward(x), 1 + scale)


class AdaptiveBlock(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream through a gate (adaLN-Zero).

    Gates start at 0, so that a block starts as the identity; matrices start at standard deviation fan_in^-0.5.
    """

    def __init__(self, width: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(width), AdaptiveNorm(width)
        self.attention = SelfAttention(width, num_heads, options)
        self.mlp = FeedForward(width, options)
        self.modulation = nn.Linear(width, 6 * width)
        self.apply(init_linear)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor, bias: Tensor | None = None) -> Tensor:
        """States ``(b, n, d)`` -> states; ``condition`` is ``(b, d)``, behind its activation."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attention(self.norm1(x, shift1, scale1), bias, None))
        return torch.addcmul(x, gate2, self.mlp(self.norm2(x, shift2, scale2), None))


class AdaptiveTransformer(nn.Module):
    """A stack of blocks and a last norm, ``(b, n, d) -> (b, n, d)``, all of which read one condition.

    Args:
        width: d.
        depth: blocks.
        num_heads: of a block.
        options: ``mlp``, ``mlp_ratio``, ``qk_norm`` and ``rope_base`` of the blocks; norms are layer norms.

    Attributes:
        recompute: keep only the blocks' inputs for the backward pass, which computes the rest again.
    """

    def __init__(self, width: int, depth: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.recompute = False
        self.blocks = nn.ModuleList(AdaptiveBlock(width, num_heads, options) for _ in range(depth))
        self.norm = AdaptiveNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the blocks.

        Args:
            x: ``(b, n, d)``.
            condition: ``(b, d)``.
            bias: added to attention scores, broadcastable to ``(b, h, n, n)``; see ``nn.attention.mask_to_bias``.
        """
        condition = nn.functional.silu(condition)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, bias, use_reentrant=False)
            else:
                x = block(x, condition, bias)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        normed: Tensor = self.norm(x, shift, scale)
        return normed
