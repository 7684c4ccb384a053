"""From an image file to a square of the size that a model reads.

Resizing is Pillow's, whose filters widen when shrinking (they are antialiased), as in the evaluation of TiTok
(arXiv 2406.07550) and most tokenizers after it: shorter side by bicubic, then a centre crop.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from framework.config.registry import Registry


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names it and the reason."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Any image file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    Raises:
        ImageError: if the file is missing, damaged or no image.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{os.fspath(path)}: cannot be read as an image ({error or type(error).__name__})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would cut it off at 255
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """The bytes of an RGB image, ``(3, h, w)`` uint8."""
    return torch.from_numpy(rearrange(np.array(image), "h w c -> c h w"))


class Transform(ABC):
    """Makes a square from a photograph.

    Args:
        image_size: side of the square in pixels, given by the data set.
    """

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size

    @abstractmethod
    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The square, ``image_size`` on each side; every random choice is drawn from ``rng``."""

    @abstractmethod
    def protocol(self) -> str:
        """What was done, for the record beside a metric."""

    def _resize_shorter_side(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        width, height = (self.image_size * side // shorter for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _cut(self, image: Image.Image, left: int, top: int) -> Image.Image:
        return image.crop((left, top, left + self.image_size, top + self.image_size))


TRANSFORMS = Registry("transform", Transform)


@TRANSFORMS.register()
class CenterCrop(Transform):
    """Resizes the shorter side, then cuts the centre: the usual evaluation, nothing random."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = self._resize_shorter_side(image)
        left, top = (round((side - self.image_size) / 2) for side in image.size)
        return self._cut(image, left, top)

    def protocol(self) -> str:
        return f"shorter side to {self.image_size} (Pillow bicubic, antialiased), centre crop"


@TRANSFORMS.register()
class RandomCrop(Transform):
    """Resizes the shorter side, then cuts at a uniform position along the longer one."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = self._resize_shorter_side(image)
        left, top = (int(rng.integers(side - self.image_size + 1)) for side in image.size)
        return self._cut(image, left, top)

    def protocol(self) -> str:
        return f"shorter side to {self.image_size} (Pillow bicubic, antialiased), random crop"


@TRANSFORMS.register()
class RandomResizedCrop(Transform):
    """Cuts a square of random size and place, then resizes it; proportions are kept.

    Args:
        scale: smallest area of the cut as a share of the largest square that fits, in (0, 1]; the share is
            uniform over [scale, 1].
    """

    def __init__(self, scale: float = 0.25, *, image_size: int) -> None:
        super().__init__(image_size=image_size)
        if not 0 < scale <= 1:
            raise ValueError(f"RandomResizedCrop: scale is a share of the area in (0, 1], got {scale}")
        self.scale = scale

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = max(1, round(min(image.size) * rng.uniform(self.scale, 1) ** 0.5))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        box = (left, top, left + side, top + side)
        return image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)

    def protocol(self) -> str:
        return f"random square of area {self.scale:g} to 1, to {self.image_size} (Pillow bicubic, antialiased)"
