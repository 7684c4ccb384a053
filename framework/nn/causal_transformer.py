"""Llama's transformer (Touvron et al. 2023), as LlamaGen has it: causal, pre-norm, without biases, rotary positions.

Shapes: b batch, n sequence, d width, h heads, c channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.nn.attention import causal_attention
from framework.nn.positions import rotate_pairs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``(b, h, n, c)`` of new positions -> what each takes of all that it may see, likewise."""


class FloatRMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32 whatever the input's type, which the output has too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=1e-5) * self.weight).to(x.dtype)


class CausalBlock(nn.Module):
    """Attention to the past and a gated MLP, each behind a norm and added to the residual stream.

    Matrices start at standard deviation fan_in^-0.5, and the last of each branch at 0, as in ``nn.transformer.Block``.

    Args:
        width: d.
        num_heads: h.
        hidden: channels of the MLP (SwiGLU), which has three matrices.
        qk_norm: normalise queries and keys of each head to unit root mean square.

    Raises:
        ValueError: if ``width`` is no multiple of ``2 num_heads``.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, qk_norm: bool = False) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise ValueError(f"width is a multiple of twice the heads, got width {width} and {num_heads} heads")
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.norm1 = FloatRMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = FloatRMSNorm(width)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        for matrix in (self.qkv.weight, self.up.weight):
            nn.init.normal_(matrix, std=width**-0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend = causal_attention) -> Tensor:
        """States ``(b, n, d)`` -> states.

        Args:
            rotation: for ``rotate_pairs``, broadcastable to ``(b, h, n, c / 2, 2)``; ``None`` turns nothing.
            attend: how positions see each other; one that keeps the past makes this a step of decoding.
        """
        query, key, value = rearrange(
            self.qkv(self.norm1(x)), "b n (three h c) -> three b h n c", three=3, h=self.num_heads
        )
        if self.qk_norm:
            query, key = F.rms_norm(query, query.shape[-1:]), F.rms_norm(key, key.shape[-1:])
        if rotation is not None:
            query, key = rotate_pairs(query, rotation), rotate_pairs(key, rotation)
        x = x + self.out(rearrange(attend(query, key, value), "b h n c -> b n (h c)"))
        gate, linear = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * linear)


class CausalTransformer(nn.Module):
    """A stack of blocks and a last norm, ``(b, n, d) -> (b, n, d)``.

    Attributes:
        recompute: keep only the blocks' inputs for the backward pass, which computes the rest again.
    """

    def __init__(self, width: int, depth: int, num_heads: int, hidden: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.recompute = False
        self.blocks = nn.ModuleList(CausalBlock(width, num_heads, hidden, qk_norm) for _ in range(depth))
        self.norm = FloatRMSNorm(width)

    def forward(self, x: Tensor, rotation: Tensor | None, attends: Sequence[Attend] | None = None) -> Tensor:
        """Run the blocks; ``attends`` has one for each, and without it all positions are there."""
        for number, block in enumerate(self.blocks):
            if attends is not None:
                x = block(x, rotation, attends[number])
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        return self.norm(x)
