"""From images to token files and back: where a tokenizer, a rule for lengths and a data set meet.

Shapes: b batch, h and w pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from math import ceil
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.rules import FixedLength
from framework.allocation.search import BinarySearch, LinearSearch
from framework.data.interface import Batch, ImageData, in_unit_range
from framework.data.stream import ignore_signals, refuse_too_many
from framework.data.token_file import TokenFile, existing_paths, shard_paths
from framework.data.token_format import MappedFile, TokenSet
from framework.data.token_writer import TokenWriter
from framework.runtime.weights import part_digest, weights_digest
from framework.tokenizers.interface import AllocationPolicy
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens

SEARCHES = {None: LinearSearch, ":binary": BinarySearch}
LOOKED_AT = 16


def tokenizer_of(model: nn.Module) -> Tokenizer:
    """The tokenizer that a run has trained, or whose policy it has.

    Raises:
        TypeError: if the model is neither.
        ValueError: if it is in training mode, in which it is another model.
    """
    tokenizer = model.tokenizer if isinstance(model, AdaptiveTokenizer) else model
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"only a tokenizer makes tokens, and this model is {type(model).__name__}")
    if model.training:
        raise ValueError("the tokenizer is in training mode, which is another model: call tokenizer.eval() first")
    return tokenizer


def with_lengths(model: nn.Module, length: int | str) -> AdaptiveTokenizer:
    """The tokenizer of a model with the rule that ``length`` names; see ``encode_images``.

    Raises:
        TypeError, ValueError: as ``tokenizer_of``; or if there is no such rule, or a number is out of its range.
    """
    tokenizer = tokenizer_of(model)
    n, feature_dim = tokenizer.num_tokens, tokenizer.encoder.feature_dim
    quality = re.fullmatch(r"quality:(\d*\.?\d+(?:e-?\d+)?)(:binary)?", str(length))
    policy: AllocationPolicy
    if length == "auto" and isinstance(model, AdaptiveTokenizer):
        return model
    if length == "auto":
        raise ValueError(
            "length 'auto' needs a policy, and this is a tokenizer alone: take the run of a policy, a number from 1 to "
            f"{n}, or quality:0.01"
        )
    if quality:
        policy = SEARCHES[quality[2]](float(quality[1]), num_tokens=n, feature_dim=feature_dim)
    elif str(length).isdecimal() and 1 <= int(length) <= n:
        policy = FixedLength(int(length), num_tokens=n, feature_dim=feature_dim)
    else:
        raise ValueError(f"length is auto, a number from 1 to {n}, quality:0.01 or quality:0.01:binary; got {length!r}")
    return AdaptiveTokenizer(tokenizer, policy).eval()


@torch.no_grad()
def encode_images(
    model: nn.Module,
    data: ImageData,
    out: str | Path,
    length: int | str = "auto",
    crops: int = 1,
    dtype: str | None = None,
    source: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    rows_per_file: int = 20_000,
    num_workers: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> TokenFile:
    """Encode a data set; again after a stop, and finished files are kept and the others written.

    What is written depends on the images, the model and these arguments alone, so that a stop leaves no trace. Rows are
    all images at crop 0, then all at crop 1, and so on, in the order of the data set. The decoder runs only where a
    rule asks for it, as searches do.

    Args:
        model: a tokenizer, or one with a policy, in eval mode; its device is used.
        data: the images; crop k is how they look in epoch k.
        out: the file; of more than ``rows_per_file`` rows, the name of the set.
        length: ``auto`` for the model's policy; a number of tokens; or ``quality:X``, the smallest length at which an
            image's squared error in [0, 1] is at most X, found by a scan; all tokens where none is. With
            ``quality:X:binary`` about log2 n decodings do instead of up to n - 1; it may miss the smallest length where
            an image's errors do not fall from length to length.
        crops: of each image.
        dtype: ``codes``, or latents as ``float32`` or ``float16``; codes if there are, else ``float32``.
        source: whose weights these are, for the header.
        batch_size: images at a time.
        rows_per_file: at most. A stop costs no more than the work on one file, which is collected in memory.
        num_workers: processes that read images ahead.
        progress: told ``images``, how many of those to do are done, and how many they are.
        say: told what is skipped, which images are left out and why, and how long it took.

    Raises:
        TypeError, ValueError: as ``with_lengths``; or if an argument does not fit the model or the data.
        FileExistsError: if there are tokens of something else at ``out``.
        TokenFileError: if a finished file is damaged.
        TooManyBroken: if more images cannot be read than the data set allows.
        OSError: if a file cannot be written.
    """
    adaptive, path = with_lengths(model, length), Path(out)
    _check_crops(data, crops)
    header = _header(adaptive, data, str(length), crops, dtype, source or {})
    paths = shard_paths(path, ceil(crops * len(data) / rows_per_file))
    finished = _finished(path, paths, header)
    if finished:
        say(f"{len(finished)} of {len(paths)} files are there already")
    plan = [part for part in _plan(len(data), crops, len(paths), batch_size) if part.number not in finished]
    total, done, began = sum(len(part.indices) for part in plan), 0, perf_counter()
    loader = DataLoader(
        _Reader(data), batch_size=None, sampler=plan, num_workers=num_workers, worker_init_fn=ignore_signals,
        generator=torch.Generator(),
    )  # fmt: skip
    broken = {key: reason for file in finished.values() for key, reason in file.shard.broken.items()}
    for number, parts in groupby(zip(plan, loader, strict=True), key=lambda part: part[0].number):
        writer, passes = TokenWriter(paths[number], header, number, len(paths)), 0
        missing: dict[str, str] = {}
        for part, batch in parts:
            for key in [key for key in batch.broken if key not in broken | missing]:
                say(f"left out {key}: {batch.broken[key]}")
            missing |= batch.broken
            refuse_too_many(data, broken | missing, len(data))
            if batch.keys:
                images = in_unit_range(batch).images.to(next(adaptive.tokenizer.parameters()).device)
                tokens, allocation = adaptive.allocate(images, batch.keys)
                writer.add(tokens, batch.keys, batch.labels, part.crop)
                passes += round(allocation.decoder_passes * len(tokens))
            done += len(part.indices)
            progress("images", done, total)
        writer.write(missing, passes)
        broken |= missing
    if done:
        seconds = perf_counter() - began
        say(f"{done:,} images in {seconds:.1f} s, {done / seconds:.1f} images/s")
    return TokenFile(path)


class _Part(NamedTuple):
    """A batch: the file it goes to, and which images at which crop."""

    number: int
    crop: int
    indices: range


class _Reader(Dataset[Batch]):
    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, part: _Part) -> Batch:
        return self.data.read(list(part.indices), epoch=part.crop)


def _plan(images: int, crops: int, files: int, batch_size: int) -> Iterator[_Part]:
    """All rows, evenly over files; a batch ends with its crop and file, to be the same wherever an encoding goes on."""
    row, rows_per_file = 0, ceil(images * crops / files)
    while row < images * crops:
        number, (crop, index) = row // rows_per_file, divmod(row, images)
        count = min(batch_size, images - index, (number + 1) * rows_per_file - row)
        yield _Part(number, crop, range(index, index + count))
        row += count


def _check_crops(data: ImageData, crops: int) -> None:
    if not len(data) or crops < 1:
        raise ValueError(f"there is nothing to encode: {crops} crops of {len(data)} images")
    some = list(range(min(LOOKED_AT, len(data))))
    if crops > 1 and torch.equal(data.fetch(some, 0).images, data.fetch(some, 1).images):
        raise ValueError(
            f"{crops} crops of each image would be so many copies: these images look the same in every epoch. Take one "
            "crop, or a set with random ones"
        )


def _header(
    adaptive: AdaptiveTokenizer, data: ImageData, length: str, crops: int, dtype: str | None, source: Mapping[str, Any]
) -> TokenSet:
    tokenizer, policy = adaptive.tokenizer, adaptive.policy
    vocabulary = tokenizer.quantizer.vocabulary
    if dtype == "codes" and vocabulary is None:
        raise ValueError("this tokenizer has no codes, its tokens are continuous: take dtype float32 or float16")
    keys = sha256()
    for index in range(len(data)):
        keys.update(data.key(index).encode(errors="backslashreplace") + b"\0")
    about = {"images": data.protocol() | {"count": len(data), "keys_sha256": keys.hexdigest()}, "source": source}
    return TokenSet(
        tokenizer=weights_digest(tokenizer.state_dict()),
        contract=tokenizer.contract,
        num_tokens=tokenizer.num_tokens,
        dim=tokenizer.token_dim,
        vocabulary=vocabulary,
        dtype=dtype or ("float32" if vocabulary is None else "codes"),
        normalisation="none",
        image_size=tokenizer.image_size,
        length=length,
        budgets=list(policy.budgets),
        policy=f"{type(policy).__name__} {part_digest(policy)}",
        crops=crops,
        **json.loads(json.dumps(about)),  # as a file gives it back
    )


def _finished(path: Path, paths: Sequence[Path], header: TokenSet) -> dict[int, MappedFile]:
    """The files of this encoding that are there, by number."""
    found = {}
    for file in existing_paths(path):
        if file not in paths:
            raise FileExistsError(f"{file} belongs to another number of files: choose another name, or remove it")
        mapped = MappedFile(file)
        there, wanted = vars(mapped.tokens), vars(header)
        if other := next((name for name in wanted if there[name] != wanted[name]), None):
            difference = f"its {other} is {shorten(str(there[other]), 200)}, not {shorten(str(wanted[other]), 200)}"
            raise FileExistsError(f"{file} was made otherwise: {difference}. Choose another name, or remove it")
        found[paths.index(file)] = mapped
    return found


def check_tokenizer(tokenizer: Tokenizer, file: TokenFile) -> None:
    """Refuse a tokenizer that has not made a file's tokens.

    Raises:
        ValueError: with what differs.
    """
    header, digest = file.header, weights_digest(tokenizer.state_dict())
    if digest != header.tokenizer:
        raise ValueError(
            f"{file.path} was made by another tokenizer: the SHA-256 of its weights is {header.tokenizer[:12]}..., "
            f"here it is {digest[:12]}.... It is from {header.source or 'an unnamed model'}: take that, or encode anew"
        )
    vocabulary = tokenizer.quantizer.vocabulary  # which need not show in weights
    if (vocabulary, tokenizer.num_tokens, tokenizer.token_dim) != (header.vocabulary, header.num_tokens, header.dim):
        raise ValueError(f"{file.path} was made by another tokenizer: with other codes, tokens or channels")


def decode_tokens(
    model: nn.Module,
    file: TokenFile,
    rows: Sequence[int] | None = None,
    length: int | None = None,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Images ``(b, 3, h, w)`` in [0, 1] of a file's rows, a batch at a time and on the CPU.

    Args:
        model: the tokenizer that made them, alone or with a policy, in eval mode; its device is used.
        file: the tokens.
        rows: which, in this order; all unless given.
        length: read at most so many tokens of each.
        batch_size: images at a time.

    Raises:
        TypeError, ValueError: as ``tokenizer_of``; or if the tokens were made by another tokenizer.
    """
    tokenizer, chosen = tokenizer_of(model), range(len(file)) if rows is None else rows
    check_tokenizer(tokenizer, file)
    device = next(tokenizer.parameters()).device

    @torch.no_grad()
    def decoded(some: Sequence[int]) -> Tensor:
        read = file.tokens(some, length)
        lengths = read.lengths.to(device)
        if read.codes is None:
            return tokenizer.decode(Tokens(read.latents.to(device), lengths)).cpu()
        return tokenizer.decode(tokenizer.codes_to_tokens(read.codes.to(device), lengths)).cpu()

    return (decoded(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size))
