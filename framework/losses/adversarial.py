"""Adversarial training: reconstructions are to be taken for images by a discriminator, which learns to tell them apart.

Shapes: b batch, height and width in pixels, h and w the grid of a discriminator's logits.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from framework.losses.discriminators import Discriminator
from framework.nn.between_steps import LearnsBetweenSteps, share_of_step

DECAY = 0.99
MAX_FACTOR = 1e4
EXPLODED_ABOVE = 1e3
WON_ABOVE = 0.95
WON_BELOW = 0.1

Values = dict[str, Tensor]


class RunningMeans(LearnsBetweenSteps):
    """Means of a few numbers over the last hundred or so steps that had some, over all processes and micro-batches.

    Attributes:
        values: ``(k,)``, zeros before the first step.
        steps: so many steps were taken in.
    """

    values: Tensor
    steps: Tensor
    pending: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(count))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending", torch.zeros(count + 1), persistent=False)  # sums, and of how many

    @torch.no_grad()
    def collect(self, *numbers: Tensor) -> None:
        """One scalar for each mean, of one micro-batch."""
        if self.training:
            self.pending += torch.stack([*numbers, torch.ones_like(numbers[0])])

    def averaged(self) -> list[Tensor]:
        return [self.pending]

    def learn(self) -> None:
        count = self.pending[-1]
        self.steps += (count > 0).long()
        weight = share_of_step(self.steps, count > 0, 1 - DECAY)
        self.values.lerp_(self.pending[:-1] / count.clamp(min=1), weight)
        self.pending.zero_()

    def settled(self) -> list[float] | None:
        """The values, once they are means over a hundred steps."""
        return self.values.tolist() if self.steps >= 1 / (1 - DECAY) else None


class AdversarialLoss(nn.Module):
    """A discriminator, what it learns from, and what reconstructions learn from it.

    Args:
        discriminator: judges images and reconstructions.
        form: ``hinge`` (as VQGAN and TiTok): the discriminator minimises the mean of relu(1 - real) and relu(1 + fake),
            reconstructions -fake. ``non_saturating`` (Goodfellow et al. 2014): the mean of softplus(-real) and
            softplus(fake), and softplus(-fake).
        weight: factor of the reconstructions' loss.
        weighting: ``adaptive`` multiplies ``weight`` by how much larger the gradient of the other losses is than that
            of this one at the last layer, at most 10,000 times (VQGAN, equation 7); in each micro-batch on its own, so
            that ``train.accumulate`` is not exact with it, and for the price of two more passes back to that layer.
        start: the step, counted from 0, at which reconstructions begin to hear of the discriminator, and it to learn.
        lecam: weight of the discriminator's regularisation (Tseng et al. 2021, arXiv:2104.03310): real logits are not
            to rise above the running mean of fake ones, nor fake ones to fall below that of real ones. It is taken of
            each logit, as its authors do; TiTok takes it of a batch's mean, which micro-batches would change.

    Raises:
        ValueError: if a weight or ``start`` is negative.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        form: Literal["hinge", "non_saturating"] = "hinge",
        weight: float = 0.1,
        weighting: Literal["fixed", "adaptive"] = "fixed",
        start: int = 0,
        lecam: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("start", start), ("lecam", lecam)):
            if value < 0:
                raise ValueError(f"adversarial.{name} is at least 0, got {value}")
        self.discriminator = discriminator
        self.form = form
        self.weight = weight
        self.weighting = weighting
        self.start = start
        self.lecam = lecam
        self.judgement = RunningMeans(4)  # real and fake logits, share of patches told right, loss
        self.factor = RunningMeans(1)

    def deceive(self, reconstructions: Tensor, others: Tensor) -> tuple[Tensor, Values]:
        """The reconstructions' loss, a weighted scalar, and numbers to log.

        Args:
            reconstructions: ``(b, 3, height, width)`` in about [0, 1], with the graph that made them.
            others: the sum of the other losses on them, which an adaptive weight reads.
        """
        logits = self.discriminator(reconstructions.float()).float()
        loss = -logits.mean() if self.form == "hinge" else softplus(-logits).mean()
        if self.weighting == "fixed":
            return self.weight * loss, {}
        factor = adaptive_factor(others, loss, last_layer(reconstructions))
        self.factor.collect(factor)
        return self.weight * factor * loss, {"adversarial_factor": factor}

    def discriminate(self, reconstructions: Tensor, images: Tensor) -> tuple[Values, Values]:
        """The discriminator's losses by name, and numbers to log; both images ``(b, 3, height, width)``."""
        real, fake = (self.discriminator(x.float()).float() for x in (images, reconstructions.detach()))
        if self.form == "hinge":
            loss = (relu(1 - real).mean() + relu(1 + fake).mean()) / 2
        else:
            loss = (softplus(-real).mean() + softplus(fake).mean()) / 2
        losses: Values = {self.form: loss}
        if self.lecam:
            usual_real, usual_fake = self.judgement.values[:2]
            apart = relu(real - usual_fake).square().mean() + relu(usual_real - fake).square().mean()
            losses["lecam"] = self.lecam * apart
        told_right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        means = (real.mean(), fake.mean(), told_right, loss)
        self.judgement.collect(*means)
        return losses, dict(zip(("real", "fake", "accuracy"), means, strict=False))

    def alarms(self) -> dict[str, str]:
        """A discriminator that has won, and an adaptive weight that has exploded, over the last hundred steps."""
        told: dict[str, str] = {}
        at_chance = 1.0 if self.form == "hinge" else softplus(torch.zeros(())).item()
        judged, factor = self.judgement.settled(), self.factor.settled()
        if judged is not None and judged[2] > WON_ABOVE and judged[3] < WON_BELOW * at_chance:
            told["discriminator"] = (
                f"the discriminator wins: it tells {judged[2]:.1%} of the patches right, at a loss of {judged[3]:.3f}, "
                "and reconstructions learn little from it. If it does not get harder for it: a lower learning rate in "
                "train.turn_optimizers.discriminator, a narrower discriminator, or more adversarial.lecam"
            )
        if factor is not None and factor[0] > EXPLODED_ABOVE:
            told["adversarial weight"] = (
                f"the adaptive adversarial weight has grown to {factor[0]:.3g}: the discriminator's gradient is that "
                "much smaller than that of the other losses, and mostly noise. Set adversarial.weighting=fixed"
            )
        return told


def last_layer(reconstructions: Tensor) -> Tensor:
    """The trainable matrix or kernel that is the fewest operations away from the reconstructions that it made.

    Raises:
        ValueError: if there is none.
    """
    queue, seen = deque([reconstructions.grad_fn]), {reconstructions.grad_fn}
    while queue:
        node = queue.popleft()
        weight = getattr(node, "variable", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            return weight
        for following, _ in () if node is None else node.next_functions:
            if following not in seen:
                seen.add(following)
                queue.append(following)
    raise ValueError("an adaptive weight compares gradients at the last layer, and none is trained: take a fixed one")


def adaptive_factor(others: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """How much larger the gradient of ``others`` is than that of ``adversarial`` at ``weight``, from 0 to 10,000."""
    with torch.autocast(weight.device.type, enabled=False):
        norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (others, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_FACTOR)
