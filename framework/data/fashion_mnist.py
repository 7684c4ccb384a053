"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747) from its four original files, which Debian packages."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from framework.data.in_memory import GreyImages
from framework.data.interface import DATA, Batch
from framework.runtime.hashing import uniforms

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
VALIDATION = 5_000  # the last of the training file
SIDE = 28
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@DATA.register()
class FashionMNIST(GreyImages):
    """Grey pictures of clothes in ten classes, which are the labels and kinds.

    Training takes the first 55,000 of the training file, validation its last 5,000, the test all 10,000 of the other.
    At 32 pixels the images are padded with 2 of black, at other sizes but 28 resized.

    Args:
        split: which images.
        root: folder of the four ``.gz`` files; ``None`` for where Debian's dataset-fashion-mnist puts them.
        num_images: how many of the split, from its beginning; ``None`` for all.
        flip: probability of a horizontal flip in training.
        image_size: side in pixels, given by ``Data``.
        training: flip or not, given by ``Data``.
        seed: of the flips, given by ``Data``.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged or not the one that its name says, or holds fewer than ``num_images``.
    """

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        root: str | None = None,
        num_images: int | None = None,
        flip: float = 0.5,
        *,
        image_size: int,
        training: bool,
        seed: int,
    ) -> None:
        folder = DEBIAN if root is None else Path(root).expanduser().absolute()
        of_images, of_labels = FILES[2:] if split == "test" else FILES[:2]
        images, labels = read_idx(folder / of_images, dimensions=3), read_idx(folder / of_labels, dimensions=1)
        if len(images) != len(labels) or images.shape[1:] != (SIDE, SIDE) or labels.max(initial=0) >= len(CLASSES):
            raise ValueError(
                f"FashionMNIST: the {split} files in {folder} do not belong together: {len(images)} "
                f"images of {images.shape[1]}x{images.shape[2]}, {len(labels)} labels up to {labels.max(initial=0)}; "
                f"wanted as many of each, {SIDE}x{SIDE} and up to {len(CLASSES) - 1}"
            )
        held_out = max(0, len(images) - VALIDATION)
        part = {"train": slice(held_out), "validation": slice(held_out, None), "test": slice(None)}[split]
        available = len(images[part])
        if not 1 <= (available if num_images is None else num_images) <= available:
            raise ValueError(f"FashionMNIST: num_images must be from 1 to the {available} of {split}, got {num_images}")
        chosen = labels[part][:num_images].astype(np.int64)
        keys = [f"{split} {i:05}" for i in range(len(chosen))]
        super().__init__(
            _resize(torch.from_numpy(images[part][:num_images].copy()), image_size),
            torch.from_numpy(chosen),
            keys,
            groups=keys,
            kinds=[CLASSES[label] for label in chosen],
            protocol={
                "source": f"Fashion-MNIST in {folder}",
                "split": split,
                "crop": "none",
                "resize": f"from {SIDE}: padded to 32 with black, to other sizes by bicubic, antialiased",
                "augmentation": f"flip {flip:g}" if training else "none",
            },
        )
        self.flip = flip
        self.training = training
        self.seed = seed

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        batch = super().read(indices, epoch)
        if not self.training:
            return batch
        flip = torch.from_numpy(uniforms(self.seed, "flip", epoch, indices) < self.flip)[:, None, None, None]
        return replace(batch, images=torch.where(flip, batch.images.flip(-1), batch.images))


def _resize(images: Tensor, size: int) -> Tensor:
    if size == SIDE:
        return images
    if size == 32:
        return pad(images, (2, 2, 2, 2))
    return interpolate(images[:, None], size=(size, size), mode="bicubic", antialias=True)[:, 0]


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """A gzipped idx file of bytes: the header 0, 0, 8, dimensions; the sides as big-endian 32-bit numbers; the bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"FashionMNIST: there is no file {path}. Install Debian's package (apt install "
            f"dataset-fashion-mnist) and leave root null, or name with root a folder that holds {', '.join(FILES)}"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: a damaged gzip file ({error}). Copy or install it again") from error
    start = 4 * (1 + dimensions)
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise ValueError(
            f"{path}: not an idx file of bytes with {dimensions} dimensions: it begins with {content[:4].hex(' ')}, "
            f"which should be 00 00 08 {dimensions:02}"
        )
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    if len(content) - start != np.prod(shape, dtype=object):
        raise ValueError(
            f"{path}: {len(content) - start} bytes follow a header that promises {'x'.join(map(str, shape))}. "
            "Copy or install it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
