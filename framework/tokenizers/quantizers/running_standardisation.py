"""Latents brought to zero mean and unit deviation, by what is learned of them between steps.

Shapes: b batch, n tokens, m of them, d channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.nn.between_steps import LearnsBetweenSteps, share_of_step

MOMENTUM = 0.03
EPSILON = 1e-6


class RunningStandardisation(LearnsBetweenSteps):
    """Subtracts the mean and divides by the standard deviation that each channel has at each position.

    In training, where gradients are computed, the mean and deviation are the batch's own and gradients pass through
    them, as in batch normalisation. Otherwise they are running ones, so that what becomes of an image does not depend
    on its batch. A batch of one image has no deviation: it takes the running ones in training too. A deviation far
    below 1e-3 counts as none.

    The running mean and variance are those of the images of whole steps, over all processes and micro-batches: their
    plain mean in the first steps, then mostly of the last thirty. A longer memory lags behind a high learning rate:
    the decoder then reads codes in use that it has not seen in training.

    Attributes:
        mean: ``(n, d)``, 0 before the first step.
        variance: ``(n, d)``, 1 before the first step; that of a step's images, without Bessel's correction.
        steps: ``(n, 1)`` int64, so many steps had that position.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor
    pending: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0, dim))
        self.register_buffer("variance", torch.empty(0, dim))
        self.register_buffer("steps", torch.empty(0, 1, dtype=torch.int64))
        # Sums of latents' distances from the running mean, which float32 can hold where the mean itself is large, of
        # their squares, and counts.
        self.register_buffer("pending", torch.empty(3, 0, dim), persistent=False)

    def set_num_tokens(self, num_tokens: int) -> None:
        """Start anew, with n positions."""
        dim = self.mean.shape[1]
        self.mean = self.mean.new_zeros(num_tokens, dim)
        self.variance = self.variance.new_ones(num_tokens, dim)
        self.steps = self.steps.new_zeros(num_tokens, 1)
        self.pending = self.pending.new_zeros(3, num_tokens, dim)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents ``(b, m, d)`` float32 of the first m positions -> the same shape.

        Raises:
            ValueError: if there are more positions than ``set_num_tokens`` was told.
        """
        length = latents.shape[1]
        if length > len(self.mean):
            raise ValueError(
                f"statistics are kept for {len(self.mean)} token positions and the latents have {length}: call the "
                f"quantizer's set_num_tokens({length}) first, as Tokenizer does with its encoder's number"
            )
        distance, variance = latents - self.mean[:length], self.variance[:length]
        if self.training and torch.is_grad_enabled():
            self._collect(distance.detach())
            if len(latents) > 1:
                variance, mean = torch.var_mean(distance, dim=0, correction=0)
                distance = distance - mean
        return distance * (variance + EPSILON).rsqrt()

    def _collect(self, distance: Tensor) -> None:
        sums, squares, counts = self.pending[:, : distance.shape[1]]
        sums += distance.sum(0)
        squares += distance.square().sum(0)
        counts += len(distance)

    def averaged(self) -> list[Tensor]:
        return [self.pending]

    def learn(self) -> None:
        sums, squares, counts = self.pending
        seen = counts[:, :1] > 0
        self.steps += seen
        weight = share_of_step(self.steps, seen, MOMENTUM)
        counts = torch.where(seen, counts, 1)
        moved = sums / counts
        self.mean += weight * moved
        self.variance.lerp_((squares / counts - moved.square()).clamp(min=0), weight)
        self.pending.zero_()
