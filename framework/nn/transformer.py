"""Pre-norm transformer blocks with the switches in which the published tokenizers differ.

Shapes: b batch, n sequence, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.nn.attention import attention
from framework.nn.positions import rotate

Norm = Literal["layer", "layer_noaffine", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu2", "swiglu"]


class BlockOptions:
    """The switches of a block, shared by all blocks of a transformer.

    Args:
        norm: ``layer`` (TiTok), ``layer_noaffine`` (FlexTok) or ``rms`` (ElasticTok, LlamaGen).
        mlp: ``gelu``, ``gelu_tanh`` (its approximation, DiT's), ``relu2`` (squared ReLU, the cheapest on a CPU) or
            ``swiglu``.
        mlp_ratio: hidden width of the MLP over d; swiglu's three matrices take 2/3 of it, at equal parameters.
        bias: whether linear layers have biases.
        qk_norm: normalise queries and keys of each head to unit root mean square, which bounds the scores.
        rope_base: rotary positions along the sequence with this base; ``null`` for none.
        input_norm: normalise before the first block too, as TiTok does, whose released weights need it.
        registers: learned vectors that go through the blocks behind the sequence and are then thrown away (Darcet et
            al. 2024). All positions see them. TiTok's class token, which its encoder and decoder each have, is one.
    """

    def __init__(
        self,
        norm: Norm = "layer",
        mlp: Activation = "gelu",
        mlp_ratio: float = 4.0,
        bias: bool = True,
        qk_norm: bool = False,
        rope_base: float | None = None,
        input_norm: bool = False,
        registers: int = 0,
    ) -> None:
        self.norm = norm
        self.mlp = mlp
        self.mlp_ratio = mlp_ratio
        self.bias = bias
        self.qk_norm = qk_norm
        self.rope_base = rope_base
        self.input_norm = input_norm
        self.registers = registers


class Linear(nn.Linear):
    """A linear layer that an adapter may correct, per sample.

    ``adapter(x, route)`` maps ``(b, n, in)`` and the routes ``(b,)`` to a correction ``(b, n, out)``; without one the
    layer is the same for every sample.
    """

    adapter: nn.Module | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_module("adapter", None)

    def forward(self, x: Tensor, route: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if route is None or self.adapter is None else y + self.adapter(x, route)


def make_norm(kind: Norm, width: int) -> nn.Module:
    """A normalisation over the last dimension, by name."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-5)
    return nn.LayerNorm(width, eps=1e-5, elementwise_affine=kind == "layer")


class SelfAttention(nn.Module):
    """Multi-head self-attention ``(b, n, d) -> (b, n, d)``."""

    def __init__(self, width: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got width {width} and {num_heads} heads")
        self.num_heads = num_heads
        self.qk_norm = options.qk_norm
        self.rope_base = options.rope_base
        self.qkv = Linear(width, 3 * width, bias=options.bias)
        self.out = Linear(width, width, bias=options.bias)

    def forward(self, x: Tensor, bias: Tensor | None, route: Tensor | None) -> Tensor:
        query, key, value = rearrange(
            self.qkv(x, route), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        if self.qk_norm:
            query, key = F.rms_norm(query, query.shape[-1:]), F.rms_norm(key, key.shape[-1:])
        if self.rope_base is not None:
            query, key = rotate(query, self.rope_base), rotate(key, self.rope_base)
        mixed = attention(query, key, value, bias)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"), route)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    """The block's MLP ``(b, n, d) -> (b, n, d)``; swiglu multiplies the activated half by a linear half."""

    def __init__(self, width: int, options: BlockOptions) -> None:
        super().__init__()
        self.gated = options.mlp == "swiglu"
        hidden = int(width * options.mlp_ratio * (2 / 3 if self.gated else 1))
        self.activation = _ACTIVATIONS[options.mlp]
        self.up = Linear(width, 2 * hidden if self.gated else hidden, bias=options.bias)
        self.down = Linear(hidden, width, bias=options.bias)

    def forward(self, x: Tensor, route: Tensor | None) -> Tensor:
        hidden = self.up(x, route)
        if self.gated:
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * linear
        else:
            hidden = self.activation(hidden)
        return self.down(hidden, route)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream.

    Weights start at standard deviation fan_in^-0.5, biases at 0, and each branch's last matrix at 0, so that a block
    starts as the identity. With 0.02 throughout, small models stay for hundreds of steps at the mean colour.
    """

    def __init__(self, width: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm1 = make_norm(options.norm, width)
        self.attention = SelfAttention(width, num_heads, options)
        self.norm2 = make_norm(options.norm, width)
        self.mlp = FeedForward(width, options)
        self.apply(init_linear)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(self, x: Tensor, bias: Tensor | None = None, route: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), bias, route)
        return x + self.mlp(self.norm2(x), route)


class Transformer(nn.Module):
    """A stack of blocks and a last norm, ``(b, n, d) -> (b, n, d)``.

    Attributes:
        recompute: keep only the blocks' inputs for the backward pass, which computes the rest again.
    """

    def __init__(self, width: int, depth: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.recompute = False
        self.input_norm = make_norm(options.norm, width) if options.input_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, num_heads, options) for _ in range(depth))
        self.norm = make_norm(options.norm, width)
        self.registers = nn.Parameter(torch.randn(options.registers, width)) if options.registers else None

    def forward(self, x: Tensor, bias: Tensor | None = None, route: Tensor | None = None) -> Tensor:
        """Run the blocks.

        Args:
            x: ``(b, n, d)``.
            bias: added to attention scores, broadcastable to ``(b, h, n, n)``; see ``nn.attention.mask_to_bias``.
            route: ``(b,)`` int64, which head of its adapter each sample takes, in the layers that have one.
        """
        length = x.shape[1]
        if self.registers is not None:
            x = torch.cat([x, repeat(self.registers, "r d -> b r d", b=len(x))], dim=1)
            bias = None if bias is None else _bias_with_registers(bias, len(self.registers))
        x = self.input_norm(x)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, route, use_reentrant=False)
            else:
                x = block(x, bias, route)
        return self.norm(x[:, :length])


def _bias_with_registers(bias: Tensor, count: int) -> Tensor:
    """Everyone sees registers; these see only what all others see, or they would carry what a mask hides."""
    bias = F.pad(bias, (0, count))
    if bias.shape[-2] == 1:
        return bias
    return torch.cat([bias, bias.amin(dim=-2, keepdim=True).expand(*bias.shape[:-2], count, -1)], dim=-2)


def init_linear(module: nn.Module) -> None:
    """Fan-in initialisation of a linear or convolutional layer; other modules are left as they are."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
