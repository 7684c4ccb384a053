"""Real photographs that ship inside installed packages, cut into crops: data with no download."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from framework.data.interface import DATA, Batch, ImageData, in_unit_range
from framework.data.transforms import open_image, to_tensor
from framework.runtime.hashing import uniforms

# Split by photograph, so that no held-out crop shares a scene with training. Each entry is one scene (a group) and
# its files; the first folder of a path is the package. All files lie in the wheels themselves.
SPLITS: dict[str, dict[str, list[str]]] = {
    "train": {
        "astronaut": ["skimage/data/astronaut.png"],
        "brick": ["skimage/data/brick.png"],
        "camera": ["skimage/data/camera.png"],
        "grass": ["skimage/data/grass.png"],
        "gravel": ["skimage/data/gravel.png"],
        "hubble_deep_field": ["skimage/data/hubble_deep_field.jpg"],
        "ihc": ["skimage/data/ihc.png"],
        "moon": ["skimage/data/moon.png"],
        "motorcycle": ["skimage/data/motorcycle_left.png", "skimage/data/motorcycle_right.png"],
        "retina": ["skimage/data/retina.jpg"],
    },
    "validation": {
        "chelsea": ["skimage/data/chelsea.png"],
        "rocket": ["skimage/data/rocket.jpg"],
        "coins": ["skimage/data/coins.png"],
    },
    "test": {
        "coffee": ["skimage/data/coffee.png"],
        "flower": ["sklearn/datasets/images/flower.jpg"],
        "grace_hopper": ["matplotlib/mpl-data/sample_data/grace_hopper.jpg"],
        "china": ["sklearn/datasets/images/china.jpg"],
    },
}
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}

BOX_SEED = 0
CHANNEL_ORDERS = torch.tensor(list(permutations(range(3))))  # (6, 3), the identity first


@DATA.register()
class Photos(ImageData):
    """Square crops of the photographs of one split, at log-uniform scales, kept in memory as bytes.

    Crop i belongs to photograph i modulo their number. Photographs get equal shares because by area the largest
    (retina, mostly smooth) would be more than a third of the data; and every prefix is as mixed as the whole.
    Where a crop lies depends on (split, i, min_crop, max_crop) alone, never on ``seed``: all runs train on and are
    evaluated on equal crops, and asking for more extends the list. The seed drives augmentation, which only training
    has.

    Args:
        split: which photographs; none is in two splits.
        num_crops: how many crops.
        min_crop: smallest side of a crop in pixels of the photograph; ``None`` for ``image_size``. Smaller than
            ``image_size`` enlarges.
        max_crop: largest side of a crop as a share of the photograph's shorter side.
        flip: probability of a horizontal flip.
        permute_channels: probability of a random order of the colour channels (each of the six alike).
        image_size: side in pixels after resizing, given by ``Data``.
        training: augment or not, given by ``Data``.
        seed: of the augmentation, given by ``Data``.

    Raises:
        FileNotFoundError: if a photograph is not where its package should have put it.
        ValueError: if there is nothing to crop, or ``min_crop`` does not fit a photograph.
    """

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        num_crops: int = 24_000,
        min_crop: int | None = None,
        max_crop: float = 0.5,
        flip: float = 0.5,
        permute_channels: float = 0.5,
        *,
        image_size: int,
        training: bool,
        seed: int,
    ) -> None:
        if num_crops < 1:
            raise ValueError(f"Photos: num_crops must be at least 1, got {num_crops}")
        if not 0 < max_crop <= 1:
            raise ValueError(
                f"Photos: max_crop is a share of the shorter side, above 0 and at most 1; got {max_crop:g}"
            )
        self.split = split
        self.min_crop = image_size if min_crop is None else min_crop
        self.max_crop = max_crop
        self.flip = flip
        self.permute_channels = permute_channels
        self.image_size = image_size
        self.training = training
        self.seed = seed
        self.keys: list[str] = []
        self.groups: list[str] = []
        self.images = self._crop(num_crops)  # (n, 3, s, s) uint8

    def _crop(self, num_crops: int) -> Tensor:
        scenes = list(SPLITS[self.split])
        photographs = {file: _open_photograph(file) for files in SPLITS[self.split].values() for file in files}
        for file, photograph in photographs.items():
            if self._largest(photograph) < self.min_crop:
                width, height = photograph.size
                raise ValueError(
                    f"Photos: crops of at least {self.min_crop} pixels do not fit {file} ({width}x{height}) with "
                    f"max_crop {self.max_crop:g}; "
                    f"set min_crop to at most {self._largest(photograph)}, or max_crop higher"
                )
        scale, across, down = (
            uniforms(BOX_SEED, f"{self.split} {purpose}", 0, range(num_crops)) for purpose in ("scale", "x", "y")
        )
        crops = np.empty((num_crops, self.image_size, self.image_size, 3), dtype=np.uint8)
        for i in range(num_crops):
            turn, scene = divmod(i, len(scenes))
            files = SPLITS[self.split][scenes[scene]]
            file = files[turn % len(files)]
            photograph = photographs[file]
            size = round(self.min_crop * (self._largest(photograph) / self.min_crop) ** scale[i])
            x = int(across[i] * (photograph.width - size + 1))
            y = int(down[i] * (photograph.height - size + 1))
            crop = photograph.resize(
                (self.image_size, self.image_size),
                Image.Resampling.BICUBIC,
                box=(x, y, x + size, y + size),
                reducing_gap=2.0,
            )
            crops[i] = np.asarray(crop)
            self.keys.append(f"{Path(file).stem}@{x},{y},{size}")
            self.groups.append(scenes[scene])
        return torch.from_numpy(np.ascontiguousarray(rearrange(crops, "n h w c -> n c h w")))

    def _largest(self, photograph: Image.Image) -> int:
        return int(self.max_crop * min(photograph.size))

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return self.keys[index]

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        return in_unit_range(self.read(indices, epoch))

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        images = self.images[torch.as_tensor(indices)]
        if self.training:
            images = self._augment(images, indices, epoch)
        return Batch(images, [self.keys[i] for i in indices], [self.groups[i] for i in indices])

    def _augment(self, images: Tensor, indices: Sequence[int], epoch: int) -> Tensor:
        flip, permute, order = (
            torch.from_numpy(uniforms(self.seed, purpose, epoch, indices)) for purpose in ("flip", "permute", "order")
        )
        images = torch.where((flip < self.flip)[:, None, None, None], images.flip(-1), images)
        order = torch.where(permute < self.permute_channels, (order * len(CHANNEL_ORDERS)).long(), 0)
        return images[torch.arange(len(images))[:, None], CHANNEL_ORDERS[order]]

    def whole(self, group: str) -> Tensor:
        return to_tensor(_open_photograph(SPLITS[self.split][group][0])).float() / 255

    def protocol(self) -> dict[str, object]:
        return {
            "source": "photographs inside scikit-image, scikit-learn and matplotlib",
            "split": self.split,
            "photographs": list(SPLITS[self.split]),
            "count": len(self),
            "crop": f"random fixed square, side log-uniform from {self.min_crop} to {self.max_crop:g} x shorter side",
            "resize": f"to {self.image_size} by Pillow bicubic, antialiased, reducing_gap 2",
            "augmentation": (
                f"flip {self.flip:g}, channel permutation {self.permute_channels:g}" if self.training else "none"
            ),
            "range": "[0, 1]",
        }


def _open_photograph(file: str) -> Image.Image:
    return open_image(photograph_path(file))


def photograph_path(file: str) -> Path:
    """Where a photograph of ``SPLITS`` is.

    Raises:
        FileNotFoundError: if its package or the file is missing; says how to repair that.
    """
    package, _, inside = file.partition("/")
    spec = find_spec(package)  # finds the folder without importing the package
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / inside).is_file():
        found = "is not installed" if folder is None else f"at {folder} lacks the file"
        raise FileNotFoundError(
            f"Photos reads {file}, but the package {DISTRIBUTIONS[package]} {found}. "
            f"Repair it: pip install --force-reinstall {DISTRIBUTIONS[package]}"
        )
    return folder / inside
