"""Losses on what a decoder predicts in its output space, before that is turned into pixels.

Shapes: b batch, c channels of the space, h and w its grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from framework.config.registry import Registry


class ValueLoss(nn.Module, ABC):
    """A weighted distance between predicted values and what a frozen space says of the image.

    Attributes:
        weight: the factor that ``forward`` has already applied.
    """

    weight: float

    @abstractmethod
    def forward(self, values: Tensor, target: Tensor) -> Tensor:
        """Values ``(b, c, h, w)`` and the space's ``target`` -> a scalar, in float32 under autocast too."""


VALUE_LOSSES = Registry("value loss", ValueLoss)


@VALUE_LOSSES.register()
class LatentLoss(ValueLoss):
    """Mean distance of latents in the units of the space, which are about one standard deviation.

    Args:
        norm: ``l2`` squares differences, ``l1`` takes their absolute value.
        weight: factor of the loss.
    """

    def __init__(self, norm: Literal["l1", "l2"] = "l2", weight: float = 1.0) -> None:
        super().__init__()
        self.norm = norm
        self.weight = weight

    def forward(self, values: Tensor, target: Tensor) -> Tensor:
        """Both ``(b, c, h, w)``.

        Raises:
            TypeError: if the target is codes.
        """
        if target.dim() != values.dim():
            raise TypeError("the output space has codes and no latents to be near to: take ProxyCodeLoss")
        distance = F.mse_loss if self.norm == "l2" else F.l1_loss
        return self.weight * distance(values.float(), target.float())


@VALUE_LOSSES.register()
class ProxyCodeLoss(ValueLoss):
    """Cross-entropy of predicted scores with a VQGAN's codes, in nats a code: TiTok's first stage (Yu et al. 2024).

    Args:
        label_smoothing: share of the target that is spread over all codes. TiTok has 0, ALIT 0.1.
        weight: factor of the loss.

    Raises:
        ValueError: if ``label_smoothing`` is not at least 0 and below 1.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share, at least 0 and below 1; got {label_smoothing:g}")
        self.label_smoothing = label_smoothing
        self.weight = weight

    def forward(self, values: Tensor, target: Tensor) -> Tensor:
        """Scores ``(b, c, h, w)`` of c codes, and codes ``(b, h, w)``.

        Raises:
            TypeError: if the target is no codes.
        """
        if target.is_floating_point():
            raise TypeError("the output space has no codes to predict: take LatentLoss, or a VQGAN as output_space")
        return self.weight * F.cross_entropy(values.float(), target.long(), label_smoothing=self.label_smoothing)
