"""Trading compile time for speed, and time for memory, in a transformer's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from framework.nn.adaptive_transformer import AdaptiveBlock, AdaptiveTransformer
from framework.nn.causal_transformer import CausalBlock, CausalTransformer
from framework.nn.transformer import Block, Transformer


@contextmanager
def compiled_blocks(module: nn.Module, backend: str | Callable[..., object] = "inductor") -> Iterator[None]:
    """Inside, every transformer block of ``module`` runs compiled; its names and weights are those it had before.

    Blocks of one form share their machine code. Sizes are symbols from the start (``dynamic=True``), since the
    decoder's sequence is as long as the longest prefix of its batch: with fixed sizes each length would be compiled
    anew, and torch gives up after eight. So a run compiles twice, with and without padded keys.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block | CausalBlock | AdaptiveBlock)]
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # torch has no other way back


def recompute_blocks(module: nn.Module) -> None:
    """Have every transformer in ``module`` keep its blocks' inputs only, and compute the rest again going backward."""
    for part in module.modules():
        if isinstance(part, Transformer | CausalTransformer | AdaptiveTransformer):
            part.recompute = True
