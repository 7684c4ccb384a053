"""Halving a grid without aliasing.

Shapes: b batch, c channels, h and w a grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad


class BlurPool(nn.Module):
    """Every second position of a blurred grid (Zhang 2019, arXiv:1904.11486).

    Args:
        taps: of the blur along each side, such as (1, 2, 1).
        padding: positions added at each border.
        mode: what is in them.
    """

    kernel: Tensor

    def __init__(self, taps: tuple[int, ...], padding: int, mode: Literal["reflect", "constant"]) -> None:
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        self.register_buffer("kernel", torch.outer(line, line), persistent=False)
        self.padding = padding
        self.mode = mode

    def forward(self, values: Tensor) -> Tensor:
        """``(b, c, h, w)`` -> about half as high and wide."""
        channels = values.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)
        return conv2d(pad(values, [self.padding] * 4, self.mode), kernel, stride=2, groups=channels)
