"""How an autoregressive generator knows the length of a sequence, and that only budgets are lengths.

Shapes: b batch, d width of the transformer, v codes, k budgets, s positions, state t being after t tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.generators.interface import TokenSpace

LengthModeName = Literal["none", "eos", "hazard", "prefix"]


class LengthMode(nn.Module):
    """``none``: the length is not modelled. Sequences have the longest budget, unless one is asked for.

    Args:
        space: whose budgets are the lengths.
        width: d.

    Attributes:
        starts: positions before the first token: the class, and whatever else.
        entries: of the vocabulary, beyond the codes.
    """

    starts = 1
    entries = 0
    budgets: Tensor
    stops: Tensor

    def __init__(self, space: TokenSpace, width: int) -> None:
        super().__init__()
        stops = torch.zeros(space.longest + 1, dtype=torch.bool)
        stops[list(space.budgets[:-1])] = True  # at the longest there is nothing to decide
        self.register_buffer("stops", stops, persistent=False)
        self.register_buffer("budgets", torch.tensor(space.budgets), persistent=False)

    def start(self, classes: Tensor, lengths: Tensor) -> Tensor:
        """Embedded classes ``(b, d)`` -> the positions before the first token, ``(b, starts, d)``."""
        return classes[:, None]

    def mask(self, logits: Tensor, places: Tensor) -> Tensor:
        """Logits ``(r, v + entries)`` of states at ``places (r,)``, without stops where none may be."""
        return logits

    def ended(self, states: Tensor, drawn: Tensor, chances: Tensor) -> Tensor | None:
        """Which sequences end before the entry that was drawn for them, ``(r,)``; asked at budgets. ``None`` for never.

        Args:
            states: with the class, ``(r, d)``.
            drawn: entries ``(r,)``.
            chances: a random number in [0, 1) for each, ``(r,)``.
        """
        return None

    def losses(self, states: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Sums over what is said of lengths ``(b,)`` apart from the vocabulary.

        Args:
            states: from state 0 on, ``(b, s, d)``.
            starts: at the first position, ``(b, d)``.
        """
        return {}


class EndOfSequence(LengthMode):
    """``eos``: an entry of the vocabulary that ends the sequence and is never an input.

    Guidance, temperature and filters act on it as on codes.
    """

    entries = 1

    def __init__(self, space: TokenSpace, width: int) -> None:
        super().__init__(space, width)
        assert space.vocabulary is not None
        self.entry = space.vocabulary

    def ended(self, states: Tensor, drawn: Tensor, chances: Tensor) -> Tensor:
        return drawn.eq(self.entry)

    def mask(self, logits: Tensor, places: Tensor) -> Tensor:
        closed = F.pad(~self.stops[places][:, None], (logits.shape[1] - 1, 0))
        return logits.masked_fill(closed, float("-inf"))


class StopHazard(LengthMode):
    """``hazard``: a head of its own says how likely it is that a sequence which has come to a budget ends there.

    It is asked of the states with the class, so that guidance, temperature and filters do not touch it.
    """

    def __init__(self, space: TokenSpace, width: int) -> None:
        super().__init__(space, width)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def logits(self, states: Tensor) -> Tensor:
        """States ``(..., d)`` -> logits of stopping there, ``(...)`` float32."""
        return self.head(states).squeeze(-1).float()

    def ended(self, states: Tensor, drawn: Tensor, chances: Tensor) -> Tensor:
        return chances < self.logits(states).double().sigmoid()

    def losses(self, states: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        places = torch.arange(states.shape[1], device=states.device)
        asked = self.stops[places] & (places <= lengths[:, None])
        ends = (places == lengths[:, None])[asked].float()
        return {"stop": F.binary_cross_entropy_with_logits(self.logits(states[asked]), ends, reduction="sum")}


class LengthPrefix(LengthMode):
    """``prefix``: behind the class stands the length, drawn from the class alone, so that all tokens know it."""

    starts = 2

    def __init__(self, space: TokenSpace, width: int) -> None:
        super().__init__(space, width)
        self.embedding = nn.Parameter(torch.randn(len(space.budgets), width) / 2)
        self.head = nn.Linear(width, len(space.budgets), bias=False)
        nn.init.zeros_(self.head.weight)

    def embedded(self, lengths: Tensor) -> Tensor:
        """Lengths ``(b,)`` -> ``(b, d)``."""
        return self.embedding[torch.searchsorted(self.budgets, lengths)]

    def start(self, classes: Tensor, lengths: Tensor) -> Tensor:
        return torch.stack([classes, self.embedded(lengths)], dim=1)

    def logits(self, starts: Tensor) -> Tensor:
        """States at the class ``(b, d)`` -> logits of the budgets ``(b, k)`` float32."""
        return self.head(starts).float()

    def losses(self, states: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        chosen = torch.searchsorted(self.budgets, lengths)
        return {"budget": F.cross_entropy(self.logits(starts), chosen, reduction="sum")}


LENGTH_MODES: dict[LengthModeName, type[LengthMode]] = {
    "none": LengthMode,
    "eos": EndOfSequence,
    "hazard": StopHazard,
    "prefix": LengthPrefix,
}
