"""From an image file to a square of the size that a model reads.

Resizing is Pillow's, whose filters widen when shrinking (they are antialiased), as in the evaluation of TiTok
(arXiv 2406.07550) and most tokenizers after it: shorter side by bicubic, then a centre crop.
"""

from __future__ import annotations

import os
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from framework.config.registry import Registry

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
"""Which names are taken for images; what is in the file decides how it is decoded."""

MAX_PIXELS = 100_000_000
PILLOW_MAX_PIXELS = 178_956_970
"""Pillow itself opens nothing larger."""

RESIZING = "Pillow bicubic, antialiased; smaller images are enlarged"
DECODING = "upright by EXIF, transparency over white, 16 bits scaled to 8, first frame, ICC profiles ignored"


class ImageError(ValueError):
    """A file that cannot be read as an image.

    Args:
        path: of the file.
        reason: in words that do not name the file, so that equal reasons can be counted.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}: cannot be read as an image ({self.reason})"


@contextmanager
def image_file(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, content: bytes | None = None
) -> Iterator[Image.Image]:
    """An image file with its header read and nothing decoded yet.

    Args:
        path: of the file, or a name for messages where there is ``content``.
        max_pixels: an image may have.
        content: of the file, where it lies in none of its own.

    Raises:
        ImageError: if the file is missing, no image of a format in ``FORMATS`` or larger than ``max_pixels``; also
            for whatever goes wrong with the image inside the ``with`` block.
    """
    try:
        if not (_size(path) if content is None else len(content)):
            raise ImageError(path, "the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, and of sizes that have a limit here
            with Image.open(path if content is None else BytesIO(content), formats=FORMATS) as image:
                check_pixels(path, image.width * image.height, max_pixels, "")
                yield image
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, f"no image in a format that is read: {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, reason) from error


def _size(path: str | os.PathLike[str]) -> int:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "no regular file")  # opening a pipe would wait for ever
    return status.st_size


def check_pixels(path: str | os.PathLike[str], pixels: int, max_pixels: int, when: str) -> None:
    """Refuse an image, or what would become of it, before so much memory is taken."""
    if pixels > max_pixels:
        raise ImageError(path, f"{pixels:,} pixels{when}, and max_pixels is {max_pixels:,}")


def open_image(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, content: bytes | None = None
) -> Image.Image:
    """Any image file as upright 8-bit RGB; arguments as of ``image_file``.

    The EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled to 8 bits, and of 16-bit
    colours Pillow keeps the upper 8; of several frames the first is taken. Colours are as stored: ICC profiles are
    ignored, and CMYK is converted by Pillow's plain formula, as in the pipelines of the papers.

    Raises:
        ImageError: if the file is missing, damaged, no image or larger than ``max_pixels``. Damage that the format
            cannot show, such as changed bytes inside a JPEG, goes unnoticed.
    """
    with image_file(path, max_pixels, content) as image:
        image.load()
        with suppress(Exception):  # damaged EXIF says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would cut it off at 255
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit grey, whose range is not known")
        return Image.fromarray(((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


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
        return f"shorter side to {self.image_size} ({RESIZING}), centre crop"


@TRANSFORMS.register()
class ADMCenterCrop(Transform):
    """Halves by averaging while the shorter side is at least twice the target, then as ``CenterCrop``.

    The centre crop of ADM (arXiv 2105.05233), on which DiT, LightningDiT and Semanticist train and whose statistics
    generators are compared to. It differs from ``CenterCrop`` in the filter of large photographs and in rounding: the
    longer side is rounded where that one is cut off, and an odd remainder of the crop falls to the right and below.
    """

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        while min(image.size) >= 2 * self.image_size:
            width, height = (side // 2 for side in image.size)
            image = image.resize((width, height), Image.Resampling.BOX)
        scale = self.image_size / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - self.image_size) // 2 for side in image.size)
        return self._cut(image, left, top)

    def protocol(self) -> str:
        return (
            f"ADM: halved by Pillow box while the shorter side is {2 * self.image_size} or more, shorter side to "
            f"{self.image_size} ({RESIZING}), centre crop"
        )


@TRANSFORMS.register()
class RandomCrop(Transform):
    """Resizes the shorter side, then cuts at a uniform position along the longer one."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = self._resize_shorter_side(image)
        left, top = (int(rng.integers(side - self.image_size + 1)) for side in image.size)
        return self._cut(image, left, top)

    def protocol(self) -> str:
        return f"shorter side to {self.image_size} ({RESIZING}), random crop"


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
        return f"random square of area {self.scale:g} to 1, to {self.image_size} ({RESIZING})"
