"""Perceptual distances, as a loss and as a metric.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.losses.extractors.interface import Extractor
from framework.losses.interface import LOSSES, Loss
from framework.runtime.weights import weights_digest


@LOSSES.register()
class PerceptualLoss(Loss):
    """The distance of two images in the features of a frozen network, in float32 under autocast too.

    In bfloat16 the distance of images that are nearly equal would be mostly rounding.

    Args:
        extractor: the network; it stays in eval mode, outside optimizers, averages and checkpoints, which record its
            digest.
        weight: factor of the loss.
    """

    def __init__(self, extractor: Extractor, weight: float = 1.0) -> None:
        super().__init__()
        self.extractor = extractor.requires_grad_(False).eval()
        self.extractor.is_frozen = True  # type: ignore[assignment]
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Reconstructions and images ``(b, 3, h, w)`` in [0, 1] -> a scalar."""
        return self.weight * self.distances(reconstructions, images).mean()

    def distances(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Two ``(b, 3, h, w)`` in [0, 1] -> the distance of each pair ``(b,)``, without the weight."""
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.extractor(reconstructions.float()), self.extractor(images.float()), strict=True)
            return torch.stack([(one - other).square().sum(1).mean((1, 2)) for one, other in pairs]).sum(0)

    def protocol(self) -> dict[str, str]:
        """What a table must say of the distance: its name, how images are resized for it, and whose weights it has."""
        return {
            "distance": self.extractor.title,
            "resize": self.extractor.size_protocol,
            "weights_sha256": weights_digest(self.extractor.state_dict()),
        }

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Training mode changes nothing: the extractor stays as it was trained."""
        super().train(mode)
        self.extractor.eval()
        return self
