"""Image spaces: where a tokenizer reads and writes images.

Shapes: b batch, height and width in pixels.
"""

from __future__ import annotations

from torch import Tensor

from framework.tokenizers.interface import SPACES, ImageSpace


@SPACES.register()
class PixelSpace(ImageSpace):
    """The pixels themselves, shifted from [0, 1] to [-1, 1]."""

    channels = 3
    downsampling = 1
    is_lossless = True

    def encode(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, height, width)`` in [0, 1] -> the same in [-1, 1]."""
        return images * 2 - 1

    def decode(self, values: Tensor) -> Tensor:
        """Values ``(b, 3, height, width)`` in about [-1, 1] -> images in about [0, 1]."""
        return (values + 1) / 2
