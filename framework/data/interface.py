"""What a data set promises: numbered images in [0, 1] that come out the same whenever they are asked for.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.config.registry import Registry
from framework.runtime.hashing import uniforms
from framework.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """Images with the keys that name them, and labels where the data set has them.

    Args:
        images: ``(b, 3, h, w)`` float32 in [0, 1].
        keys: one name per image, for messages and per-image tables: a path, or ``chelsea@12,40,96``.
        groups: one name per image of the photograph (or other unit) that it was cut from; intervals
            resample groups first, then images.
        labels: ``(b,)`` int64, or ``None``.
        broken: images that were asked for and could not be read, with the reason; they are in none of the others.
        kinds: what sort of image each one is, where evaluations should tell sorts apart: ``3 digits``.
        target: what a tokenizer's output space says of the images, ``(b, ...)``, where that was computed beforehand.
            Where it is all that is needed, images have no pixels: ``(b, 3, 0, 0)``.
        tokens: of a tokenizer, where images were encoded beforehand; images then have no pixels either.
    """

    images: Tensor
    keys: list[str]
    groups: list[str]
    labels: Tensor | None = None
    broken: Mapping[str, str] = field(default_factory=dict)
    kinds: list[str] | None = None
    target: Tensor | None = None
    tokens: Tokens | None = None

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        images = self.images.to(device, non_blocking=True)
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, images=images, labels=moved(self.labels), target=moved(self.target), tokens=tokens)

    def select(self, rows: Sequence[int]) -> Batch:
        """The images at ``rows``, in that order."""
        numbers = torch.as_tensor(rows, dtype=torch.int64)
        return Batch(
            self.images[numbers],
            [self.keys[row] for row in rows],
            [self.groups[row] for row in rows],
            None if self.labels is None else self.labels[numbers],
            kinds=None if self.kinds is None else [self.kinds[row] for row in rows],
            target=None if self.target is None else self.target[numbers],
            tokens=None if self.tokens is None else self.tokens.select(numbers),
        )


def in_unit_range(batch: Batch) -> Batch:
    """The batch with its images as float32 in [0, 1], if they were uint8."""
    if batch.images.dtype != torch.uint8:
        return batch
    # numpy asks for large pages of memory, which halves the time; its result is torch's to the last bit.
    return replace(batch, images=torch.from_numpy(np.divide(batch.images.numpy(), 255, dtype=np.float32)))


class TooManyBroken(OSError):
    """More images cannot be read than a data set may leave out."""


class ImageData(ABC):
    """A finite, numbered set of images of one square size.

    Subclasses take their own settings from YAML and, keyword-only from the parent ``Data``:
    ``image_size`` (pixels), ``training`` (augment or not) and ``seed``.

    ``max_broken`` is the share of images that may turn out unreadable, at least 0 and below 1: training takes others in
    their place, evaluation leaves them out and says so, and above the share both stop.
    """

    image_size: int
    max_broken: float = 0.0

    @abstractmethod
    def __len__(self) -> int:
        """How many images an epoch holds."""

    @abstractmethod
    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The images at ``indices`` as they look in ``epoch``, in that order; those that cannot be read are left out.

        Augmentation depends on (seed, epoch, index) alone, so that workers, batch size and resuming never change
        a picture. Without training the epoch changes nothing.
        """

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        """``fetch``, but images may be uint8 from 0 to 255: between processes they take a quarter of the time."""
        return self.fetch(indices, epoch)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The numbers of all images, each once, as an epoch of training takes them: a function of (seed, epoch) alone.

        Override it where images are read faster in another order than a plain shuffle.
        """
        return np.argsort(uniforms(seed, "order", epoch, range(len(self))), kind="stable")

    def key(self, index: int) -> str:
        """The name of an image, readable or not. Override it where that needs no reading."""
        batch = self.fetch([index], epoch=0)
        return [*batch.keys, *batch.broken][0]

    @abstractmethod
    def whole(self, group: str) -> Tensor:
        """The uncropped photograph of a group, ``(3, h, w)`` float32 in [0, 1], for pictures of tiles."""

    @abstractmethod
    def protocol(self) -> dict[str, object]:
        """What a metric must record about these images: source, split, count, crop, resize filter, range."""


DATA = Registry("data", ImageData)
