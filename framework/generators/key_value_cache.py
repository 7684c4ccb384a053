"""Keys and values of all positions that decoding has passed, allocated once.

Shapes: l layers, r rows, h heads, s positions, c channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from framework.nn.attention import causal_attention, mask_to_bias
from framework.nn.causal_transformer import Attend


class KeyValueCache:
    """Room for ``(l, r, h, s, c)`` keys and as many values; rows in use are the first ones.

    What an earlier sequence has left in a row needs no clearing: attention ends at the position that was just written.

    Args:
        form: l, r, h, s and c.
        device: where.
        dtype: of the numbers.
    """

    def __init__(self, form: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        # Zeros, since what is not attended to is still multiplied, by 0; the memory is not touched before it is used.
        self.entries = torch.zeros(2, *form, device=device, dtype=dtype)
        self.layers = [(self.entries[0, layer], self.entries[1, layer]) for layer in range(form[0])]

    def at(self, rows: int, position: int) -> Tensor:
        """A copy of what the first rows have at a position, ``(2, l, rows, h, c)``."""
        return self.entries[:, :, :rows, :, position].clone()

    def put(self, row: int, position: int, entries: Tensor) -> None:
        """Write ``(2, l, h, c)`` at a row's position."""
        self.entries[:, :, row, :, position] = entries

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first positions to another row."""
        self.entries[:, :, target, :, :length] = self.entries[:, :, source, :, :length]

    def prefill(self, row: int, count: int, length: int) -> list[Attend]:
        """For each layer: write positions from 0, ``length`` of each of ``count`` rows, and let each see its past."""

        def attend_in(keys: Tensor, values: Tensor) -> Attend:
            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys[row : row + count, :, :length] = key
                values[row : row + count, :, :length] = value
                return causal_attention(query, key, value)

            return attend

        return [attend_in(*layer) for layer in self.layers]


class Step:
    """One new position of each of a cache's first rows.

    Args:
        cache: whose.
        positions: of each row, from 0.
    """

    def __init__(self, cache: KeyValueCache, positions: Sequence[int]) -> None:
        self.cache = cache
        self.count, self.live = len(positions), max(positions) + 1
        self.place: int | Tensor = positions[0]
        self.rows: slice | Tensor = slice(self.count)
        self.bias: Tensor | None = None
        if min(positions) + 1 < self.live:
            device = cache.entries.device
            self.place = torch.tensor(positions, device=device)
            self.rows = torch.arange(self.count, device=device)
            self.bias = mask_to_bias(torch.arange(self.live, device=device) <= self.place[:, None])[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries, keys and values ``(r, h, c)`` of the new positions -> what they take of the past, ``(r, h, c)``.

        Only positions up to the furthest row's are read.
        """
        keys, values = self.cache.layers[layer]
        keys[self.rows, :, self.place] = key
        values[self.rows, :, self.place] = value
        heads, channels = query.shape[1:]
        past, taken = (each[: self.count, :, : self.live].flatten(0, 1) for each in (keys, values))
        scores = torch.bmm((query * channels**-0.5).view(-1, 1, channels), past.transpose(1, 2))
        if self.bias is not None:
            scores.view(self.count, heads, self.live).add_(self.bias)
        return torch.bmm(scores.softmax(dim=-1), taken).view(-1, heads, channels)


def attend_in(steps: Sequence[Step], num_layers: int) -> list[Attend]:
    """For each layer: rows of several caches, one after the other, as a batch of sequences of one position."""
    sizes = [step.count for step in steps]

    def attend_at(layer: int) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = zip(steps, *(new[:, :, 0].split(sizes) for new in (query, key, value)), strict=True)
            return torch.cat([step.attend(layer, q, k, v) for step, q, k, v in parts])[:, :, None]

        return attend

    return [attend_at(layer) for layer in range(num_layers)]
