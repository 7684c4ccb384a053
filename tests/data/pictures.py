"""Image files of every kind, made from one smooth picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def gradient(width: int = 48, height: int = 32) -> Pixels:
    """Red rises to the right, green downwards, blue falls to the right; no two corners are alike."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([across, down, 255 - across / 2], axis=2).round().astype(np.uint8)


def png(pixels: NDArray[np.integer], interlaced: bool = False) -> bytes:
    """A PNG of ``(h, w, c)`` pixels with 8 or 16 bits, which Pillow itself cannot write with all colours or Adam7."""
    depth = 8 * pixels.dtype.itemsize
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = (row for x, y, across, down in passes for row in pixels[y::down, x::across] if row.size)
    data = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunks((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")))


def empty_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and brings no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunks((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))


def _chunks(*parts: tuple[bytes, bytes]) -> Iterator[bytes]:
    for kind, data in parts:
        yield struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture() -> Image.Image:
    return Image.fromarray(gradient())
