"""Convolutional blocks of the published image autoencoders.

LDM's (Rombach et al. 2022), which come from taming transformers (Esser et al. 2021), and those in which MaskGIT's VQGAN
(Chang et al. 2022) differs. Children have the names of the official checkpoints where Python allows it.

Shapes: b batch, c channels, h and w the grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from framework.nn.attention import attention

GROUPS = 32


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under their names."""
    return nn.Sequential(OrderedDict(layers))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in 32 groups, as in all published models; of fewer than 32 channels, in groups of four.

    Raises:
        ValueError: if the channels cannot be grouped so.
    """
    groups = GROUPS if channels >= GROUPS else max(channels // 4, 1)
    if channels % groups or (channels < GROUPS and channels % 4):
        raise ValueError(
            f"channels are normalised in {GROUPS} groups, into which {channels} cannot be cut: make width times each "
            f"multiplier a multiple of {GROUPS}, or one of 4 below that"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv(in_channels: int, out_channels: int, kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the grid, with zeros around it; TensorFlow's "SAME" is that for odd kernels."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input, which a 1x1 convolution brings to another width.

    ``(b, in_channels, h, w) -> (b, out_channels, h, w)``.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, bias=bias)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, bias=bias)
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else conv(in_channels, out_channels, 1, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """What is added."""
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class MaskGITBlock(ResidualBlock):
    """MaskGIT's block: no biases, and where the width changes, the 1x1 convolution reads the branch, not the input.

    So nothing of the input passes there unchanged. The released weights were trained like that.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)
        if in_channels != out_channels:
            self.shortcut = conv(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        return branch + (self.shortcut(branch) if isinstance(self.shortcut, nn.Conv2d) else x)


class SpatialAttention(nn.Module):
    """Attention of one head between all positions of a grid, added to the input, ``(b, c, h, w) -> (b, c, h, w)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query, self.key, self.value, self.out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.query, self.key, self.value)
        )
        mixed = attention(query, key, value)
        return x + self.out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Conv2d):
    """A convolution of stride 2 that halves the grid, with zeros below and to the right of it only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Every value four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Block = Callable[[int, int], nn.Module]


def stage(block: Block, in_channels: int, out_channels: int, num_blocks: int, attends: bool = False) -> nn.Sequential:
    """Blocks on one grid, ``block_0`` and so on, each followed by attention, ``attn_0``, where it ``attends``."""
    layers: dict[str, nn.Module] = {}
    for number in range(num_blocks):
        layers[f"block_{number}"] = block(in_channels if number == 0 else out_channels, out_channels)
        if attends:
            layers[f"attn_{number}"] = SpatialAttention(out_channels)
    return named(**layers)


def down_stages(
    block: Block,
    in_channels: int,
    widths: Sequence[int],
    num_blocks: int,
    attends: Sequence[bool],
    downsample: Callable[[int], nn.Module],
) -> nn.Sequential:
    """A stage for each of ``widths``, the finest first, with a ``downsample`` between one and the next."""
    down = nn.Sequential()
    for before, width, attend in zip([in_channels, *widths], widths, attends, strict=False):
        down.append(stage(block, before, width, num_blocks, attend))
    for blocks, width in zip(down[:-1], widths, strict=False):
        blocks.add_module("downsample", downsample(width))
    return down


def up_stages(block: Block, widths: Sequence[int], num_blocks: int, attends: Sequence[bool]) -> nn.Sequential:
    """The way back, coarsest first; as on the way down, number 0 of ``widths`` and of the children is the finest."""
    up, before = nn.Sequential(), widths[-1]
    for level in reversed(range(len(widths))):
        blocks = stage(block, before, widths[level], num_blocks, attends[level])
        if level > 0:
            blocks.add_module("upsample", Upsample(widths[level]))
        up.add_module(str(level), blocks)
        before = widths[level]
    return up
