"""Llama's transformer (Touvron et al. 2023), as LlamaGen has it: causal, pre-norm, without biases, rotary positions.

Shapes: b batch, n sequence, d width, h heads, c channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
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
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, eps=1e-5).to(x.dtype)


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
            rotation: for ``rotate_pairs``, ``(n, c / 2, 2)`` or ``(b, n, c / 2, 2)``; ``None`` turns nothing.
            attend: how positions see each other; one that keeps the past makes this a step of decoding.
        """
        # Few and large operations: decoding a small model takes as long as they are many.
        queries_keys, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=2)
        if self.qk_norm:
            queries_keys = F.rms_norm(queries_keys, queries_keys.shape[-1:])
        if rotation is not None:
            queries_keys = rotate_pairs(queries_keys, rotation[..., None, None, :, :])
        query, key = queries_keys.transpose(1, 3).unbind(2)
        mixed = attend(query, key, value.squeeze(2).transpose(1, 2))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
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
