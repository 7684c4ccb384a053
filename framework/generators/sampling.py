"""From logits to a drawn code: temperature, the filters, and a race with counted random numbers.

Shapes: r rows, v entries of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.runtime.hashing import hashed, unit_of


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn.

    Args:
        temperature: divides the logits; 0 takes the likeliest.
        top_k: draw among the k likeliest only; ``null`` for all.
        top_p: of these, among the likeliest that together reach this probability, at least one (Holtzman et al. 2020).

    Raises:
        ValueError: if a number is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(f"the temperature is 0, for the likeliest, or from 1e-6; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is a number of codes from 1, or null for all; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is above 0 and at most 1, got {self.top_p}")

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits ``(r, v)`` with those that are not drawn from at minus infinity; equals of the k-th all stay."""
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            ordered, places = logits.sort(dim=1, descending=True)
            before = ordered.softmax(dim=1).cumsum(dim=1).roll(1, dims=1)
            before[:, 0] = 0
            logits = logits.masked_fill((before > self.top_p).scatter(1, places, before > self.top_p), float("-inf"))
        return logits

    def draw(self, logits: Tensor, keys: Tensor) -> Tensor:
        """One entry for each row ``(r,)`` int64 of logits ``(r, v)`` float32; ``keys (r,)`` decide, see ``race``."""
        if self.temperature == 0:
            return logits.argmax(dim=1)
        return race(self.filtered(logits / self.temperature), keys)


def race(logits: Tensor, keys: Tensor) -> Tensor:
    """Draw from ``softmax(logits)``: entries arrive at exponential times of their rates, and the first one is drawn.

    No probabilities are computed. The times are hashes of (key, entry), so that a draw depends on its row alone, and
    logits that differ in their last digits change it only where two arrive together.

    Args:
        logits: ``(r, v)``.
        keys: ``(r,)`` int64 from ``hashed``.
    """
    entries = torch.arange(logits.shape[1], device=logits.device)
    # Near 0, where the race is decided, floats are dense: -log(1 - u) keeps their digits.
    times = unit_of(hashed(keys[:, None], entries)).float().neg_().log1p_().neg_()
    # A time may round to infinity, and its entry be the only one that the filters have left.
    return (logits - times.clamp_(1e-30, 40.0).log_()).argmax(dim=1)
