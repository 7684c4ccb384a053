"""Pixel losses.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from framework.losses.interface import LOSSES, Loss


@LOSSES.register()
class PixelLoss(Loss):
    """Mean distance of pixels with images scaled to [-1, 1], as in the papers: l2 is 4 times the MSE on [0, 1].

    Args:
        norm: ``l2`` squares differences, ``l1`` takes their absolute value.
        weight: factor of the loss.
    """

    def __init__(self, norm: Literal["l1", "l2"] = "l2", weight: float = 1.0) -> None:
        super().__init__()
        self.norm = norm
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Reconstructions and images ``(b, 3, h, w)`` in [0, 1] -> a scalar, in float32 under autocast too."""
        difference = 2 * (reconstructions.float() - images.float())
        return self.weight * (difference.square() if self.norm == "l2" else difference.abs()).mean()
