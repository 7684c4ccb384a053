"""Tokens on disk, read by row: neither the images nor the model are needed.

A set is one file, or several named ``photos.tokens-00000-of-00004`` that are opened together as ``photos.tokens``.

Shapes: b rows asked for, r rows of the set, n tokens of the longest of them, d channels of a latent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from math import log2
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.data.token_format import MappedFile, TokenSet
from framework.data.token_format import TokenFileError as TokenFileError
from framework.data.token_statistics import TokenStatistics
from framework.tokens import Tokens

Rows = Sequence[int] | NDArray[np.integer] | Tensor


def shard_paths(path: Path, of: int) -> list[Path]:
    """The names of a set's files: ``path`` itself if it is one."""
    return [path] if of == 1 else [path.with_name(f"{path.name}-{number:05}-of-{of:05}") for number in range(of)]


def existing_paths(path: Path) -> list[Path]:
    """The files that a set of this name has so far, in order; also those of another number of files."""
    named = re.compile(re.escape(path.name) + r"(-\d{5,}-of-\d{5,})?")
    return sorted(file for file in path.parent.glob("*") if named.fullmatch(file.name))


class TokenFile:
    """Rows of tokens, each at its own length, with keys, labels and crop numbers; nothing is read before it is asked.

    It may be handed to loader workers: each maps the files anew.

    Args:
        path: of the file, or of the set without ``-00000-of-00004``. One file of a set may be opened alone.

    Attributes:
        header: how the tokens were made.

    Raises:
        FileNotFoundError: if there is no such file, or files of the set are missing.
        TokenFileError: if a file is damaged in its structure, of another version or none, or files do not fit each
            other. Other damage is found by ``verify``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = existing_paths(self.path)
        if not found:
            raise FileNotFoundError(f"there are no tokens at {self.path}: neither this file nor {self.path}-*-of-*")
        self.files = [MappedFile(file) for file in found]
        first = self.files[0]
        self.header: TokenSet = first.tokens
        if found != [self.path]:
            self._check_set(found, first.shard.of)
        self._ends = np.cumsum([len(file) for file in self.files])

    def __reduce__(self) -> tuple[type[TokenFile], tuple[Path]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, rows: Rows, length: int | Sequence[int] | Tensor | None = None) -> Tokens:
        """The rows at these numbers, in this order, padded with 0 to the longest of them.

        Where tokens are codes, latents are ``(b, n, 0)``: ``tokenizer.codes_to_tokens(tokens.codes, tokens.lengths)``
        has them.

        Args:
            rows: ``(b,)``, from 0.
            length: read at most so many tokens of each row: one number, or one for each.

        Raises:
            IndexError: if there is no such row.
            ValueError: if a length is below 1, or the tokenizer does not allow shorter readings.
            TokenFileError: if one of the rows is damaged.
        """
        numbers = self._numbers(rows)
        of_file = np.searchsorted(self._ends, numbers, side="right")
        first, own = np.empty((2, len(numbers)), np.int64)
        chosen = {number: np.nonzero(of_file == number)[0] for number in np.unique(of_file)}
        for number, each in chosen.items():
            before = self._ends[number] - len(self.files[number])
            first[each], own[each] = self.files[number].spans(numbers[each] - before)
        lengths = self._shortened(own, length)
        steps = np.arange(lengths.max(initial=0))
        kept = steps < lengths[:, None]
        is_codes = self.header.dtype == "codes"
        values = np.zeros(kept.shape, np.int64) if is_codes else np.zeros((*kept.shape, self.header.dim), np.float32)
        for number, each in chosen.items():
            values[each] = self.files[number].read(first[each, None] + steps, kept[each])
        read = torch.from_numpy(values)
        latents, codes = (torch.zeros(*kept.shape, 0), read) if is_codes else (read, None)
        return Tokens(latents, torch.from_numpy(lengths), codes)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of every row, ``(r,)`` int64."""
        spans = [file.spans(np.arange(len(file)))[1] for file in self.files]
        return torch.from_numpy(np.concatenate(spans))

    @cached_property
    def labels(self) -> Tensor | None:
        """Classes of every row, ``(r,)`` int64; ``None`` where the images had none."""
        filled = [file for file in self.files if len(file)]
        if not filled or any("labels" not in file for file in filled):
            return None
        return torch.from_numpy(np.concatenate([file["labels"] for file in filled]).astype(np.int64))

    @cached_property
    def crops(self) -> Tensor:
        """Which crop of its image every row is, ``(r,)`` int64, from 0."""
        if self.header.crops == 1:
            return torch.zeros(len(self), dtype=torch.int64)
        return torch.from_numpy(np.concatenate([file["crops"] for file in self.files]).astype(np.int64))

    @cached_property
    def keys(self) -> list[str]:
        """The name of the image of every row."""
        return [key for file in self.files for key in file.keys]

    @cached_property
    def statistics(self) -> TokenStatistics | None:
        """Of the latents of all rows; ``None`` of codes."""
        if self.header.dtype == "codes":
            return None
        return TokenStatistics(torch.from_numpy(sum(file["statistics"] for file in self.files)))

    @property
    def broken(self) -> dict[str, str]:
        """Images that could not be read and have no rows, with the reason; at most ``MAX_NAMED`` of each file."""
        return {key: reason for file in self.files for key, reason in file.shard.broken.items()}

    def verify(self, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> None:
        """Read everything and compare it with the digests.

        Raises:
            TokenFileError: for the first thing that is damaged.
        """
        for done, file in enumerate(self.files, 1):
            file.verify()
            progress("files", done, len(self.files))

    def lines(self) -> list[str]:
        """What is in it, in words."""
        header, rows, files = self.header, max(1, len(self)), [file.shard for file in self.files]
        mean = sum(int(file["offsets"][-1]) for file in self.files) / rows
        size = sum(file.path.stat().st_size for file in self.files)
        kind, information = f"latents of {header.dim} channels, {header.dtype}", ""
        if header.dtype == "codes":
            assert header.vocabulary is not None
            kind = f"codes of {header.vocabulary:,}, {header.bits} bits each"
            information = f", log2 {header.vocabulary:,} a token would be {mean * log2(header.vocabulary):.1f}"
        passes, broken = sum(shard.decoder_passes for shard in files), sum(shard.num_broken for shard in files)
        return [
            f"{self.path}: {len(self):,} rows, {size:,} bytes in {len(files)} of {files[0].of} files",
            f"images   {header.image_size}x{header.image_size} pixels, crops of each: {header.crops}",
            *(f"         {name}: {value!r}" for name, value in header.images.items()),
            f"left out {broken} that could not be read",
            *(f"         {key!r}: {reason!r}" for key, reason in islice(self.broken.items(), 5)),
            f"tokens   {kind}; {mean:.2f} a row on average, {header.num_tokens} at most",
            f"size     {mean * header.bits:.1f} bits of tokens a row{information}; {8 * size / rows:.1f} of file",
            f"lengths  {header.length!r} by {header.policy!r}, {passes / rows:.2f} decoder passes a row",
            f"source   {header.source!r}, SHA-256 of the weights {header.tokenizer!r}",
        ]

    def _numbers(self, rows: Rows) -> NDArray[np.int64]:
        numbers = np.asarray(rows)
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise IndexError(f"rows are a list of whole numbers, got {numbers.dtype} of shape {numbers.shape}")
        wrong = (numbers < 0) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"there is no row {numbers[wrong][0]}: {self.path} has rows 0 to {len(self) - 1}")
        return numbers.astype(np.int64)

    def _shortened(self, own: NDArray[np.int64], length: int | Sequence[int] | Tensor | None) -> NDArray[np.int64]:
        if length is None:
            return own
        wanted = np.asarray(length)
        if wanted.dtype.kind not in "iu" or wanted.shape not in ((), own.shape) or wanted.min(initial=1) < 1:
            raise ValueError(f"length is a number from 1, or one for each of {len(own)} rows; got {length}")
        shortened = np.minimum(own, wanted.astype(np.int64))
        if self.header.contract != "truncate" and (shortened < own).any():
            raise ValueError(
                f"{self.path} cannot be read at other lengths: its tokenizer's contract is {self.header.contract}, "
                "so shorter rows are encoded anew"
            )
        return shortened

    def _check_set(self, found: list[Path], of: int) -> None:
        expected = shard_paths(self.path, of)
        if others := [file for file in found if file not in expected]:
            both = f"{others[0].name} and {found[0].name} are of different sets"
            raise TokenFileError(f"{self.path} is ambiguous: {both}; move one away")
        if missing := [file for file in expected if file not in found]:
            first = f"{len(missing)} of {of} files are missing, first {missing[0]}"
            raise FileNotFoundError(f"{first}: the command that wrote the others goes on where it stopped")
        for number, file in enumerate(self.files):
            if (file.shard.number, file.shard.of) != (number, of) or file.tokens != self.header:
                which = f"file {file.shard.number} of {file.shard.of}"
                raise file.error(f"it is {which} of another set than {found[0].name}, or has another's name")

