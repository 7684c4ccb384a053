"""The four files of Fashion-MNIST, made up: few images beyond those held out for validation."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from framework.data.fashion_mnist import FILES, VALIDATION


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def pictures(count: int, seed: int) -> NDArray[np.uint8]:
    """Noise in the first 20 pictures, then blank ones, which compress fast."""
    images = np.zeros((count, 28, 28), dtype=np.uint8)
    images[:20] = np.random.default_rng(seed).integers(0, 256, images[:20].shape)
    return images


def write_fashion(root: Path, train: int = 12, test: int = 15) -> Path:
    """Writes ``train`` + 5,000 and ``test`` images with labels 0 to 9 in turn; returns the folder."""
    for seed, count in enumerate((train + VALIDATION, test)):
        write_idx(root / FILES[2 * seed], pictures(count, seed))
        write_idx(root / FILES[2 * seed + 1], (np.arange(count) % 10).astype(np.uint8))
    return root
