"""Rewards: how good it is to keep L tokens of an image.

They stand for the information bottleneck of AdaTok's eq. 1, ``alpha I(X; Z) - I(Y; Z)``, with its sign turned: Z are
the kept tokens and Y the reconstruction. Fidelity, minus the distortion, stands for I(Y; Z), what the tokens tell of
the image; the length, at a fixed number of bits a token, bounds I(X; Z), what they cost.

A distortion may be the mean squared error, a perceptual distance or a classifier's loss: smaller is better.

Shapes: b batch, g candidate budgets, n tokens of the longest sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from framework.allocation.weighting import Weighting
from framework.config.registry import Registry


class Reward(nn.Module, ABC):
    """What each candidate budget is worth to each image; a module, since weightings keep running state."""

    @abstractmethod
    def forward(self, distortions: Tensor, budgets: Tensor, num_tokens: int) -> Tensor:
        """Distortions ``(b, g)`` of reconstructions from ``budgets (g,)`` tokens -> rewards ``(b, g)``, same dtype."""

    def metrics(self) -> dict[str, float]:
        """Numbers to log about the reward itself."""
        return {}


REWARDS = Registry("reward", Reward)


def efficiency(distortions: Tensor, budgets: Tensor, num_tokens: int) -> Tensor:
    """The share of tokens saved, 1 - L/n, as ``(b, g)`` in [0, 1)."""
    return (1 - budgets.to(distortions) / num_tokens).expand_as(distortions)


@REWARDS.register()
class ContinuousReward(Reward):
    """``-alpha * distortion - beta * L/n`` (AdaTok, eq. 6).

    Concave, and so unimodal, wherever the distortion is convex in the length (appendix B.2).

    Args:
        alpha: price of a distortion of 1; it weighs I(Y; Z), the reverse of eq. 1's alpha.
        beta: price of all n tokens; it weighs I(X; Z).

    Raises:
        ValueError: if a price is negative.
    """

    def __init__(self, alpha: float = 20.0, beta: float = 0.2) -> None:
        super().__init__()
        if min(alpha, beta) < 0:
            raise ValueError(f"alpha and beta are prices of at least 0, got {alpha} and {beta}: eq. 6 subtracts them")
        self.alpha = alpha
        self.beta = beta

    def forward(self, distortions: Tensor, budgets: Tensor, num_tokens: int) -> Tensor:
        """Rewards ``(b, g)``, at most 0."""
        return -self.alpha * distortions - self.beta * (1 - efficiency(distortions, budgets, num_tokens))


@REWARDS.register()
class ThresholdReward(Reward):
    """First be good enough, then be short (AdaTok, eq. 7), smoothed by a sigmoid.

    With s = sigmoid((threshold - distortion) / (tau * threshold)), the reward is::

        s * (1 + 1 - L/n)  -  (1 - s) * gamma * max(distortion - threshold, 0)

    The 1 and the penalty stand for I(Y; Z), asked for up to the threshold only; the bonus 1 - L/n stands for I(X; Z),
    and counts only where the quality is met.

    What the paper says of it needs care. Along a falling curve the hard form jumps by 2 - L*/n at the first length L*
    that passes, though appendix B.3 argues as if it were continuous there. The two intervals of B.3 are reversed: the
    quality is met from L* on, not up to L*. And it is not strictly concave, since one piece is linear and a jump is not
    concave. What holds is that the hard form is unimodal with its maximum at L* wherever the distortion falls with the
    length; it needs no convexity, but where a longer prefix is worse than a shorter one, it may pass more than once.
    The smoothed form is a smooth mountain around L* that also pays for some margin below the threshold. Although the
    text speaks of a penalty on tokens where the target is missed, eq. 7 has none, and neither has this.

    Args:
        threshold: the largest distortion that is good enough; the paper has a squared error of 0.02, images in [0, 1].
        gamma: price of a distortion of 1 above it.
        tau: width of the sigmoid, as a share of the threshold; 0 for the hard form of eq. 7.

    Raises:
        ValueError: if the threshold is not positive, or another number is negative.
    """

    def __init__(self, threshold: float = 0.02, gamma: float = 10.0, tau: float = 0.1) -> None:
        super().__init__()
        if threshold <= 0:
            raise ValueError(f"threshold is a distortion above 0, got {threshold}: no reconstruction would meet it")
        if min(gamma, tau) < 0:
            raise ValueError(f"gamma and tau must be at least 0, got {gamma} and {tau}")
        self.threshold = threshold
        self.gamma = gamma
        self.tau = tau

    def forward(self, distortions: Tensor, budgets: Tensor, num_tokens: int) -> Tensor:
        """Rewards ``(b, g)``, below 2."""
        margin = self.threshold - distortions
        met = (margin / (self.tau * self.threshold)).sigmoid() if self.tau else (margin >= 0).to(distortions)
        return met * (1 + efficiency(distortions, budgets, num_tokens)) - (1 - met) * self.gamma * (-margin).relu()


@REWARDS.register()
class WeightedReward(Reward):
    """Raw fidelity, minus the distortion, and raw efficiency, 1 - L/n, joined by a weighting (AdaTok-D).

    It takes the place of ``ContinuousReward``, whose prices it finds; a weighting scales both terms, so that prices of
    their own would cancel.

    Args:
        weighting: how; learns its scales, and weights if it has any to learn, from the rewards asked for in training
            mode. An objective may standardise what comes out within each image; no term is standardised before.
    """

    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, distortions: Tensor, budgets: Tensor, num_tokens: int) -> Tensor:
        """Rewards ``(b, g)``."""
        weighted: Tensor = self.weighting(-distortions, efficiency(distortions, budgets, num_tokens))
        return weighted

    def metrics(self) -> dict[str, float]:
        """The weighting's."""
        return self.weighting.metrics()


def is_unimodal(rewards: Tensor) -> Tensor:
    """Whether rewards ``(b, g)``, by increasing budget, never rise again after a fall -> ``(b,)`` bool; exact."""
    steps = rewards.diff(dim=1)
    fallen = (steps < 0).cummax(dim=1).values
    return ~(fallen & (steps > 0)).any(dim=1)
