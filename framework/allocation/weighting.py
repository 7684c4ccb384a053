"""Weightings: one reward out of fidelity and efficiency, in place of prices that are tuned by hand.

Each term is divided by one global scale: what the choice among the budgets changes in it, from an image's worst budget
to its best, averaged over images. Scaling each image by its own range would make every image look alike, and all of
them would get one length.

Shapes: b batch, g candidate budgets. Pairs ``(2,)`` hold fidelity first, then efficiency.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from framework.config.registry import Registry


class Weighting(nn.Module, ABC):
    """Scaled terms, weighted and summed.

    The scales are averages over batches seen in training mode: over all of them while they are few, and exponential
    later. Before any they are 1. They are saved with the module.

    Args:
        momentum: how much of an average a batch leaves, from 0 (the last batch alone) to below 1.

    Raises:
        ValueError: if the momentum is outside that.
    """

    scales: Tensor
    batches: Tensor

    def __init__(self, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is a share of the running average, from 0 to below 1; got {momentum}")
        self.momentum = momentum
        self.register_buffer("scales", torch.ones(2))
        self.register_buffer("batches", torch.zeros(()))

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """The pair ``(2,)`` of weights in use, which sum to 1."""

    def forward(self, fidelity: Tensor, efficiency: Tensor) -> Tensor:
        """Two terms ``(b, g)``, more being better, -> one reward ``(b, g)``; training mode first learns from them."""
        terms = torch.stack([fidelity, efficiency])
        if self.training:
            self.batches += 1
            self.observe(terms.detach())
        return self.combine(terms)

    def combine(self, terms: Tensor) -> Tensor:
        """Terms ``(2, b, g)`` -> their weighted sum ``(b, g)``."""
        factors = (self.weights / self._safe_scales).to(terms)
        return (factors[:, None, None] * terms).sum(dim=0)

    def observe(self, terms: Tensor) -> None:
        """Learn from terms ``(2, b, g)``."""
        self._average(self.scales, terms.amax(dim=2) - terms.amin(dim=2))

    def metrics(self) -> dict[str, float]:
        """The weight of fidelity."""
        return {"weight_fidelity": self.weights[0].item()}

    @property
    def _safe_scales(self) -> Tensor:
        """Scales without zeros, which stand where all budgets are alike."""
        return self.scales.masked_fill(self.scales == 0, 1)

    def _average(self, running: Tensor, values: Tensor) -> None:
        """Moves a running pair towards the mean of ``values (2, b)``."""
        rate = (1 / self.batches).clamp(min=1 - self.momentum)
        running += rate * (values.mean(dim=1).to(running) - running)


WEIGHTINGS = Registry("weighting", Weighting)


@WEIGHTINGS.register()
class FixedWeights(Weighting):
    """Constant weights on the scaled terms.

    Args:
        fidelity: weight of fidelity, from 0 to 1; efficiency has the rest.
        momentum: of the scales.

    Raises:
        ValueError: if the weight is outside [0, 1], or the momentum outside [0, 1).
    """

    def __init__(self, fidelity: float = 0.5, momentum: float = 0.99) -> None:
        super().__init__(momentum)
        if not 0 <= fidelity <= 1:
            raise ValueError(f"fidelity is a weight from 0 to 1, got {fidelity}")
        self.fidelity = fidelity

    @property
    def weights(self) -> Tensor:
        """The pair ``(2,)`` as given."""
        return self.scales.new_tensor([self.fidelity, 1 - self.fidelity])


@WEIGHTINGS.register()
class DynamicParetoWeighting(Weighting):
    """Weights of the Nash bargain between fidelity and efficiency. AdaTok-D names Dynamic Pareto Weighting, but its
    abstract, which is all we know, has no equation; this is our choice.

    Let U_i(w) be what objective i gains over each image's worst budget when every image takes its best budget under
    weights w, averaged over images and divided by the objective's scale: from 0, all at their worst, to 1, all at their
    best, and 1 - U_i is its regret. Nash's solution (1950) is the point of the Pareto front with the largest
    product of gains U_1 U_2. Where log U_1 + log U_2 is stationary along the front, sum_i dU_i / U_i = 0; the
    point where every image maximises sum_i w_i u_i has sum_i w_i dU_i = 0. Both hold at once when::

        w_i ~ 1 / U_i = 1 / (1 - regret_i)

    These weights are fed back into U_i(w), with running averages of the gains. A term that is gaining little weighs
    more and so gains more: the feedback is negative, and the weights settle. No unit or price changes the solution. The
    gains are those of the best budgets under w, where a policy is heading, not of the policy as it is now: the
    reward then stands still while the policy learns.

    Min-norm weights (MGDA) are not offered. For two opposed gradients they are inverse to the gradients' sizes, so that
    fidelity weighs least at short lengths, where its curve is steepest and each token matters most. Nothing then brings
    lengths back which drift down, and when measured they ran to the shortest. Gradient-norm weights did likewise.

    Args:
        momentum: of scales and gains.
        min_weight: no term weighs less, from 0 to 0.5; 0.5 makes the weights constant.

    Raises:
        ValueError: if ``min_weight`` is outside [0, 0.5], or the momentum outside [0, 1).
    """

    gains: Tensor

    def __init__(self, momentum: float = 0.99, min_weight: float = 0.1) -> None:
        super().__init__(momentum)
        if not 0 <= min_weight <= 0.5:
            raise ValueError(f"min_weight is a share of the two weights, from 0 to 0.5; got {min_weight}")
        self.min_weight = min_weight
        self.register_buffer("gains", torch.zeros(2))

    @property
    def weights(self) -> Tensor:
        """The pair ``(2,)``; equal before any batch was seen."""
        # The small number makes the weights equal where there is no gain at all.
        other = (self.gains / self._safe_scales + 1e-6).flip(0)
        return (other / other.sum()).clamp(self.min_weight, 1 - self.min_weight)

    def observe(self, terms: Tensor) -> None:
        """Learn from terms ``(2, b, g)``: the scales, then the gains at the best budgets under today's weights."""
        super().observe(terms)
        best = self.combine(terms).argmax(dim=1, keepdim=True)
        chosen = terms.gather(2, best.expand(2, -1, 1)).squeeze(2)
        self._average(self.gains, chosen - terms.amin(dim=2))

    def metrics(self) -> dict[str, float]:
        """Also both regrets, from 0 to 1."""
        regrets = (1 - self.gains / self._safe_scales).tolist()
        return super().metrics() | {"regret_fidelity": regrets[0], "regret_efficiency": regrets[1]}
