"""Images that are stored encoded, as JPEG or PNG, and are decoded, cut and flipped when asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from framework.config.registry import Factory
from framework.data.interface import Batch, ImageData, in_unit_range
from framework.data.transforms import (
    DECODING,
    PILLOW_MAX_PIXELS,
    CenterCrop,
    ImageError,
    RandomCrop,
    Transform,
    check_pixels,
    to_tensor,
)


class EncodedImages(ImageData):
    """What the sets of stored images share: the same bytes at the same index become the same picture in all of them.

    An image's group is its key.

    Args:
        transform: how a photograph becomes a square; ``None`` for ``RandomCrop`` in training and ``CenterCrop``
            otherwise. Without training its random choices are the same in every epoch.
        flip: probability of a horizontal flip in training.
        max_broken: share of images that may turn out unreadable, at least 0 and below 1.
        max_pixels: an image with more counts as broken and is not decoded; likewise one so narrow that its shorter
            side cannot be brought to ``image_size`` within that number.
        image_size: side in pixels.
        training: augment or not.
        seed: of the augmentation.

    Raises:
        ValueError: if a number is out of its range.
    """

    classes: list[str]

    def __init__(
        self,
        transform: Factory[Transform] | None,
        flip: float,
        max_broken: float,
        max_pixels: int,
        *,
        image_size: int,
        training: bool,
        seed: int,
    ) -> None:
        kind = type(self).__name__
        if not 0 <= max_broken < 1:
            raise ValueError(f"{kind}: max_broken is a share, at least 0 and below 1; got {max_broken:g}")
        if not 1 <= max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(f"{kind}: max_pixels goes from 1 to {PILLOW_MAX_PIXELS}, got {max_pixels}")
        usual: type[Transform] = RandomCrop if training else CenterCrop
        self.transform = (transform or usual)(image_size=image_size)
        self.flip = flip
        self.max_broken = max_broken
        self.max_pixels = max_pixels
        self.image_size = image_size
        self.training = training
        self.seed = seed

    @abstractmethod
    def photograph(self, index: int) -> Image.Image:
        """The uncropped image, upright RGB; raises an ``ImageError`` if it cannot be read."""

    @abstractmethod
    def index_of(self, key: str) -> int:
        """Which image has a key; raises a ``LookupError`` if none has."""

    @abstractmethod
    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """Classes ``(b,)`` int64, or ``None`` if there are none."""

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        return in_unit_range(self.read(indices, epoch))

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        images = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        read: list[int] = []
        broken: dict[str, str] = {}
        for index in indices:
            try:
                pixels = self._load(index, epoch)
            except ImageError as error:
                broken[self.key(index)] = error.reason
            else:
                images[len(read)] = pixels
                read.append(index)
        names = [self.key(index) for index in read]
        return Batch(torch.from_numpy(images[: len(read)]), names, names, self.labels_of(read), broken)

    def _load(self, index: int, epoch: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng((self.seed, epoch if self.training else 0, index))
        image = self.square(index, rng)
        pixels = rearrange(np.asarray(image), "h w c -> c h w")
        return pixels[..., ::-1] if self.training and rng.random() < self.flip else pixels

    def square(self, index: int, rng: np.random.Generator) -> Image.Image:
        """An image as the transform leaves it, not flipped; raises an ``ImageError`` if it cannot be read."""
        image = self.photograph(index)
        shorter, longer = sorted(image.size)
        resized = self.image_size**2 * longer // shorter
        check_pixels(self.key(index), resized, self.max_pixels, f" after resizing {image.width}x{image.height}")
        return self.transform(image, rng)

    def whole(self, group: str) -> Tensor:
        return to_tensor(self.photograph(self.index_of(group))).float() / 255

    def protocol(self) -> dict[str, object]:
        return {
            "count": len(self),
            "classes": len(self.classes),
            "decoding": DECODING,
            "crop": self.transform.protocol(),
            "augmentation": f"flip {self.flip:g}" if self.training else "none",
            "range": "[0, 1]",
        }
