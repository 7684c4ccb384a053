"""Positions: sine-cosine tables on a grid and their resizing, and rotary positions along a sequence.

Shapes: n sequence, d channels, b batch, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def sincos_1d(positions: Tensor, width: int, max_period: float = 100.0) -> Tensor:
    """Sines, then cosines, of positions ``(n,)`` at geometric frequencies: ``(n, width)``, of unit mean square.

    After Vaswani et al. 2017, with a shorter longest period: an image has tens of positions a side, and with text's
    10,000 most channels would hardly change from one to the next.
    """
    frequencies = max_period ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float() * 2**0.5


def sincos_2d(grid: tuple[int, int], width: int, max_period: float = 100.0) -> Tensor:
    """A table for a grid in row-major order, half the channels for rows, half for columns: ``(rows * columns, width)``.

    Raises:
        ValueError: if ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions on a grid need a width that is a multiple of 4, got {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    half = width // 2
    return torch.cat(
        [sincos_1d(rows.flatten(), half, max_period), sincos_1d(columns.flatten(), half, max_period)], dim=1
    )


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A table of positions for another grid, by bicubic interpolation, antialiased along sides that shrink.

    Args:
        table: ``(rows * columns, width)`` in row-major order; an unchanged grid gives back the same values.
        old_grid: rows and columns of the table.
        new_grid: rows and columns of the result.

    Raises:
        ValueError: if the table has another number of positions than its grid.
    """
    if len(table) != old_grid[0] * old_grid[1]:
        raise ValueError(f"a grid of {old_grid[0]}x{old_grid[1]} does not fit a table of {len(table)} positions")
    if old_grid == new_grid:
        return table.clone()
    image = rearrange(table, "(rows columns) w -> 1 w rows columns", rows=old_grid[0])
    resized = F.interpolate(image.float(), size=new_grid, mode="bicubic", antialias=True)
    return rearrange(resized, "1 w rows columns -> (rows columns) w").to(table.dtype)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions along the sequence, pairs taken as (first half, second half) of the channels.

    ``x`` is ``(b, h, n, d)`` with even d; position i turns pair j by ``i * base^(-2j/d)`` (Su et al. 2021).
    """
    half = x.shape[-1] // 2
    frequencies = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = rearrange(x, "b h n (two d) -> two b h n d", two=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_1d(num_positions: int, width: int, base: float) -> Tensor:
    """Cosines and sines for ``rotate_pairs`` along a sequence, ``(n, width / 2, 2)``.

    At position i, pair j turns by ``i base^(-2j/width)`` (Su et al. 2021).
    """
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotary_2d(side: int, width: int, base: float) -> Tensor:
    """The same for a square grid in row-major order, ``(side^2, width / 2, 2)``: the first half of the pairs turns with
    the row, the second with the column (LlamaGen).

    Raises:
        ValueError: if ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"rotary positions on a grid need heads of a multiple of 4 channels, got {width}")
    line = rotary_1d(side, width // 2, base)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([line[rows.flatten()], line[columns.flatten()]], dim=1)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channels of ``x (..., d)`` as pairs by angles of ``table (..., d / 2, 2)``, which broadcasts.

    Llama's layout, where ``rotate`` has GPT-NeoX's. A row of zeros makes zeros.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.to(x.dtype).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
