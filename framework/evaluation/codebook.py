"""How a discrete tokenizer uses its codebook, counted over a data set: over all tokens, and at each position.

Shapes: b images of a batch, n tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import log, log2
from typing import Any

import torch
from torch import Tensor

from framework.data.interface import Batch
from framework.tokenizers.tokenizer import Tokenizer

DEFINITIONS = {
    "tokens": "how many were counted, of each measured image all at full length, among vocabulary = K codes",
    "per_position": "the same numbers for each token of the sequence, from one token of every image",
    "usage": "share of the K codes that were seen at least once; dead_codes is the number of the others",
    "entropy": "bits, of the shares of the codes among the counted tokens",
    "perplexity": "2 to the power of the entropy: K where all codes are equally common, 1 where there is one",
    "few_tokens": "said where fewer than 16000 tokens in all, or fewer than 10 for each code in all or at a position, "
    "were counted: so small a sample has lower usage and perplexity than many images have",
}
MIN_TOKENS = 16_000
MIN_TOKENS_PER_CODE = 10


class CodebookStatistics:
    """Counts of codes; see ``DEFINITIONS``.

    Args:
        num_tokens: n.
        vocabulary: K.

    Attributes:
        counts: ``(n, K)`` int32, on the CPU; 66 MB for 256 tokens and 64,000 codes.
    """

    def __init__(self, num_tokens: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.counts = torch.zeros(num_tokens, vocabulary, dtype=torch.int32)

    def add(self, codes: Tensor) -> None:
        """Count codes ``(b, n)`` int64."""
        by_position = codes.T.cpu()
        self.counts.scatter_add_(1, by_position, torch.ones_like(by_position, dtype=torch.int32))

    def counting(self, tokenizer: Tokenizer, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Hand batches on, and count the codes of each once it has been used."""
        for batch in batches:
            yield batch
            with torch.no_grad():
                codes = tokenizer.encode(batch.images.to(next(tokenizer.parameters()).device)).codes
            assert codes is not None, "a quantizer with a vocabulary gives codes"
            self.add(codes)

    @property
    def num_images(self) -> int:
        """How many images were counted."""
        return int(self.counts[0].sum())

    @property
    def shares(self) -> Tensor:
        """Of each code among all tokens, ``(K,)`` float64."""
        return _shares(self.counts.sum(0))

    def overall(self) -> dict[str, float]:
        """``usage``, ``dead_codes``, ``entropy`` and ``perplexity`` over all tokens."""
        return _numbers(self.shares)

    def per_position(self) -> dict[str, list[float]]:
        """The numbers of ``overall`` for each position."""
        rows = [_numbers(_shares(counts)) for counts in self.counts]  # one by one: a float64 copy of all would be large
        return {name: [row[name] for row in rows] for name in rows[0]}

    def summary(self) -> dict[str, Any]:
        """``DEFINITIONS`` and every number that they explain; plain JSON types only."""
        return {
            "definitions": DEFINITIONS,
            "vocabulary": self.vocabulary,
            "bits_per_token": log2(self.vocabulary),
            "tokens": self.num_images * len(self.counts),
            "few_tokens": self._few_tokens(),
            **self.overall(),
            "per_position": self.per_position(),
        }

    def _few_tokens(self) -> str | None:
        found, wanted = self.num_images, MIN_TOKENS_PER_CODE * self.vocabulary
        pairs = {"in all": (found * len(self.counts), max(MIN_TOKENS, wanted)), "at each position": (found, wanted)}
        few = [f"{found:,} {where} (of {least:,} wanted)" for where, (found, least) in pairs.items() if found < least]
        told = f"Few tokens for {self.vocabulary:,} codes, so usage and perplexity come out lower than they are"
        return f"{told}: {', '.join(few)}." if few else None


def _shares(counts: Tensor) -> Tensor:
    return counts.double() / counts.sum()


def _numbers(shares: Tensor) -> dict[str, float]:
    nats = torch.special.entr(shares).sum()
    seen = int((shares > 0).sum())
    counted = {"usage": seen / len(shares), "dead_codes": len(shares) - seen}
    return counted | {"entropy": nats.item() / log(2), "perplexity": nats.exp().item()}
