"""JPEG and WebP at a given size of file: what decades of engineering make of as many bytes as a tokenizer's codes take.

Shapes: b images of a batch, l sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from framework.data.interface import ImageData
from framework.data.stream import subset
from framework.evaluation.image_metrics import UINT8_RULE, psnr, squared_error, to_uint8
from framework.evaluation.rate_distortion import Progress, RateDistortion, measure_all
from framework.evaluation.tables import markdown

DEFINITIONS = {
    "max_bytes": "of each image: its bits, rounded up to whole bytes",
    "bytes": "mean over images of what was counted of each file; the protocol says what that is",
    "fitting": "share of images with a quality at which they take at most max_bytes; the others stand in mse and psnr "
    "at the lowest quality, in more bytes than they were allowed",
    "mse, psnr, rqpr": "of the decoded files against the images before they were rounded to bytes",
}


@dataclass(frozen=True)
class Codec:
    """A lossy codec of Pillow's, and which bytes of its files count.

    Args:
        title: for tables.
        format: Pillow's name of it.
        qualities: the lowest and the highest.
        options: for Pillow, beside the quality.
        counted: which bytes count, in words.
        num_bytes: of a file, those that count.
    """

    title: str
    format: str
    qualities: tuple[int, int]
    options: Mapping[str, object]
    counted: str
    num_bytes: Callable[[bytes], int]

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """The whole file."""
        file = BytesIO()
        image.save(file, self.format, quality=quality, **self.options)
        return file.getvalue()

    def protocol(self) -> dict[str, object]:
        """What a table must say of the codec's numbers."""
        lowest, highest = self.qualities
        return {
            "codec": self.title,
            "pillow": PIL.__version__,
            "options": dict(self.options),
            "quality": f"by binary search from {lowest} to {highest} the highest that fits, for each image",
            "counted": self.counted,
            "uint8": UINT8_RULE,
        }


def _jpeg_scan(file: bytes) -> int:
    # Compressed data never hold a marker, so the last start-of-scan is the only one of a baseline file.
    marker = file.rindex(b"\xff\xda") + 2
    header = int.from_bytes(file[marker : marker + 2], "big")
    return len(file) - marker - header - len(b"\xff\xd9") + 1


def _webp_frame(file: bytes) -> int:
    if file[12:16] != b"VP8 ":
        raise ValueError(f"Pillow wrote a WebP file that begins with a chunk {file[12:16]!r}, and 'VP8 ' was expected")
    return int.from_bytes(file[16:20], "little") - 7


JPEG = Codec("JPEG", "JPEG", (1, 100), {"subsampling": "4:2:0", "optimize": True}, "the whole file", len)
WEBP = Codec("WebP", "WEBP", (0, 100), {"method": 4}, "the whole file", len)
# What a decoder must know of a small image is mostly the same for all, and a tokenizer's decoder is not counted either.
JPEG_SCAN = Codec(
    "JPEG without headers",
    "JPEG",
    (1, 100),
    {"subsampling": "4:2:0", "optimize": False},
    "the coded scan and one byte that tells the quality; neither the standard tables nor size, markers and metadata",
    _jpeg_scan,
)
WEBP_FRAME = Codec(
    "WebP without headers", "WEBP", (0, 100), {"method": 4}, "the VP8 frame without start code and size", _webp_frame
)
CODECS = (JPEG, JPEG_SCAN, WEBP, WEBP_FRAME)


class Compressed(NamedTuple):
    """Images out of files.

    Args:
        reconstructions: ``(b, 3, h, w)`` float32 in [0, 1].
        num_bytes: what counts of each file, ``(b,)`` int64.
        fits: whether that is no more than was allowed, ``(b,)`` bool.
    """

    reconstructions: Tensor
    num_bytes: Tensor
    fits: Tensor


def compress(images: Tensor, codec: Codec, max_bytes: int) -> Compressed:
    """Each image ``(b, 3, h, w)`` in [0, 1] at the highest quality whose file has at most ``max_bytes`` that count.

    Files nearly always grow with quality; where one does not, the binary search may miss a larger file that fits. An
    image that is too large at the lowest quality is coded at that all the same, and ``fits`` says so: it is not scaled
    down, by which a codec may gain at such rates.

    Raises:
        ValueError: if ``max_bytes`` is not positive, or an image is not finite.
    """
    if max_bytes < 1:
        raise ValueError(f"an image needs at least one byte, got max_bytes={max_bytes}")
    decoded, sizes = [], []
    for pixels in rearrange(to_uint8(images).cpu(), "b c h w -> b h w c").numpy():
        file = _largest(Image.fromarray(pixels), codec, max_bytes)
        sizes.append(codec.num_bytes(file))
        with Image.open(BytesIO(file)) as image:
            decoded.append(torch.from_numpy(np.array(image.convert("RGB"))))
    reconstructions = rearrange(torch.stack(decoded), "b h w c -> b c h w").to(images.device).float() / 255
    num_bytes = torch.tensor(sizes, device=images.device)
    return Compressed(reconstructions, num_bytes, num_bytes <= max_bytes)


def _largest(image: Image.Image, codec: Codec, max_bytes: int) -> bytes:
    low, high = codec.qualities
    found = None
    while low <= high:
        middle = (low + high) // 2
        file = codec.encode(image, middle)
        if codec.num_bytes(file) <= max_bytes:
            found, low = file, middle + 1
        else:
            high = middle - 1
    return found or codec.encode(image, codec.qualities[0])


def codec_rate_distortion(
    codec: Codec,
    data: ImageData,
    max_bytes: Sequence[int],
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> RateDistortion:
    """A codec's errors, whose lengths are ``max_bytes``, increasing; ``bytes`` and ``fitting`` stand with distances.

    Raises:
        ValueError, TooManyBroken: see ``compress`` and ``measure_all``.
    """

    def numbers(images: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
        compressed = [compress(images, codec, size) for size in lengths]
        return {
            "mse": torch.stack([squared_error(images, each.reconstructions) for each in compressed], dim=1),
            "bytes": torch.stack([each.num_bytes for each in compressed], dim=1),
            "fitting": torch.stack([each.fits for each in compressed], dim=1),
        }

    curve = measure_all(codec.title, numbers, data, max_bytes, limit, batch_size, progress=progress)
    return replace(curve, protocol={**curve.protocol, **codec.protocol()})


def at_equal_size(
    data: ImageData,
    bits: Mapping[int, float],
    codecs: Sequence[Codec] = CODECS,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Codecs where a tokenizer is measured: the same images at the bits that each of its lengths takes.

    Args:
        data: as the tokenizer was measured on, with the same ``limit``.
        bits: of an image, by the tokenizer's length: length x log2 of its codes.

    Returns:
        ``definitions`` and, by the codec's title, ``protocol`` and ``per_length``; plain JSON types only. ``note``
        says in words where images do not fit.

    Raises:
        ValueError, TooManyBroken: see ``compress`` and ``measure_all``.
    """
    max_bytes = {length: ceil(size / 8) for length, size in bits.items()}
    found: dict[str, Any] = {"definitions": DEFINITIONS}
    for codec in codecs:
        sizes = sorted(set(max_bytes.values()))
        curve = codec_rate_distortion(codec, data, sizes, limit, batch_size, progress)
        summary: dict[str, Any] = curve.summary()
        by_size = {entry.pop("length"): entry for entry in summary["per_length"]}
        rows = [
            {
                "length": length,
                "bits": bits[length],
                "bits_per_pixel": bits[length] / data.image_size**2,
                "max_bytes": size,
                **by_size[size],
                "note": _note(by_size[size]),
            }
            for length, size in max_bytes.items()
        ]
        found[codec.title] = {"protocol": summary["protocol"], "per_length": rows}
    return found


def codecs_beside(
    curve: RateDistortion,
    data: ImageData,
    bits_per_token: float,
    images: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """``at_equal_size`` for a curve of discrete tokens, whose own numbers of the same images are under ``tokens``.

    Args:
        curve: of the images of ``data``, or of a subset of ``limit``.
        bits_per_token: log2 of its codes.
        images: a fixed random subset of so many is compared.
    """
    count = images if limit is None else min(images, limit)
    bits = {length: length * bits_per_token for length in curve.lengths}
    compared = {data.key(index) for index in subset(len(data), count)}
    errors = curve.errors[[row for row, key in enumerate(curve.keys) if key in compared]]
    own = [
        {"length": length, "mse": each.mean().item(), "psnr": psnr(each).mean().item()}
        for length, each in zip(curve.lengths, errors.T, strict=True)
    ]
    return {**at_equal_size(data, bits, limit=count, progress=progress), "tokens": {"per_length": own}}


def codecs_text(found: Mapping[str, Any]) -> str:
    """A table of what ``codecs_beside`` has found."""
    titles = [codec.title for codec in CODECS]
    first = found[titles[0]]
    lengths = [str(at["length"]) for at in first["per_length"]]
    rows = [[f"PSNR, dB, of {first['protocol']['images']} images at tokens", *lengths]]
    rows.append(["bits a pixel", *(f"{at['bits_per_pixel']:.3g}" for at in first["per_length"])])
    rows.append(["bytes at most", *(str(at["max_bytes"]) for at in first["per_length"])])
    for title in ("tokens", *titles):
        cells = [
            f"{at['psnr']:.2f}" + (f" in {at['bytes']:,.0f} bytes" if at.get("fitting", 1) < 1 else "")
            for at in found[title]["per_length"]
        ]
        rows.append([title, *cells])
    return (
        f"{markdown(rows, num_words=1)}\nJPEG and WebP at the bytes that tokens take, each image at the highest "
        "quality that fits; where even the lowest is larger, that is measured, and the mean bytes are told.\n"
    )


def _note(numbers: Mapping[str, Any]) -> str | None:
    if numbers["fitting"] == 1:
        return None
    return (
        f"even at the lowest quality {1 - numbers['fitting']:.0%} of the images take more bytes than allowed; these "
        f"are measured all the same, and the mean is {numbers['bytes']:,.1f} bytes"
    )
