"""What a data set promises: numbered images in [0, 1] that come out the same whenever they are asked for.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from framework.config.registry import Registry


@dataclass(frozen=True)
class Batch:
    """Images with the keys that name them, and labels where the data set has them.

    Args:
        images: ``(b, 3, h, w)`` float32 in [0, 1].
        keys: one name per image, for messages and per-image tables: a path, or ``chelsea@12,40,96``.
        groups: one name per image of the photograph (or other unit) that it was cut from; intervals
            resample groups first, then images.
        labels: ``(b,)`` int64, or ``None``.
    """

    images: Tensor
    keys: list[str]
    groups: list[str]
    labels: Tensor | None = None


class ImageData(ABC):
    """A finite, numbered set of images of one square size.

    Subclasses take their own settings from YAML and, keyword-only from the parent ``Data``:
    ``image_size`` (pixels), ``training`` (augment or not) and ``seed``.
    """

    image_size: int

    @abstractmethod
    def __len__(self) -> int:
        """How many images an epoch holds."""

    @abstractmethod
    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The images at ``indices`` as they look in ``epoch``.

        Augmentation depends on (seed, epoch, index) alone, so that workers, batch size and resuming never change
        a picture. Without training the epoch changes nothing.
        """

    @abstractmethod
    def whole(self, group: str) -> Tensor:
        """The uncropped photograph of a group, ``(3, h, w)`` float32 in [0, 1], for pictures of tiles."""

    @abstractmethod
    def protocol(self) -> dict[str, object]:
        """What a metric must record about these images: source, split, count, crop, resize filter, range."""


DATA = Registry("data", ImageData)
