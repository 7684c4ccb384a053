"""Tokens on disk beside JPEG and WebP: the same images in as many bytes each.

Shapes: b images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor, nn

from framework.data.interface import ImageData
from framework.data.stream import Sequential
from framework.data.token_file import TokenFile
from framework.evaluation.codecs import CODECS, Codec, compress
from framework.evaluation.image_metrics import psnr, squared_error
from framework.evaluation.tables import markdown
from framework.evaluation.token_coding import decode_tokens


def compare_tokens(
    model: nn.Module,
    file: TokenFile,
    data: ImageData,
    limit: int = 256,
    length: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> str:
    """A table of errors: of images decoded from a file, and of JPEG and WebP in the bytes that each one's tokens take.

    Args:
        model: as of ``decode_tokens``.
        file: tokens of these images, at one crop.
        data: the images that were encoded, cropped as they were.
        limit: compare a fixed random subset of so many images; those that have no tokens are left out.
        length: read at most so many tokens of each.
        progress: told how far it is.

    Raises:
        TypeError, ValueError: as ``decode_tokens``; or if the file has several crops, or tokens of none of the images.
    """
    if file.header.crops > 1:
        raise ValueError(f"{file.path} has {file.header.crops} random crops of each image; compare tokens of one")
    rows, total = {key: row for row, key in enumerate(file.keys)}, min(limit, len(data))
    own: list[Tensor] = []
    sizes: list[Tensor] = []
    found: dict[str, list[Tensor]] = {codec.title: [] for codec in CODECS}
    batches, done = Sequential(data, 64, limit), 0
    for batch in batches:
        known = [place for place, key in enumerate(batch.keys) if key in rows]
        done += len(batch.keys)
        progress("comparing", done + len(batches.broken), total)
        if not known:
            continue
        images, chosen = batch.images[known], [rows[batch.keys[place]] for place in known]
        own.append(squared_error(images, torch.cat(list(decode_tokens(model, file, chosen, length)))))
        tokens = file.lengths[chosen] if length is None else file.lengths[chosen].clamp(max=length)
        sizes.append(torch.tensor([ceil(number * file.header.bits / 8) for number in tokens.tolist()]))
        for codec in CODECS:
            found[codec.title].append(_at_sizes(images, codec, sizes[-1]))
    if not own:
        raise ValueError(f"{file.path} has no tokens of these images: compare with the images that were encoded")
    header = ["", "bytes an image", "MSE x 1000", "PSNR, dB", "files that fit"]
    table = [header, _row("tokens", torch.cat(sizes), torch.cat(own), "")]
    for title, parts in found.items():
        errors, num_bytes, fits = torch.cat(parts).T
        table.append(_row(title, num_bytes, errors, f"{fits.mean().item():.0%}"))
    return (
        f"{markdown(table, num_words=1)}\n{len(torch.cat(own))} images. Each file has the highest quality at which it "
        "takes no more whole bytes than its image's tokens, or the lowest where none does. The bytes of tokens are "
        "their bits at their true width: a token file adds a header, offsets and keys."
    )


def _at_sizes(images: Tensor, codec: Codec, sizes: Tensor) -> Tensor:
    """Squared error, bytes and whether they fit, ``(b, 3)`` float64, with ``sizes (b,)`` bytes for each image."""
    found = torch.empty(len(images), 3, dtype=torch.float64)
    for size in sizes.unique().tolist():
        chosen = sizes == size
        coded = compress(images[chosen], codec, size)
        errors = squared_error(images[chosen], coded.reconstructions)
        found[chosen] = torch.stack([errors.double(), coded.num_bytes.double(), coded.fits.double()], dim=1)
    return found


def _row(title: str, num_bytes: Tensor, errors: Tensor, fits: str) -> list[str]:
    mse, peak = 1000 * errors.double().mean().item(), psnr(errors.double()).mean().item()
    return [title, f"{num_bytes.double().mean().item():,.1f}", f"{mse:.3g}", f"{peak:.2f}", fits]
