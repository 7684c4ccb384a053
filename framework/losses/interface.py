"""What a loss on images promises.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from framework.config.registry import Registry


class Loss(nn.Module, ABC):
    """A weighted distance between reconstructions and images.

    Attributes:
        weight: the factor that ``forward`` has already applied.
    """

    weight: float

    @abstractmethod
    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Reconstructions ``(b, 3, h, w)`` in about [0, 1], unclamped, and images in [0, 1] -> a scalar."""


LOSSES = Registry("loss", Loss)
