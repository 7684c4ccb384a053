"""How much of a codebook is in use.

Shapes: K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.nn.between_steps import LearnsBetweenSteps, share_of_step

DECAY = 0.99
DEAD_BELOW = 0.01
COLLAPSED_BELOW = 0.1


class CodeUsage(LearnsBetweenSteps):
    """The share of each code among the tokens of the last hundred or so training steps.

    Perplexity is the exponential of the shares' entropy: K where all codes are equally common, 1 where there is one. A
    code is dead when its share is below a hundredth of an equal one, 1 / K; usage is the share of codes that are not.

    Args:
        vocabulary: K.

    Attributes:
        share: ``(K,)``, sums to 1 once there was a step.
        steps: so many steps were taken in.
    """

    share: Tensor
    steps: Tensor
    pending: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("share", torch.full((vocabulary,), 1 / vocabulary))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending", torch.zeros(vocabulary), persistent=False)

    @torch.no_grad()
    def collect(self, codes: Tensor) -> None:
        """Count codes of any shape, in training mode."""
        flat = codes.flatten()
        self.pending.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))

    def averaged(self) -> list[Tensor]:
        return [self.pending]

    def learn(self) -> None:
        total = self.pending.sum()
        self.steps += (total > 0).long()
        weight = share_of_step(self.steps, total > 0, 1 - DECAY)
        self.share.lerp_(self.pending / total.clamp(min=1), weight)
        self.pending.zero_()

    @property
    def dead(self) -> Tensor:
        """Which codes are dead, bool ``(K,)``."""
        return self.share < DEAD_BELOW / self.vocabulary

    def metrics(self) -> dict[str, Tensor]:
        """``usage`` from 0 to 1, ``perplexity`` from 1 to K and ``dead_codes``, scalars."""
        dead = self.dead.sum()
        perplexity = torch.special.entr(self.share).sum().exp()
        return {"usage": 1 - dead / self.vocabulary, "perplexity": perplexity, "dead_codes": dead}

    def alarm(self) -> str | None:
        """What is wrong, in words, when the perplexity has fallen below a tenth of K; nothing in the first steps."""
        if self.steps < 1 / (1 - DECAY):
            return None
        numbers = {name: value.item() for name, value in self.metrics().items()}
        if numbers["perplexity"] >= COLLAPSED_BELOW * self.vocabulary:
            return None
        return (
            f"the codebook has collapsed: tokens use it as if it had {numbers['perplexity']:.1f} of its "
            f"{self.vocabulary} codes, and {numbers['dead_codes']:.0f} are dead. If it does not recover: fewer codes, "
            "a lower learning rate, or a quantizer that sees to it (FiniteScalarQuantizer with bound erf, "
            "VectorQuantizer with standardize and restart_dead)"
        )
