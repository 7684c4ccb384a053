"""Images in a folder of one's own: a subfolder per class, or flat, or by a list of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from framework.config.registry import Factory
from framework.data.encoded import EncodedImages
from framework.data.interface import DATA
from framework.data.listing import list_images, read_classes, read_files
from framework.data.transforms import MAX_PIXELS, Transform, open_image
from framework.runtime.files import digest


@DATA.register()
class ImageFolder(EncodedImages):
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
        super().__init__(transform, flip, max_broken, max_pixels, image_size=image_size, training=training, seed=seed)
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

    def index_of(self, key: str) -> int:
        return self.paths.index(key)

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        return None if self.labels is None else self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def photograph(self, index: int) -> Image.Image:
        return open_image(self.root / self.paths[index], self.max_pixels)

    def protocol(self) -> dict[str, object]:
        lists = {name: f"{file} (sha256 {digest(file)[:12]})" for name, file in self.lists.items()}
        return {"source": str(self.root.absolute()), "split": self.root.name, "lists": lists} | super().protocol()


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
