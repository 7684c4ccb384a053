"""The bytes of a token file; docs/tokens.md describes them for other programs.

A file is a safetensors file, which any language reads: one header, whose tensors must fill the file exactly, so that
nothing lies outside of it. Which tensors there are, and of which shapes, follows from the counts in our own header.

Codes are one stream of bits, little end first, row behind row, of ceil(log2 K) bits each: code j of the row that begins
with token i of the file is at bit ``(i + j) * bits``. So one list of numbers gives place and length of every row,
reading less of a row is reading less of the stream, and nothing is padded. With K = 256 or 65,536 it is an array of
plain little-endian integers.

Shapes: r rows of a file, t tokens of all its rows together, n tokens of the longest row there may be, d channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_origin, get_type_hints

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.runtime.files import write_bytes

NAME = "adatok.tokens"
"""Under it a file's metadata hold the SHA-256 of a JSON text, a space, and the text."""

VERSION = 1
MAX_HEADER = 1 << 22
MAX_NUMBER = 2**56
"""Of any number in a header. A code of 56 bits, with the bits before it in its first byte, fits into 64."""

MAX_TOKENS = 2**16
"""Of a row: a batch is padded to its longest, which damage must not make endless."""

MAX_FILES = 99_999
MAX_NAMED = 1000
"""Broken images whose names and reasons a header holds."""

DTYPES = {"codes": torch.uint8, "float16": torch.float16, "float32": torch.float32}
PACKED_AT_ONCE = 1 << 16


class TokenFileError(ValueError):
    """A file that holds no tokens, or damaged ones, or those of another version."""


@dataclass(frozen=True)
class TokenSet:
    """How all rows were made; the same in every file of a set.

    Args:
        tokenizer: SHA-256 of its weights, ``runtime.weights.weights_digest``.
        contract: ``truncate`` where a row may be read at any shorter length.
        num_tokens: n.
        dim: d.
        vocabulary: K, or ``None`` where tokens are continuous.
        dtype: one of ``DTYPES``: what is stored.
        normalisation: ``none``: latents are stored as the decoder reads them; ``TokenStatistics`` normalise them.
        image_size: side in pixels.
        length: how lengths were chosen: ``auto``, ``8``, ``quality:0.01``.
        policy: class and SHA-256 of what chose them, its settings and weights.
        budgets: the lengths that it may choose.
        crops: of each image.
        images: which they are: protocol, count, and SHA-256 of their keys.
        source: of the tokenizer, such as its run.

    Raises:
        ValueError: if a value is not of its kind or range.
    """

    tokenizer: str
    contract: str
    num_tokens: int
    dim: int
    vocabulary: int | None
    dtype: str
    normalisation: str
    image_size: int
    length: str
    policy: str
    budgets: list[int]
    crops: int
    images: dict[str, Any]
    source: dict[str, Any]

    def __post_init__(self) -> None:
        _check_kinds(self)
        if min(self.num_tokens, self.dim, self.image_size, self.crops, self.vocabulary or 1) < 1:
            raise ValueError("a size or a number of crops is 0")
        if self.num_tokens > MAX_TOKENS or any(type(budget) is not int for budget in self.budgets):
            raise ValueError(f"{self.num_tokens} tokens, and {MAX_TOKENS} is the most; or a budget that is no number")
        if self.dtype not in DTYPES or self.normalisation != "none" or (self.dtype == "codes" and not self.vocabulary):
            raise ValueError(f"dtype {self.dtype}, normalisation {self.normalisation}, vocabulary {self.vocabulary}")

    @property
    def bits(self) -> int:
        """Of a token in the file: ceil(log2 K), or all channels of a latent."""
        if self.dtype == "codes":
            assert self.vocabulary is not None
            return max(1, (self.vocabulary - 1).bit_length())
        return 8 * self.dim * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """What one file of a set says of itself.

    Args:
        number: which file, from 0.
        of: how many there are.
        num_broken: images that could not be read and are left out.
        broken: the first ``MAX_NAMED`` of them, key and reason.
        decoder_passes: that choosing the lengths took, over all rows.
        sha256: of each tensor's bytes.

    Raises:
        ValueError: if a value is not of its kind or range.
    """

    number: int
    of: int
    num_broken: int
    broken: dict[str, str]
    decoder_passes: int
    sha256: dict[str, str]

    def __post_init__(self) -> None:
        _check_kinds(self)
        if not self.number < self.of <= MAX_FILES:
            raise ValueError(f"file {self.number} of {self.of}, of {MAX_FILES} at most")


@cache
def _kinds(header: type) -> dict[str, Any]:
    hints = get_type_hints(header)
    return {name: hint if isinstance(hint, UnionType) else get_origin(hint) or hint for name, hint in hints.items()}


def _check_kinds(fields: TokenSet | Shard) -> None:
    for name, kind in _kinds(type(fields)).items():  # type: ignore[arg-type]
        value = getattr(fields, name)
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits or (isinstance(value, int) and not 0 <= value <= MAX_NUMBER):
            raise ValueError(f"{name} is {str(value)[:40]}")


def write_file(path: Path, tokens: TokenSet, shard: Shard, content: Mapping[str, NDArray[Any]]) -> None:
    """Write a file, atomically; ``shard.sha256`` is filled in here.

    Raises:
        ValueError: if the description is too long for a header.
        OSError: if the file cannot be written.
    """
    shard = replace(shard, sha256={name: sha256(array.data).hexdigest() for name, array in content.items()})
    text = json.dumps({"version": VERSION, "set": asdict(tokens), "shard": asdict(shard)}, sort_keys=True)
    if len(text) > MAX_HEADER // 4:
        raise ValueError(f"{path}: what is said of its images takes {len(text):,} bytes, more than {MAX_HEADER // 4:,}")
    header = {NAME: f"{sha256(text.encode()).hexdigest()} {text}"}
    write_bytes(path, safetensors.numpy.save(dict(content), header))


class MappedFile:
    """A file of tokens, mapped into memory; opening it reads the header and compares types and shapes.

    Raises:
        TokenFileError: if it is none, cut off, damaged in its header or structure, or of another version.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise self.error("no regular file")
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER:
            raise self.error(f"its header would have {header_bytes:,} bytes, and {MAX_HEADER:,} are read")
        try:
            with safetensors.safe_open(path, "pt") as opened:
                self.tokens, self.shard = _parse((opened.metadata() or {}).get(NAME, ""))
                self._tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                self._check()
        except (safetensors.SafetensorError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise self.error(f"{type(error).__name__}: {error}") from error

    def _check(self) -> None:
        """Compare the tensors' types with the header, and their shapes with the lists of offsets."""
        tokens, is_codes = self.tokens, self.tokens.dtype == "codes"
        types = {"offsets": torch.uint32, "key_offsets": torch.uint32, "keys": torch.uint8}
        types |= {"tokens": DTYPES[tokens.dtype]} | ({} if is_codes else {"statistics": torch.float64})
        types |= {"crops": torch.uint32} if tokens.crops > 1 else {}
        types |= {"labels": torch.int32} if "labels" in self._tensors else {}
        if types != {name: tensor.dtype for name, tensor in self._tensors.items()}:
            raise ValueError("its tensors are not those of its header")
        rows, (total, key_bytes) = len(self), (int(self[name][-1]) for name in ("offsets", "key_offsets"))
        shapes: dict[str, tuple[int, ...]] = {
            "offsets": (rows + 1,),
            "key_offsets": (rows + 1,),
            "keys": (key_bytes,),
            "tokens": ((total * tokens.bits + 7) // 8,) if is_codes else (total, tokens.dim),
            "statistics": (tokens.num_tokens, 1 + 2 * tokens.dim),
            "labels": (rows,),
            "crops": (rows,),
        }
        if any(shapes[name] != tensor.shape for name, tensor in self._tensors.items()):
            raise ValueError("its tensors do not fit each other")
        if self["offsets"][0] != 0 or self["key_offsets"][0] != 0:
            raise ValueError("its offsets do not begin with 0")

    def __len__(self) -> int:
        return len(self._tensors["offsets"]) - 1

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The numbers of a tensor, as they lie in the file."""
        return self._tensors[name].numpy()

    def error(self, what: str) -> TokenFileError:
        """What is wrong with this file."""
        return TokenFileError(f"{self.path} cannot be read as tokens: {what}")

    def spans(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first token ``(b,)`` of each row in the file, and how many it has."""
        first, end = (self["offsets"][each].astype(np.int64) for each in (rows, rows + 1))
        wrong = (end <= first) | (end - first > self.tokens.num_tokens) | (end > self["offsets"][-1])
        if wrong.any():
            row = int(wrong.argmax())
            raise self.error(f"row {rows[row]} is damaged, with tokens from {first[row]} to {end[row]}")
        return first, end - first

    def read(self, places: NDArray[np.int64], kept: NDArray[np.bool_]) -> NDArray[Any]:
        """Codes ``(b, n)`` int64 or latents ``(b, n, d)`` float32 at the places of tokens ``(b, n)``; 0 unless kept."""
        if self.tokens.dtype != "codes":
            latents = self["tokens"].take(places, axis=0, mode="clip")
            return np.where(kept[..., None], latents, 0).astype(np.float32)
        codes = np.where(kept, unpack(self["tokens"], places, self.tokens.bits), 0)
        assert self.tokens.vocabulary is not None
        if codes.max(initial=0) >= self.tokens.vocabulary:
            raise self.error(f"it holds the code {codes.max()}, and there are {self.tokens.vocabulary}")
        return codes

    @cached_property
    def keys(self) -> list[str]:
        """The names of all rows."""
        offsets, names = self["key_offsets"].tolist(), self["keys"].tobytes()
        if offsets != sorted(offsets):
            raise self.error("its key_offsets are damaged: they fall")
        try:
            return [names[start:end].decode() for start, end in pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise self.error(f"its keys are damaged: {error}") from error

    def verify(self) -> None:
        """Compare every tensor with its digest, and look at every row, key and code.

        Raises:
            TokenFileError: for the first that is damaged.
        """
        for name in self._tensors:
            if sha256(self[name].data).hexdigest() != self.shard.sha256.get(name):
                raise self.error(f"its {name} are damaged: their SHA-256 is not that of the header")
        _, lengths = self.spans(np.arange(len(self)))
        if strange := set(lengths.tolist()) - set(self.tokens.budgets):
            raise self.error(f"rows of {min(strange)} tokens, and its budgets are {self.tokens.budgets}")
        for start in range(0, total := int(lengths.sum()), PACKED_AT_ONCE):
            places = np.arange(start, min(start + PACKED_AT_ONCE, total))
            self.read(places, np.ones(len(places), np.bool_))
        assert len(self.keys) == len(self)


def _parse(text: str) -> tuple[TokenSet, Shard]:
    digest, _, content = text.partition(" ")
    if not text:
        raise ValueError(f"it has no header {NAME}, so it is a safetensors file of something else")
    if sha256(content.encode()).hexdigest() != digest:
        raise ValueError("its header is damaged")
    fields = json.loads(content)
    if fields["version"] != VERSION:
        raise ValueError(f"it has version {str(fields['version'])[:20]}, and this code reads {VERSION}: encode anew")
    return TokenSet(**fields["set"]), Shard(**fields["shard"])


def pack(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Codes ``(t,)`` below ``2 ** bits`` -> the bytes of the stream."""
    packed = [np.zeros(0, np.uint8)]
    for start in range(0, len(codes), PACKED_AT_ONCE):  # which fills whole bytes
        part = codes[start : start + PACKED_AT_ONCE].astype("<u8").view(np.uint8).reshape(-1, 8)
        packed.append(np.packbits(np.unpackbits(part, axis=1, bitorder="little")[:, :bits], bitorder="little"))
    return np.concatenate(packed)


def unpack(stream: NDArray[np.uint8], places: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Bytes of a stream and places of codes, of any shape -> codes of that shape; anything behind the end."""
    first, shift = np.divmod(places * bits, 8)
    value = np.zeros(places.shape, np.uint64)
    for number in range((bits + 14) // 8):  # bytes that a code may reach into
        value |= stream.take(first + number, mode="clip").astype(np.uint64) << np.uint64(8 * number)
    return ((value >> shift.astype(np.uint64)) & np.uint64(2**bits - 1)).astype(np.int64)
