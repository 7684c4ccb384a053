"""A grid of values as a sequence of patches, row by row.

Shapes: b batch, c channels, p patches.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patch_grid(grid_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: if the grid is not a multiple of the patch.
    """
    rows, columns = grid_size
    if rows % patch_size or columns % patch_size:
        raise ValueError(f"patch_size must divide the input grid, got patch_size {patch_size} and {rows}x{columns}")
    return rows // patch_size, columns // patch_size


def patchify(values: Tensor, patch_size: int) -> Tensor:
    """Values ``(b, c, rows, columns)`` -> patches ``(b, p, c * patch_size^2)``."""
    return rearrange(values, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=patch_size, q=patch_size)
