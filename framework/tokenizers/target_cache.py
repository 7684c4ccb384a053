"""What a frozen space says of every training image, computed once and read from one file ever after.

A frozen autoencoder costs more than the tokenizer that is trained in its latents. Encoding all images beforehand, as
LightningDiT does, leaves that out of every step.

Shapes: l looks (an image with one draw of its augmentation), n images, b batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.data.interface import Batch, ImageData, in_unit_range
from framework.data.stream import Sequential, subset
from framework.runtime.files import growing_file
from framework.runtime.weights import weights_digest
from framework.tokenizers.interface import ImageSpace

SAMPLE = 16
"""Images that tell data sets apart, and prove a file."""
BATCH = 64
UNREADABLE = "it could not be read when its target was cached"


class CachedTargets(ImageData):
    """A data set whose batches bring the ``target`` of a space; epoch e shows look e modulo l.

    Args:
        data: the images.
        file: an ``.npy`` file of ``(l, n, ...)``: float16 values, or int32 codes.
        with_images: whether batches bring the images too, in the same look; without, ``Batch.images`` has no pixels.
    """

    def __init__(self, data: ImageData, file: Path, with_images: bool) -> None:
        self.data = data
        self.file = file
        self.with_images = with_images
        self.image_size, self.max_broken = data.image_size, data.max_broken

    @cached_property
    def targets(self) -> NDArray[np.generic]:
        """Mapped, and not read, into memory."""
        mapped: NDArray[np.generic] = np.load(self.file, mmap_mode="r", allow_pickle=False)
        return mapped

    @classmethod
    @torch.no_grad()
    def cached(
        cls,
        folder: Path,
        space: ImageSpace,
        data: ImageData,
        looks: int,
        with_images: bool,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> CachedTargets:
        """The targets of a data set, from a file in ``folder`` where they have been computed before.

        The file's name is a digest of the space's weights, the data's protocol and a few images; the targets of these
        are computed again and compared, and a file that does not agree is replaced. A computation that was stopped
        goes on where it was.

        Args:
            space: frozen.
            progress: called with looks of images done and in all.

        Raises:
            ValueError: if values are not finite or do not fit float16.
            OSError: if the file cannot be written.
            TooManyBroken: if more images cannot be read than the data set allows.
        """
        device = next(space.parameters()).device
        some = next(Sequential(data, SAMPLE, limit=SAMPLE))
        expected = _stored(space.target(some.images.to(device)), some.keys)
        described = {
            "space": weights_digest(space.state_dict()),
            "class": type(space).__name__,
            "data": data.protocol(),
            "images": weights_digest({"images": some.images}),
            "form": [looks, len(data), str(expected.dtype), *expected.shape[1:]],
        }
        name = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
        found = cls(data, folder / f"targets_{name}.npy", with_images)
        if not found._agrees(some, expected):
            _compute(space, data, looks, found.file, expected, progress)
        return found

    def _agrees(self, some: Batch, expected: NDArray[np.generic]) -> bool:
        """Whether the file is there, whole, and says of a few images what the space says now."""
        try:
            mapped = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        rows = {self.data.key(row): row for row in subset(len(self.data), SAMPLE)}
        kept = mapped[0, [rows[key] for key in some.keys]]
        return bool(np.allclose(kept, expected, rtol=1e-2, atol=1e-2))

    def __len__(self) -> int:
        return len(self.data)

    def key(self, index: int) -> str:
        return self.data.key(index)

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        return in_unit_range(self.read(indices, epoch))

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        look = epoch % len(self.targets)
        if self.with_images:
            batch = self.data.read(indices, look)
        else:
            keys = [self.data.key(index) for index in indices]
            batch = Batch(torch.empty(len(keys), 3, 0, 0), keys, keys)
        target = torch.from_numpy(np.array(self.targets[look, list(indices)]))[_readable(self.data, indices, batch)]
        # Those that were broken when the file was made, and may be no longer.
        lost = (target.isnan() if target.is_floating_point() else target < 0).flatten(1).any(1).tolist()
        broken = {key: UNREADABLE for key, bad in zip(batch.keys, lost, strict=True) if bad}
        whole = replace(batch, target=target.float() if target.is_floating_point() else target.long())
        kept = whole.select([row for row, bad in enumerate(lost) if not bad]) if broken else whole
        return replace(kept, broken={**batch.broken, **broken})

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return self.data.order(seed, epoch)

    def whole(self, group: str) -> Tensor:
        return self.data.whole(group)

    def protocol(self) -> dict[str, object]:
        return self.data.protocol()


def _stored(target: Tensor, keys: Sequence[str]) -> NDArray[np.generic]:
    """As the file has it: float16, or int32 codes."""
    if not target.is_floating_point():
        return target.int().cpu().numpy()
    stored = target.half().cpu()
    bad = (~stored.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the space's values of {len(bad)} images are not finite or beyond 65,504, first {keys[bad[0]]}: has the "
            "space been trained, and are its channels normalised?"
        )
    return stored.numpy()


def _compute(
    space: ImageSpace,
    data: ImageData,
    looks: int,
    file: Path,
    example: NDArray[np.generic],
    progress: Callable[[int, int], None],
) -> None:
    """Row after row; the size of what a kill has left tells how many there are."""
    device, form, total = next(space.parameters()).device, example.shape[1:], looks * len(data)
    start, size = io.BytesIO(), example.dtype.itemsize * math.prod(form)
    described = np.lib.format.header_data_from_array_1_0(example) | {"shape": (looks, len(data), *form)}
    np.lib.format.write_array_header_1_0(start, described)
    header = start.getvalue()
    with growing_file(file, header) as out:
        looks_done, rows_done = divmod(min((out.tell() - len(header)) // size, total), len(data))
        done = looks_done * len(data) + rows_done // BATCH * BATCH  # since batches decide last bits
        out.truncate(len(header) + done * size)
        while done < total:
            look, first = divmod(done, len(data))
            indices = range(first, min(first + BATCH, len(data)))
            batch = data.fetch(indices, look)
            rows = np.full((len(indices), *form), math.nan if example.dtype.kind == "f" else -1, example.dtype)
            if batch.keys:
                rows[_readable(data, indices, batch)] = _stored(space.target(batch.images.to(device)), batch.keys)
            out.write(rows.tobytes())
            done += len(indices)
            progress(done, total)


def _readable(data: ImageData, indices: Sequence[int], batch: Batch) -> list[int]:
    """Which of the images at ``indices`` the batch brings."""
    if not batch.broken:
        return list(range(len(indices)))
    return [row for row, index in enumerate(indices) if data.key(index) not in batch.broken]
