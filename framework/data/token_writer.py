"""Writes tokens to disk, a file of a set at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from framework.data.token_format import DTYPES, MAX_NAMED, Shard, TokenSet, pack, write_file
from framework.data.token_statistics import TokenStatistics
from framework.tokens import Tokens


class TokenWriter:
    """Collects rows in memory, and writes them as one file of a set.

    Args:
        path: of the file, which is replaced if it exists.
        header: how the tokens are made.
        number: which file of the set, from 0.
        of: how many files the set has.
    """

    def __init__(self, path: str | Path, header: TokenSet, number: int = 0, of: int = 1) -> None:
        self.path = Path(path)
        self.header = header
        self.number, self.of = number, of
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._keys: list[bytes] = []
        self._labels: list[int] = []
        self._crops: list[int] = []
        self._statistics = TokenStatistics(torch.zeros(header.num_tokens, 1 + 2 * header.dim, dtype=torch.float64))

    def add(self, tokens: Tokens, keys: Sequence[str], labels: Tensor | None = None, crop: int = 0) -> None:
        """Append rows.

        Args:
            tokens: of b images, on any device.
            keys: their names.
            labels: ``(b,)``, of all rows of a set or of none.
            crop: which crop of their images they are.

        Raises:
            ValueError: if tokens do not fit the header, or cannot be stored as it says.
        """
        lengths = tokens.lengths.tolist()
        if strange := set(lengths) - set(self.header.budgets):
            raise ValueError(f"lengths {sorted(strange)} are none of the header's budgets {self.header.budgets}")
        if self._lengths and bool(self._labels) != (labels is not None):
            raise ValueError("either all rows have labels or none")
        if len(keys) != len(tokens) or (labels is not None and len(labels) != len(tokens)):
            raise ValueError(f"{len(tokens)} rows need as many keys and labels, got {len(keys)} keys")
        if labels is not None and (labels.int() != labels).any():
            raise ValueError("labels are whole numbers of 32 bits")
        if not 0 <= crop < self.header.crops:
            raise ValueError(f"crops go from 0 to {self.header.crops - 1}, got {crop}")
        self._values.append(self._codes(tokens) if self.header.dtype == "codes" else self._latents(tokens, keys))
        self._lengths += lengths
        self._keys += [key.encode(errors="backslashreplace") for key in keys]
        self._labels += [] if labels is None else labels.tolist()
        self._crops += [crop] * len(keys)

    def write(self, broken: Mapping[str, str] | None = None, decoder_passes: int = 0) -> None:
        """Write the file, atomically.

        Args:
            broken: images that could not be read, with the reason.
            decoder_passes: that choosing the lengths took, over all rows.

        Raises:
            ValueError: if there is more than a file holds: 2^32 tokens or bytes of keys.
            OSError: if it cannot be written.
        """
        header, broken, is_codes = self.header, broken or {}, self.header.dtype == "codes"
        offsets, key_offsets = (np.cumsum([0, *sizes]) for sizes in (self._lengths, map(len, self._keys)))
        if max(offsets[-1], key_offsets[-1]) >= 2**32:
            raise ValueError(f"{self.path}: a file holds less than 2^32 tokens and bytes of keys; write more files")
        named = dict(islice(broken.items(), MAX_NAMED))
        shard = Shard(self.number, self.of, len(broken), named, decoder_passes, {})
        none = torch.zeros(0, dtype=torch.int64) if is_codes else torch.zeros(0, header.dim, dtype=DTYPES[header.dtype])
        values = torch.cat([none, *self._values]).numpy()
        content: dict[str, NDArray[Any]] = {
            "offsets": offsets.astype(np.uint32),
            "tokens": pack(values, header.bits) if is_codes else values,
            "keys": np.frombuffer(b"".join(self._keys), np.uint8),
            "key_offsets": key_offsets.astype(np.uint32),
        }
        content |= {} if is_codes else {"statistics": self._statistics.sums.numpy()}
        content |= {"labels": np.array(self._labels, np.int32)} if self._labels else {}
        content |= {"crops": np.array(self._crops, np.uint32)} if header.crops > 1 else {}
        write_file(self.path, header, shard, content)

    def _codes(self, tokens: Tokens) -> Tensor:
        vocabulary = self.header.vocabulary
        if tokens.codes is None or vocabulary is None:
            raise ValueError("the header says codes, and these tokens are continuous")
        kept = tokens.codes[tokens.mask].cpu()
        if len(wrong := kept[(kept < 0) | (kept >= vocabulary)]):
            raise ValueError(f"codes go from 0 to {vocabulary - 1}, got {int(wrong[0])}")
        return kept

    def _latents(self, tokens: Tokens, keys: Sequence[str]) -> Tensor:
        if tokens.latents.shape[2] != self.header.dim:
            raise ValueError(f"latents have {tokens.latents.shape[2]} channels, and the header says {self.header.dim}")
        mask = tokens.mask.cpu()
        stored = tokens.latents.cpu().to(DTYPES[self.header.dtype]).masked_fill(~mask[..., None], 0)
        if len(bad := (~stored.isfinite()).any(2).any(1).nonzero()):
            raise ValueError(
                f"latents of {len(bad)} of {len(keys)} images are not finite in {self.header.dtype}, first of "
                f"{keys[int(bad[0])]}: take float32, or weights that have not diverged"
            )
        behind = self.header.num_tokens - stored.shape[1]
        self._statistics += TokenStatistics.of(pad(stored, (0, 0, 0, behind)), pad(mask, (0, behind)))
        return stored[mask]
