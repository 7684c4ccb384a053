"""What a feature extractor promises, and the one place that knows which images its network expects.

Shapes: b batch, c channels of a layer, h and w pixels or a layer's grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from framework.config.registry import Registry

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


class Extractor(nn.Module, ABC):
    """A trained network; images that look alike have features that lie close to each other.

    Callers pass images in [0, 1]. What the network was trained on is declared here and made in ``forward`` alone: the
    mean and deviation that pixels in [0, 1] are standardised by, and the size.

    Args:
        min_side: images whose shorter side is smaller are enlarged to it, bilinearly; others stay as they are.

    Attributes:
        title: what its distance is called in tables: the published name only where it is the published distance.
        MEAN: of red, green and blue on [0, 1].
        STD: likewise.
    """

    title: str
    MEAN: ClassVar[Triple] = IMAGENET_MEAN
    STD: ClassVar[Triple] = IMAGENET_STD
    mean: Tensor
    std: Tensor

    def __init__(self, min_side: int) -> None:
        super().__init__()
        self.min_side = min_side
        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images ``(b, 3, h, w)`` in [0, 1] -> feature maps ``(b, c, h, w)``, one or more.

        They are scaled so that the distance of two images is the sum over maps of the mean over the grid of the squared
        Euclidean distance of their channels.
        """
        return self.features((self.resized(images) - self.mean) / self.std)

    def resized(self, images: Tensor) -> Tensor:
        """Images in the size that the network gets them in."""
        sides = images.shape[-2:]
        if min(sides) >= self.min_side:
            return images
        return interpolate(images, size=[round(s * self.min_side / min(sides)) for s in sides], mode="bilinear")

    @property
    def size_protocol(self) -> str:
        """What ``resized`` does, for records."""
        return f"bilinear to a shorter side of {self.min_side} where smaller"

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """The feature maps of standardised images in the network's size."""

    def load(self, network: nn.Module, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Load into ``network`` what ``read`` returns, strictly; on the meta device nothing is read."""
        if not next(network.parameters()).is_meta:
            network.load_state_dict(read())


EXTRACTORS = Registry("extractor", Extractor)


def unit_channels(features: Tensor) -> Tensor:
    """Each position's channels ``(b, c, h, w)`` scaled to length 1; zeros stay zeros, with finite gradients."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
