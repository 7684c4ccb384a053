"""Images in shards of the WebDataset convention, by number: the same pictures as from the folder they came from."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from framework.config.registry import Factory
from framework.data.encoded import EncodedImages
from framework.data.interface import DATA
from framework.data.shard_files import ShardFiles
from framework.data.shard_index import MAKE, Member, Members, Shard, members_name, read_member
from framework.data.transforms import MAX_PIXELS, Transform, open_image
from framework.runtime.hashing import uniforms


@DATA.register()
class Shards(EncodedImages):
    """Every image of a set of shards with an ``index.json``, which ``tools/make_shards.py`` writes.

    Images are numbered shard by shard, so that any number of ranks and workers share any number of shards. An image's
    key and group are the shard and its key in it: ``00003/cat/7``. An epoch of training takes the shards in random
    order, and its images from ``window`` of them at any time, since a disk or network reads few files faster.

    Args:
        root: a folder; or a URL that WebDataset opens, such as ``https://HOST/PATH`` or
            ``pipe:aws s3 cp s3://BUCKET/{} -``, in which ``{}`` stands for the name of a file.
        transform: how a photograph becomes a square; ``None`` for ``RandomCrop`` in training and ``CenterCrop``
            otherwise. Without training its random choices are the same in every epoch.
        flip: probability of a horizontal flip in training.
        max_broken: share of images that may turn out unreadable, at least 0 and below 1.
        max_pixels: an image with more counts as broken and is not decoded; likewise one so narrow that its shorter
            side cannot be brought to ``image_size`` within that number.
        cache: a folder to which each shard is brought whole when it is first needed; a URL needs one, and a folder on
            a slow disk gains by one. All shards must have room in it.
        window: shards whose images are mixed; with at least as many as there are, an epoch's order is fully random.
        image_size: side in pixels, given by ``Data``.
        training: augment or not, given by ``Data``.
        seed: of the augmentation, given by ``Data``.

    Raises:
        OSError: if there is no index at ``root``, or a file cannot be fetched.
        ValueError: if a number is out of its range, the index does not fit the shards, or there are no images.
    """

    def __init__(
        self,
        root: str,
        transform: Factory[Transform] | None = None,
        flip: float = 0.5,
        max_broken: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        cache: str | None = None,
        window: int = 16,
        *,
        image_size: int,
        training: bool,
        seed: int,
    ) -> None:
        super().__init__(transform, flip, max_broken, max_pixels, image_size=image_size, training=training, seed=seed)
        if window < 1:
            raise ValueError(f"Shards: window is a number of shards, at least 1; got {window}")
        self.window = window
        self.files = ShardFiles(root, cache)
        self.classes = self.files.index.classes or []
        self.shards = [shard for shard in self.files.index.shards if shard.samples]
        if not self.shards:
            raise ValueError(f"Shards: there are no images in {root}. {MAKE}")
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self._known: dict[int, list[Member]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Shard after shard comes in, at most ``window`` are in use, and each image waits a uniform while for its turn.

        Turns go round in a circle, so that as many shards are mixed at the beginning and end of an epoch.
        """
        count = len(self.shards)
        comes_in = np.argsort(uniforms(seed, "shards", epoch, range(count)))
        waits = min(self.window, count) * uniforms(seed, "order", epoch, range(len(self)))
        turns = np.repeat(comes_in, [shard.samples for shard in self.shards]) + waits
        return np.argsort(turns % count, kind="stable")

    def key(self, index: int) -> str:
        shard, member = self._find(index)
        return f"{shard.stem}/{member.key}"

    def index_of(self, key: str) -> int:
        stem, _, inside = key.partition("/")
        number = [shard.stem for shard in self.shards].index(stem)
        row = [member.key for member in self._members(number)].index(inside)
        return int(self._ends[number]) - self.shards[number].samples + row

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        if not self.classes:
            return None
        return torch.tensor([self._find(index)[1].label for index in indices], dtype=torch.int64)

    def photograph(self, index: int) -> Image.Image:
        shard, member = self._find(index)
        key = self.key(index)
        content = read_member(self.files.path(shard.name, shard.sha256), member, key)
        return open_image(key, self.max_pixels, content)

    def protocol(self) -> dict[str, object]:
        source = {"source": self.files.root, "split": PurePosixPath(self.files.root).name}
        made = {"index": f"sha256 {self.files.digest[:12]}", "images": self.files.index.images}
        return source | made | super().protocol()

    def _find(self, index: int) -> tuple[Shard, Member]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[number], self._members(number)[index - int(self._ends[number])]

    def _members(self, number: int) -> list[Member]:
        """The images of a shard; kept for more shards than are in use at a time."""
        if number not in self._known:
            shard = self.shards[number]
            path = self.files.path(members_name(shard.name), shard.members_sha256)
            content = path.read_bytes()
            if sha256(content).hexdigest() != shard.members_sha256:
                raise ValueError(f"Shards: {path} is not what the index was made with; remove the index. {MAKE}")
            if len(self._known) > 2 * self.window:
                self._known.pop(next(iter(self._known)))
            self._known[number] = Members.parse(content).images
        return self._known[number]
