"""Sizes of transformers by their published names, or of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Size(NamedTuple):
    """Width, blocks, heads."""

    width: int
    depth: int
    num_heads: int


def size_of(
    named: Mapping[str, Size], size: str | None, width: int | None, depth: int | None, num_heads: int | None
) -> Size:
    """A named size, with those numbers in its place that are given.

    Raises:
        ValueError: if one is neither given nor named, or all are given and named.
    """
    if size and width and depth and num_heads:
        raise ValueError(
            f"size {size} says width, depth and num_heads, and these are given too, {width}, {depth} and {num_heads}: "
            "set either to null"
        )
    start = named[size] if size else Size(0, 0, 0)
    chosen = Size(*(own or given for own, given in zip((width, depth, num_heads), start, strict=True)))
    if min(chosen) < 1:
        raise ValueError(f"without a size, a model needs width, depth and num_heads, at least 1 each; got {chosen}")
    return chosen
