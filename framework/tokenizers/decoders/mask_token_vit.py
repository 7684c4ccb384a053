"""A ViT that fills mask tokens at the patches' positions from the kept tokens.

TiTok (Yu et al. 2024); with dropped tokens masked in attention it is AdaTok's decoder (section 4.1).

Shapes: b batch, p positions, n tokens, d channels of a token, w width.
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from framework.config.registry import Factory
from framework.nn.attention import mask_to_bias
from framework.nn.positions import resize_positions, sincos_2d
from framework.nn.transformer import BlockOptions, Transformer, init_linear
from framework.tokenizers.decoders.dropping import DROP_MODES, DropMode
from framework.tokenizers.interface import DECODERS, Decoder, Head
from framework.tokens import Tokens


@DECODERS.register()
class MaskTokenViT(Decoder):
    """Mask tokens, then the kept tokens, through pre-norm blocks; a head turns the mask tokens' states into values.

    Args:
        head: from states at positions to values.
        width: w.
        depth: number of blocks.
        num_heads: attention heads; must divide ``width``.
        drop_mode: what becomes of tokens behind a length. ``key_padding`` (AdaTok) decodes one padded batch, cut to its
            longest kept length; ``remove`` (One-D-Piece) one dense batch for each distinct length; they compute the
            same function. ``mask_token`` (FlexTok), ``null_token`` (Semanticist) and ``zero`` (ElasticTok) put
            something in the place of dropped tokens and always decode all n, which saves nothing.
        blocks: the blocks' switches.
        token_dim: d.
        num_tokens: n, the longest token sequence.
        positions: rows and columns of the grid of patches.
        out_channels: channels of the output space.
        patch_size: side of a patch in steps of the output space's grid.
    """

    def __init__(
        self,
        head: Factory[Head],
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        drop_mode: DropMode = "key_padding",
        blocks: BlockOptions = BlockOptions(),  # noqa: B008 - read only
        *,
        token_dim: int,
        num_tokens: int,
        positions: tuple[int, int],
        out_channels: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.token_embedding = nn.Linear(token_dim, width)
        self.token_positions = nn.Parameter(torch.randn(num_tokens, width))
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.patch_positions = nn.Parameter(sincos_2d(positions, width))
        self.transformer = Transformer(width, depth, num_heads, blocks)
        self.head = head(width=width, out_channels=out_channels, patch_size=patch_size)
        init_linear(self.token_embedding)
        # Last, so that from one seed all drop modes start with the same other weights.
        self.drop = DROP_MODES[drop_mode](token_dim=token_dim, num_tokens=num_tokens, width=width)

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens -> values ``(b, c, h, w)``; tokens behind a length change nothing, not in the last bit."""
        return self.drop(tokens, self._embed, self._decode)

    def resize(self, positions: tuple[int, int]) -> None:
        """Decode to another grid of patches from now on; the patches' learned positions are interpolated."""
        resized = resize_positions(self.patch_positions.detach(), self.positions, positions)
        self.patch_positions = nn.Parameter(resized, requires_grad=self.patch_positions.requires_grad)
        self.positions = positions

    def _embed(self, latents: Tensor) -> Tensor:
        return self.token_embedding(latents) + self.token_positions[: latents.shape[1]]

    def _decode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        bias = None
        if mask is not None:
            patches_kept = mask.new_ones(len(mask), self.patch_positions.shape[0])
            bias = mask_to_bias(torch.cat([patches_kept, mask], dim=1))[:, None, None, :]
        patches = repeat(self.mask_token + self.patch_positions, "p w -> b p w", b=len(tokens))
        states = self.transformer(torch.cat([patches, tokens], dim=1), bias)
        return self.head(states[:, : patches.shape[1]], self.positions)
