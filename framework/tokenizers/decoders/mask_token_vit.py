"""A ViT that fills mask tokens at the patches' positions from the kept tokens.

TiTok (Yu et al. 2024); with dropped tokens masked in attention it is AdaTok's decoder (section 4.1).

Shapes: b batch, p positions, n tokens, d channels of a token, w width.
"""

from __future__ import annotations

from bisect import bisect_left
from copy import deepcopy

import torch
from einops import repeat
from torch import Tensor, nn

from framework.config.registry import Factory
from framework.nn.attention import mask_to_bias
from framework.nn.lora import LowRankHeads
from framework.nn.positions import resize_positions, sincos_2d
from framework.nn.transformer import BlockOptions, Linear, Transformer, init_linear
from framework.tokenizers.decoders.dropping import DROP_MODES, DropMode
from framework.tokenizers.decoders.multi_head_lora import MultiHeadLoRA
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
        lora: corrections of the linear layers for each range of lengths; ``null`` for one decoder for all lengths.
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
        lora: MultiHeadLoRA | None = None,
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
        # Last, so that from one seed all drop modes, with LoRA and without, start with the same other weights.
        self.drop = DROP_MODES[drop_mode](token_dim=token_dim, num_tokens=num_tokens, width=width)
        self.lengths = range(1, num_tokens + 1)
        self.last_lengths = [num_tokens] if lora is None else lora.last_lengths(num_tokens)
        if lora is not None:
            lora.adapt([self.transformer, self.head], num_heads=len(self.last_lengths))

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens -> values ``(b, c, h, w)``; tokens behind a length change nothing, not in the last bit.

        Raises:
            ValueError: if this is the merged decoder of a range, and a length is not in it.
        """
        if len(self.lengths) < self.drop.num_tokens:
            shortest, longest = torch.stack([tokens.lengths.amin(), tokens.lengths.amax()]).tolist()
            if shortest not in self.lengths or longest not in self.lengths:
                raise ValueError(
                    f"this decoder was merged for lengths from {self.lengths[0]} to {self.lengths[-1]}, got some from "
                    f"{shortest} to {longest}: the decoder it was merged from takes them all"
                )
        return self.drop(tokens, self._embed, self._decode)

    def resize(self, positions: tuple[int, int]) -> None:
        """Decode to another grid of patches from now on; the patches' learned positions are interpolated."""
        resized = resize_positions(self.patch_positions.detach(), self.positions, positions)
        self.patch_positions = nn.Parameter(resized, requires_grad=self.patch_positions.requires_grad)
        self.positions = positions

    def merged(self, length: int) -> Decoder:
        """A copy for the range of ``length`` with that range's adapters folded into the weights; see ``Decoder``."""
        if not _adapted(self):
            return super().merged(length)
        if length not in self.lengths:
            raise ValueError(f"a length is from 1 to {self.lengths[-1]} tokens, got {length}")
        head = bisect_left(self.last_lengths, length)
        copy = deepcopy(self)
        copy.lengths = range([0, *self.last_lengths][head] + 1, self.last_lengths[head] + 1)
        for layer, adapter in _adapted(copy):
            with torch.no_grad():
                layer.weight += adapter.weight(head)
            layer.adapter = None
        return copy

    def _embed(self, latents: Tensor) -> Tensor:
        return self.token_embedding(latents) + self.token_positions[: latents.shape[1]]

    def _decode(self, tokens: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        bias, route = None, None
        if mask is not None:
            patches_kept = mask.new_ones(len(mask), self.patch_positions.shape[0])
            bias = mask_to_bias(torch.cat([patches_kept, mask], dim=1))[:, None, None, :]
        if _adapted(self):
            route = torch.bucketize(lengths, torch.tensor(self.last_lengths[:-1], device=lengths.device))
        patches = repeat(self.mask_token + self.patch_positions, "p w -> b p w", b=len(tokens))
        states = self.transformer(torch.cat([patches, tokens], dim=1), bias, route)[:, : patches.shape[1]]
        # A head without adapters need not know of routes.
        return self.head(states, self.positions, route) if _adapted(self.head) else self.head(states, self.positions)


def _adapted(part: nn.Module) -> list[tuple[Linear, LowRankHeads]]:
    """The linear layers that have adapters, with them."""
    layers = [module for module in part.modules() if isinstance(module, Linear)]
    return [(layer, layer.adapter) for layer in layers if isinstance(layer.adapter, LowRankHeads)]
