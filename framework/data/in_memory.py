"""Small grey images that all fit in memory, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from framework.data.interface import Batch, ImageData, in_unit_range

SHEET_SIZE = 256


class GreyImages(ImageData):
    """Grey images kept as bytes, handed out with three equal channels.

    Args:
        images: ``(n, s, s)`` uint8.
        labels: ``(n,)`` int64.
        keys: one per image, each once.
        groups: one per image.
        kinds: one per image.
        protocol: what ``protocol()`` says beyond the count and the range.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        keys: Sequence[str],
        groups: Sequence[str],
        kinds: Sequence[str],
        protocol: Mapping[str, object],
    ) -> None:
        self.images = images
        self.labels = labels
        self.keys = keys
        self.groups = groups
        self.kinds = kinds
        self.image_size = images.shape[-1]
        self._protocol = protocol

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return self.keys[index]

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        return in_unit_range(self.read(indices, epoch))

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        keys, groups, kinds = ([names[i] for i in indices] for names in (self.keys, self.groups, self.kinds))
        images = repeat(self.images[rows], "b h w -> b c h w", c=3)
        return Batch(images, keys, groups, self.labels[rows], kinds=kinds)

    def whole(self, group: str) -> Tensor:
        """A square sheet of images about 256 pixels wide, beginning with the first of the group.

        The images were never cut from a photograph, so this is what a picture of tiles can show of them.
        """
        side = max(1, SHEET_SIZE // self.image_size)
        rows = (self.groups.index(group) + torch.arange(side**2)) % len(self)
        return repeat(rearrange(self.images[rows], "(y x) h w -> (y h) (x w)", y=side), "h w -> c h w", c=3) / 255

    def protocol(self) -> dict[str, object]:
        return {**self._protocol, "count": len(self), "range": "[0, 1]"}
