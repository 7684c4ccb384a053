"""Images in a folder of one's own: a subfolder per class, or flat, or by a list of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from framework.config.registry import Factory
from framework.data.interface import DATA, Batch, ImageData, in_unit_range
from framework.data.listing import list_images, read_classes, read_files
from framework.data.transforms import (
    DECODING,
    MAX_PIXELS,
    PILLOW_MAX_PIXELS,
    CenterCrop,
    ImageError,
    RandomCrop,
    Transform,
    check_pixels,
    open_image,
    to_tensor,
)
from framework.runtime.files import digest


@DATA.register()
class ImageFolder(ImageData):
    """Every image below a folder, in sorted order, decoded when asked for.

    Each immediate subfolder with images (at any depth) is a class, numbered by sorted name. Where images lie loose in
    the folder itself it counts as flat: all images are used and none has a label. Names that begin with a dot and
    links that lead back to a folder above them are ignored. An image's key and group are its path relative to the
    folder.

    Args:
        root: the folder; ``~`` is expanded.
        transform: how a photograph becomes a square; ``None`` for ``RandomCrop`` in training and ``CenterCrop``
            otherwise. Without training its random choices are the same in every epoch.
        flip: probability of a horizontal flip in training.
        max_broken: share of images that may turn out unreadable, at least 0 and below 1.
        max_pixels: an image with more counts as broken and is not decoded; likewise one so narrow that its shorter
            side cannot be brought to ``image_size`` within that number.
        classes: a text file with a class a line (a folder's name, and a label for people if wanted), which says which
            subfolders are used and how they are numbered.
        files: a text file with a relative path and a class (a number, or a name in ``classes``) a line, which says
            which images are used, in which order; the folder is not searched.
        image_size: side in pixels, given by ``Data``.
        training: augment or not, given by ``Data``.
        seed: of the augmentation, given by ``Data``.

    Raises:
        FileNotFoundError: if ``root`` is empty or no folder.
        PermissionError: if a subfolder cannot be listed, since its images would be missing in silence.
        ValueError: if there are no images in it, a number is out of its range, or a list does not fit the folder.
    """

    def __init__(
        self,
        root: str,
        transform: Factory[Transform] | None = None,
        flip: float = 0.5,
        max_broken: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        classes: str | None = None,
        files: str | None = None,
        *,
        image_size: int,
        training: bool,
        seed: int,
    ) -> None:
        if not 0 <= max_broken < 1:
            raise ValueError(f"ImageFolder: max_broken is a share, at least 0 and below 1; got {max_broken:g}")
        if not 1 <= max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(f"ImageFolder: max_pixels goes from 1 to {PILLOW_MAX_PIXELS}, got {max_pixels}")
        usual: type[Transform] = RandomCrop if training else CenterCrop
        self.transform = (transform or usual)(image_size=image_size)
        self.flip = flip
        self.max_broken = max_broken
        self.max_pixels = max_pixels
        self.image_size = image_size
        self.training = training
        self.seed = seed
        self.root = existing_folder(root)
        self.lists = {name: Path(file).expanduser() for name, file in (("classes", classes), ("files", files)) if file}
        if "files" in self.lists:
            self.classes = read_classes(self.lists["classes"], None) if classes else []
            self.paths, labels = read_files(self.lists["files"], self.classes)
            self.classes = self.classes or list(map(str, range(max(labels) + 1)))
        else:
            self.paths, labels = self._search()
        self.labels = torch.tensor(labels) if labels else None

    def _search(self) -> tuple[list[str], list[int]]:
        """Sets the classes; returns the images, and their labels if they have some."""
        listing = list_images(self.root)
        if listing.unreadable:
            folder, reason = next(iter(listing.unreadable.items()))
            raise PermissionError(
                f"ImageFolder: {len(listing.unreadable)} folders below {self.root.absolute()} cannot be listed, first "
                f"{folder} ({reason}). Make them readable, or move them away"
            )
        listing.check(self.root)
        folders = sorted({path.split("/")[0] for path in listing.images if "/" in path})
        if "classes" in self.lists:
            self.classes = read_classes(self.lists["classes"], folders)
        else:
            flat = any("/" not in path for path in listing.images)
            self.classes = [] if flat else folders
            if flat:
                return listing.images, []
        numbers = {name: number for number, name in enumerate(self.classes)}
        paths = [path for path in listing.images if path.split("/")[0] in numbers and "/" in path]
        return paths, [numbers[path.split("/")[0]] for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return self.paths[index]

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        return in_unit_range(self.read(indices, epoch))

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        images = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        read: list[int] = []
        broken: dict[str, str] = {}
        for index in indices:
            try:
                pixels = self._load(index, epoch)
            except ImageError as error:
                broken[self.paths[index]] = error.reason
            else:
                images[len(read)] = pixels
                read.append(index)
        names = [self.paths[index] for index in read]
        labels = None if self.labels is None else self.labels[torch.as_tensor(read, dtype=torch.int64)]
        return Batch(torch.from_numpy(images[: len(read)]), names, names, labels, broken)

    def _load(self, index: int, epoch: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng((self.seed, epoch if self.training else 0, index))
        image = self.transform(self._open(self.paths[index]), rng)
        pixels = rearrange(np.asarray(image), "h w c -> c h w")
        return pixels[..., ::-1] if self.training and rng.random() < self.flip else pixels

    def _open(self, path: str) -> Image.Image:
        image = open_image(self.root / path, self.max_pixels)
        shorter, longer = sorted(image.size)
        resized = self.image_size**2 * longer // shorter
        check_pixels(path, resized, self.max_pixels, f" after resizing {image.width}x{image.height}")
        return image

    def whole(self, group: str) -> Tensor:
        return to_tensor(open_image(self.root / group, self.max_pixels)).float() / 255

    def protocol(self) -> dict[str, object]:
        return {
            "source": str(self.root.absolute()),
            "split": self.root.name,
            "count": len(self),
            "classes": len(self.classes),
            "lists": {name: f"{file} (sha256 {digest(file)[:12]})" for name, file in self.lists.items()},
            "decoding": DECODING,
            "crop": self.transform.protocol(),
            "augmentation": f"flip {self.flip:g}" if self.training else "none",
            "range": "[0, 1]",
        }


def existing_folder(root: str) -> Path:
    """The folder, with ``~`` expanded.

    Raises:
        FileNotFoundError: if it is empty or no folder.
    """
    folder = Path(root).expanduser()
    if not root or not folder.is_dir():
        reason = "is a file" if root and folder.is_file() else "does not exist"
        looked = f"the folder {folder.absolute()} {reason}" if root else "root is empty"
        raise FileNotFoundError(f"ImageFolder: {looked}. Name a folder of images: data.train.root=DIR")
    return folder
