"""A tokenizer whose errors are known by hand: tokens are coefficients of an orthonormal basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from framework.data.interface import Batch, ImageData
from framework.tokenizers.interface import Contract, Quantized, Quantizer
from framework.tokenizers.masking import FullLength
from framework.tokenizers.quantizers.identity import Identity
from framework.tokenizers.spaces import PixelSpace
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens


class BasisTokenizer(nn.Module):
    """n tokens of d coefficients around a mean; the basis ``(v, n * d)`` is orthonormal."""

    def __init__(self, mean: Tensor, basis: Tensor, token_dim: int, contract: Contract = "truncate") -> None:
        super().__init__()
        self.mean, self.basis = nn.Parameter(mean), nn.Parameter(basis)
        self.image_size = round((len(mean) / 3) ** 0.5)
        self.token_dim = token_dim
        self.num_tokens = basis.shape[1] // token_dim
        self.contract = contract
        self.quantizer = Identity(token_dim)
        self.output_space = PixelSpace()
        self.encoder, self.decoder, self.masking = nn.Identity(), nn.Identity(), FullLength()
        self.encodings = 0  # calls
        self.decoded = 0  # images

    def encode(self, images: Tensor, length: int | None = None) -> Tokens:
        self.encodings += 1
        scores = (rearrange(images, "b c h w -> b (c h w)") - self.mean) @ self.basis
        latents = rearrange(scores, "b (n d) -> b n d", d=self.token_dim)
        return Tokens(latents, torch.full((len(images),), self.num_tokens if length is None else length))

    def decode(self, tokens: Tokens) -> Tensor:
        self.decoded += len(tokens)
        scores = rearrange(tokens.latents * tokens.mask[..., None], "b n d -> b (n d)")
        values = scores @ self.basis.T + self.mean
        return rearrange(values, "b (c h w) -> b c h w", c=3, h=self.image_size).clamp(0, 1)


def basis_tokenizer(mean: Tensor, basis: Tensor, token_dim: int, contract: Contract = "truncate") -> Tokenizer:
    """In eval mode, and typed as what it stands for."""
    return cast(Tokenizer, BasisTokenizer(mean, basis, token_dim, contract).eval())


class SignQuantizer(Quantizer):
    """2 ** d codes: the signs of d channels, the first the least."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.vocabulary: int = 2**dim

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        signs = torch.where(latents > 0, 1.0, -1.0)
        return Quantized(latents + (signs - latents).detach(), self.latents_to_codes(signs))

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return (codes[..., None] >> torch.arange(self.dim)) % 2 * 2.0 - 1

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        return ((latents > 0).long() << torch.arange(self.dim)).sum(-1)


class FixedImages(ImageData):
    """Given images ``(i, 3, s, s)`` in given groups; a whole photograph is the group's first image, tiled."""

    def __init__(self, images: Tensor, groups: Sequence[str], kinds: Sequence[str] | None = None) -> None:
        self.images, self.groups, self.kinds = images, list(groups), kinds
        self.image_size = images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        keys = [f"{self.groups[i]}@{i},0" for i in indices]
        kinds = None if self.kinds is None else [self.kinds[i] for i in indices]
        return Batch(self.images[list(indices)], keys, [self.groups[i] for i in indices], kinds=kinds)

    def whole(self, group: str) -> Tensor:
        return self.images[self.groups.index(group)].tile(1, 2, 3)

    def protocol(self) -> dict[str, object]:
        return {"source": "given images"}


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """A random basis ``(rows, columns)`` with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).Q
