"""Training on tokens that were encoded beforehand: their images are read no more.

Shapes: l looks (an image with one draw of its augmentation), n images, b batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.data.interface import Batch, ImageData
from framework.data.token_file import TokenFile


class CachedTokens(ImageData):
    """A data set whose batches bring the rows of a token file, and no pixels; epoch e shows look e modulo l.

    A batch is padded to its own longest sequence.

    Args:
        data: the images that were encoded, all of them.
        file: their tokens, with labels.

    Raises:
        ValueError: if the file has no labels.
    """

    def __init__(self, data: ImageData, file: TokenFile) -> None:
        if file.labels is None:
            raise ValueError(f"{file.path} has no labels, and generators make images of classes: {data.protocol()}")
        self.data = data
        self.file = file
        self.image_size, self.max_broken = data.image_size, data.max_broken

    @cached_property
    def _labels(self) -> Tensor:
        assert self.file.labels is not None
        return self.file.labels

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """The row ``(l, n)`` of each image in each look; -1 where it could not be read."""
        looks, number = self.file.header.crops, len(self.data)
        if len(self.file) == looks * number:
            return np.arange(looks * number).reshape(looks, number)
        index_of = {self.data.key(index): index for index in range(number)}
        rows = np.full((looks, number), -1)
        rows[self.file.crops.numpy(), [index_of[key] for key in self.file.keys]] = np.arange(len(self.file))
        return rows

    def __len__(self) -> int:
        return len(self.data)

    def key(self, index: int) -> str:
        return self.data.key(index)

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        rows = self._rows[epoch % len(self._rows), list(indices)]
        lost = [self.data.key(index) for index, row in zip(indices, rows.tolist(), strict=True) if row < 0]
        kept = rows[rows >= 0]
        keys = [self.data.key(index) for index, row in zip(indices, rows.tolist(), strict=True) if row >= 0]
        broken = {key: "it could not be read when it was encoded" for key in lost}
        pixels = torch.empty(len(keys), 3, 0, 0)
        return Batch(pixels, keys, keys, self._labels[torch.from_numpy(kept)], broken, tokens=self.file.tokens(kept))

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return self.data.order(seed, epoch)

    def whole(self, group: str) -> Tensor:
        return self.data.whole(group)

    def protocol(self) -> dict[str, object]:
        return self.data.protocol()
