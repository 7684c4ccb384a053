"""Small token files with known rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.data.token_format import TokenSet
from framework.data.token_writer import TokenWriter
from framework.tokens import Tokens

N = 6


def header(**changes: Any) -> TokenSet:
    """Codes of a vocabulary of 1,000, up to 6 a row."""
    usual: dict[str, Any] = {
        "tokenizer": "ab" * 32,
        "contract": "truncate",
        "num_tokens": N,
        "dim": 3,
        "vocabulary": 1000,
        "dtype": "codes",
        "normalisation": "none",
        "image_size": 16,
        "length": "auto",
        "policy": "LearnedPolicy",
        "budgets": list(range(1, N + 1)),
        "crops": 1,
        "images": {"source": "a test"},
        "source": {"run": "runs/test"},
    }
    return TokenSet(**usual | changes)


def some_tokens(rows: int, vocabulary: int = 1000, dim: int = 3, seed: int = 0) -> Tokens:
    """Random codes and latents of random lengths; what stands behind a length is no padding but noise."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(rows, N, generator=generator, dtype=torch.float64) * vocabulary).long()
    latents = torch.randn(rows, N, dim, generator=generator) * torch.linspace(3, 0.1, N)[:, None] + 1
    return Tokens(latents, torch.randint(1, N + 1, (rows,), generator=generator), codes)


def written(path: Path, tokens: Tokens, made: TokenSet, files: int = 1, labels: Tensor | None = None) -> Path:
    """Rows in files of equal size, each file in two batches, named ``image 0``, ..."""
    size = -(-len(tokens) // files)
    for number in range(files):
        name = path if files == 1 else path.with_name(f"{path.name}-{number:05}-of-{files:05}")
        writer = TokenWriter(name, made, number, files)
        for start in (number * size, number * size + size // 2):
            stop = start + size // 2 if start == number * size else min(len(tokens), (number + 1) * size)
            rows = torch.arange(start, stop)
            keys = [f"image {row} ü" for row in rows.tolist()]
            writer.add(tokens.select(rows), keys, None if labels is None else labels[rows])
        writer.write({f"bad {number}": "cut off"}, decoder_passes=number)
    return path
