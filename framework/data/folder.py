"""Images in a folder of one's own: a subfolder per class, or flat."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from framework.config.registry import Factory
from framework.data.interface import DATA, Batch, ImageData
from framework.data.transforms import CenterCrop, RandomCrop, Transform, open_image, to_tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@DATA.register()
class ImageFolder(ImageData):
    """Every image below a folder, in sorted order, decoded when asked for.

    Each immediate subfolder with images (at any depth) is a class, numbered by sorted name. Where images lie loose in
    the folder itself it counts as flat: all images are used and none has a label. Names that begin with a dot are
    ignored. An image's key and group are its path relative to the folder.

    Args:
        root: the folder; ``~`` is expanded.
        transform: how a photograph becomes a square; ``None`` for ``RandomCrop`` in training and ``CenterCrop``
            otherwise. Without training its random choices are the same in every epoch.
        flip: probability of a horizontal flip in training.
        image_size: side in pixels, given by ``Data``.
        training: augment or not, given by ``Data``.
        seed: of the augmentation, given by ``Data``.

    Raises:
        FileNotFoundError: if ``root`` is empty or no folder.
        ValueError: if there are no images in it.
        ImageError: on fetching, if a file cannot be decoded.
    """

    def __init__(
        self,
        root: str,
        transform: Factory[Transform] | None = None,
        flip: float = 0.5,
        *,
        image_size: int,
        training: bool,
        seed: int,
    ) -> None:
        usual: type[Transform] = RandomCrop if training else CenterCrop
        self.transform = (transform or usual)(image_size=image_size)
        self.flip = flip
        self.image_size = image_size
        self.training = training
        self.seed = seed
        self.root = Path(root).expanduser()
        if not root or not self.root.is_dir():
            reason = "is a file" if root and self.root.is_file() else "does not exist"
            looked = f"the folder {self.root.absolute()} {reason}" if root else "root is empty"
            raise FileNotFoundError(f"ImageFolder: {looked}. Name a folder of images: data.train.root=DIR")
        self.paths = _list_images(self.root)
        tops = [path.split("/")[0] for path in self.paths]
        flat = any("/" not in path for path in self.paths)
        self.classes = [] if flat else sorted(set(tops))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = None if flat else torch.tensor([numbers[top] for top in tops])

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        images = torch.stack([self._load(i, epoch) for i in indices])
        names = [self.paths[i] for i in indices]
        labels = None if self.labels is None else self.labels[torch.as_tensor(indices)]
        return Batch(images.float() / 255, names, names, labels)

    def _load(self, index: int, epoch: int) -> Tensor:
        rng = np.random.default_rng((self.seed, epoch if self.training else 0, index))
        image = self.transform(open_image(self.root / self.paths[index]), rng)
        if self.training and rng.random() < self.flip:
            image = ImageOps.mirror(image)
        return to_tensor(image)

    def whole(self, group: str) -> Tensor:
        return to_tensor(open_image(self.root / group)).float() / 255

    def protocol(self) -> dict[str, object]:
        return {
            "source": str(self.root.absolute()),
            "split": self.root.name,
            "count": len(self),
            "classes": len(self.classes),
            "crop": self.transform.protocol(),
            "augmentation": f"flip {self.flip:g}" if self.training else "none",
            "range": "[0, 1]",
        }


def _list_images(root: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave the folder out in silence

    paths = []
    num_files = num_folders = 0
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        num_files += len(files)
        num_folders += len(subfolders)
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                paths.append((Path(folder) / name).relative_to(root).as_posix())
    if not paths:
        raise ValueError(
            f"ImageFolder: no images in {root.absolute()}: {num_files} files in {num_folders} subfolders, "
            f"none ends in {', '.join(EXTENSIONS)}"
        )
    return sorted(paths, key=lambda path: path.split("/"))
