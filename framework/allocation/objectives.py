"""How a policy learns from rewards: an objective chooses which budgets of each image it wants to see tried, and makes a
loss on the policy's logits of their rewards.

One encoding serves every budget, so each reward costs one decoding, and nothing where rewards come from a table.
Objectives keep no state and never backpropagate through a reward.

Shapes: b batch, g candidate budgets, k budgets of each image that an objective wants tried.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from framework.config.registry import Registry

RewardsAt = Callable[[Tensor], Tensor]
"""Budgets of each image by number, ``(b, k)`` int64 -> their rewards ``(b, k)``."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective makes of a batch.

    Args:
        losses: named, weighted scalars, whose sum is minimised.
        metrics: detached scalars that are only logged: ``entropy`` in nats, ``log_probability`` of the most likely
            budget (both as in AdaTok's figures 9 and 10), ``length`` and ``reward`` that the policy expects.
        log_probabilities: of every budget, ``(b, g)``, detached.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    log_probabilities: Tensor


class PolicyObjective(ABC):
    """A policy loss and a bonus on the entropy, which keeps the policy exploring and decays by half a cosine.

    Args:
        entropy: weight of the bonus at the start of training.
        entropy_end: at its end.

    Attributes:
        updates: optimizer steps that are to be taken on each batch. If more than 1, who takes them hands the first
            step's ``log_probabilities`` to the others.
    """

    updates: int = 1

    def __init__(self, entropy: float = 0.01, entropy_end: float = 0.0) -> None:
        self.entropy = entropy
        self.entropy_end = entropy_end

    @abstractmethod
    def choose(self, log_probs: Tensor, budgets: Tensor, generator: torch.Generator) -> Tensor:
        """Which budgets of each image to try, by number: ``(b, k)`` int64; arguments as in ``policy_losses``.

        Where budgets are drawn, g numbers are taken from ``generator`` for each image.
        """

    @abstractmethod
    def policy_losses(
        self, log_probs: Tensor, chosen: Tensor, rewards: Tensor, budgets: Tensor, old_log_probs: Tensor
    ) -> dict[str, Tensor]:
        """Named, weighted losses of each image, ``(b,)``.

        Args:
            log_probs: the policy's, ``(b, g)``.
            chosen: what ``choose`` returned, ``(b, k)``.
            rewards: of those, ``(b, k)``, detached.
            budgets: lengths ``(g,)``, as floats.
            old_log_probs: as in ``loss``.
        """

    def reward(self, log_probs: Tensor, rewards: Tensor) -> Tensor:
        """What the policy may expect, ``(b,)``, from what was tried: log-probabilities and rewards ``(b, k)``."""
        return (log_probs.softmax(dim=1) * rewards).sum(dim=1)

    def loss(
        self,
        logits: Tensor,
        rewards_at: RewardsAt,
        budgets: Tensor,
        progress: float,
        generator: torch.Generator,
        old_log_probs: Tensor | None = None,
    ) -> ObjectiveOutput:
        """What to minimise, averaged over the batch.

        Args:
            logits: the policy's, ``(b, g)``, float32.
            rewards_at: called once, with what ``choose`` returned.
            budgets: lengths ``(g,)``.
            progress: of training, in [0, 1].
            generator: a CPU generator.
            old_log_probs: ``(b, g)`` of the policy before the first of several steps on this batch; now's if None.
        """
        log_probs = logits.log_softmax(dim=1)
        now, probs = log_probs.detach(), log_probs.exp()
        lengths = budgets.to(log_probs)
        chosen = self.choose(now, lengths, generator)
        rewards = rewards_at(chosen).detach().to(log_probs)
        entropy = -(probs * log_probs).sum(dim=1)
        weight = self.entropy_end + (self.entropy - self.entropy_end) * (1 + math.cos(math.pi * progress)) / 2
        old = now if old_log_probs is None else old_log_probs
        losses = self.policy_losses(log_probs, chosen, rewards, lengths, old) | {"entropy": -weight * entropy}
        metrics = {
            "entropy": entropy,
            "log_probability": now.amax(dim=1),
            "length": (probs * lengths).sum(dim=1),
            "reward": self.reward(now.gather(1, chosen), rewards),
        }
        return ObjectiveOutput(
            {name: loss.mean() for name, loss in losses.items()},
            {name: metric.detach().mean() for name, metric in metrics.items()},
            now,
        )


OBJECTIVES = Registry("objective", PolicyObjective)


@OBJECTIVES.register()
class Reinforce(PolicyObjective):
    """Draw one budget for each image and make it more likely by its advantage (AdaTok, eq. 8 and 9).

    ``mean_length`` is the paper's advantage, A = R(L) + mu (R(L) - R(L_mean)), literally. L_mean is the batch's
    mean of E_pi[L], rounded to the nearest budget, and R(L_mean) the image's own reward there. A constant factor aside,
    that is a baseline of mu / (1 + mu) R(L_mean), a tenth of a baseline at mu 0.1, so little variance goes away.
    ``expected_reward`` is A = R(L) - sum_L pi(L) R(L): unbiased, since the baseline does not depend on the draw. It
    tries all budgets where the other tries two, which is free where rewards come from a table.

    Args:
        baseline: as above.
        mu: of ``mean_length``, at least 0; ``null`` for the paper's 0.1.
        entropy: weight of the entropy bonus at the start.
        entropy_end: and at the end of training.

    Raises:
        ValueError: if ``mu`` is negative, or given with the other baseline.
    """

    def __init__(
        self,
        baseline: Literal["mean_length", "expected_reward"] = "mean_length",
        mu: float | None = None,
        entropy: float = 0.01,
        entropy_end: float = 0.0,
    ) -> None:
        super().__init__(entropy, entropy_end)
        if mu is not None and (mu < 0 or baseline != "mean_length"):
            raise ValueError(f"mu is a number of at least 0 for baseline mean_length, got {mu} with {baseline}")
        self.baseline = baseline
        self.mu = 0.1 if mu is None else mu

    def choose(self, log_probs: Tensor, budgets: Tensor, generator: torch.Generator) -> Tensor:
        """The drawn budget first; then what the baseline needs: the batch's mean length, or all budgets."""
        probs = log_probs.exp()
        # The largest of log-probabilities plus Gumbel noise is a draw, and never one of probability zero.
        uniform = torch.rand(probs.shape, generator=generator, dtype=torch.float64)
        gumbel = -(-uniform.log()).log()
        drawn = (log_probs.double() + gumbel.to(probs.device)).argmax(dim=1, keepdim=True)
        if self.baseline == "expected_reward":
            baseline = torch.arange(len(budgets), device=probs.device)
        else:
            mean_length = (probs * budgets).sum(dim=1).mean()
            baseline = (budgets - mean_length).abs().argmin()[None]
        return torch.cat([drawn, baseline.expand(len(drawn), -1)], dim=1)

    def policy_losses(
        self, log_probs: Tensor, chosen: Tensor, rewards: Tensor, budgets: Tensor, old_log_probs: Tensor
    ) -> dict[str, Tensor]:
        """-A log pi of the drawn budgets, ``(b,)``."""
        gained = rewards[:, 0]
        if self.baseline == "expected_reward":
            advantage = gained - (log_probs.detach().exp() * rewards[:, 1:]).sum(dim=1)
        else:
            advantage = gained + self.mu * (gained - rewards[:, 1])
        return {"policy": -advantage * log_probs.gather(1, chosen[:, :1]).squeeze(1)}

    def reward(self, log_probs: Tensor, rewards: Tensor) -> Tensor:
        """The reward of the draw, ``(b,)``, whose mean is the expected one."""
        return rewards[:, 0]


@OBJECTIVES.register()
class DeterministicGroupGRPO(PolicyObjective):
    """Compare the budgets of an image with each other; nothing is drawn (AdaTok-D; its equations are not public).

    The group of GRPO (Shao et al. 2024) is the set of budgets itself. Rewards are standardised within the image, whole,
    never term by term, and the policy gradient is the exact expectation, -sum_L pi(L) A(L).

    With ``clip`` it is the expectation of PPO's clipped surrogate over the old policy, sum_L pi_old(L) min(r A,
    clamp(r, 1 - clip, 1 + clip) A), where r = pi / pi_old. It is written without the ratio, on probabilities, since
    ratios to a probability of zero are not numbers. The old log-probabilities are refreshed with every new batch: they
    are the policy's own at the first of ``updates`` steps on it, where the gradient is that of the exact form.

    Args:
        budgets: how many budgets make the group, evenly spaced and with both ends; ``null`` for all. Those left out
            count as average, so the policy learns to leave them.
        epsilon: images whose rewards have a smaller standard deviation teach nothing and are skipped.
        clip: how far the ratio may go from 1 and still be rewarded; ``null`` for the exact expectation.
        updates: optimizer steps on each batch; clipping needs 2 or more, since it does nothing in the first.
        kl: weight of the divergence KL(pi || reference). The reference is the policy before training, which is uniform:
            the divergence is log g minus the entropy, an entropy bonus that does not decay.
        entropy: weight of the entropy bonus at the start.
        entropy_end: and at the end of training.

    Raises:
        ValueError: if a group has fewer than 2 budgets, ``clip`` is not in (0, 1), or clipping could never act.
    """

    def __init__(
        self,
        budgets: int | None = None,
        epsilon: float = 1e-6,
        clip: float | None = None,
        updates: int = 1,
        kl: float = 0.0,
        entropy: float = 0.01,
        entropy_end: float = 0.0,
    ) -> None:
        super().__init__(entropy, entropy_end)
        if budgets is not None and budgets < 2:
            raise ValueError(f"budgets must be at least 2, to be compared, or null for all; got {budgets}")
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"clip lies between 0 and 1, or is null for the exact expectation; got {clip}")
        if updates < (1 if clip is None else 2):
            raise ValueError(f"updates must be at least 1, and 2 with clip, which does nothing in one; got {updates}")
        self.budgets = budgets
        self.epsilon = epsilon
        self.clip = clip
        self.updates = updates
        self.kl = kl

    def choose(self, log_probs: Tensor, budgets: Tensor, generator: torch.Generator) -> Tensor:
        """The same budgets of every image, ``(b, k)``.

        Raises:
            ValueError: if the policy has fewer budgets than that.
        """
        last, count = len(budgets) - 1, self.budgets or len(budgets)
        if count > len(budgets):
            raise ValueError(f"the policy has {len(budgets)} budgets, fewer than objective.budgets={count}")
        group = torch.linspace(0, last, count, dtype=torch.float64).round().long()
        return group.to(log_probs.device).expand(len(log_probs), -1)

    def policy_losses(
        self, log_probs: Tensor, chosen: Tensor, rewards: Tensor, budgets: Tensor, old_log_probs: Tensor
    ) -> dict[str, Tensor]:
        """The policy loss ``(b,)``, and the divergence where it has a weight."""
        probs = log_probs.exp()
        advantages = torch.zeros_like(log_probs).scatter(1, chosen, self._standardised(rewards))
        gain = probs * advantages
        if self.clip is not None:
            old = old_log_probs.exp()
            gain = torch.minimum(gain, probs.clamp(old * (1 - self.clip), old * (1 + self.clip)) * advantages)
        losses = {"policy": -gain.sum(dim=1)}
        if self.kl:
            losses["kl"] = self.kl * ((probs * log_probs).sum(dim=1) + math.log(len(budgets)))
        return losses

    def _standardised(self, rewards: Tensor) -> Tensor:
        """Each image's rewards ``(b, k)`` with mean 0 and standard deviation 1, or all 0 where they hardly differ."""
        spread = rewards.std(dim=1, correction=0, keepdim=True)
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        return torch.where(spread < self.epsilon, 0, centred / spread.clamp(min=self.epsilon))
