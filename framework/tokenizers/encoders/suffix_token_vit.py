"""A ViT whose learned latent tokens stand behind the patches and become the image's tokens.

TiTok (Yu et al. 2024) and AdaTok (section 4.1): patches and n learned queries run through one transformer; what the
queries have become is read out as tokens.

Shapes: b batch, p patches, n latent tokens, w width, d channels of a token.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from framework.nn.attention import mask_to_bias
from framework.nn.positions import resize_positions, sincos_2d
from framework.nn.transformer import BlockOptions, Transformer, init_linear
from framework.tokenizers.encoders.patches import patch_grid, patchify
from framework.tokenizers.interface import ENCODERS, Encoder, Encoding


def latents_causal_mask(num_patches: int, num_tokens: int) -> Tensor:
    """Bool ``(p + n, p + n)``: patches see patches; latent i sees all patches and latents up to i (FlexTok)."""
    mask = torch.zeros(num_patches + num_tokens, num_patches + num_tokens, dtype=torch.bool)
    mask[:, :num_patches] = True
    mask[num_patches:, num_patches:] = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    return mask


@ENCODERS.register()
class SuffixTokenViT(Encoder):
    """Patches, then learned latent tokens as a suffix, through pre-norm blocks; the suffix is the token sequence.

    Args:
        num_tokens: n, the longest token sequence.
        patch_size: side of a patch in steps of the input space's grid (pixels, for PixelSpace).
        width: w.
        depth: number of blocks.
        num_heads: attention heads; must divide ``width``.
        attention: ``full``, or ``latents_causal``, where patches do not see latents and a latent sees only earlier
            ones, so that a token cannot hold what later ones gathered (FlexTok, Semanticist).
        blocks: the blocks' switches.
        readout: what a token is made of. ``own``: its latent's state. ``interleaved``: token i takes w / n channels of
            every latent's state, the flat states' numbers i, i + n, i + 2n and so on. That is how TiTok (L-32, B-64,
            S-128) and One-D-Piece, whose code reshapes without transposing, read them, and only for their weights.
        in_channels: channels of the input space.
        grid_size: rows and columns of the input space.
        out_dim: d.

    Raises:
        ValueError: if the grid is not a multiple of the patch.
    """

    contract = "truncate"

    def __init__(
        self,
        num_tokens: int,
        patch_size: int = 8,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        attention: Literal["full", "latents_causal"] = "full",
        blocks: BlockOptions = BlockOptions(),  # noqa: B008 - read only
        readout: Literal["own", "interleaved"] = "own",
        *,
        in_channels: int,
        grid_size: tuple[int, int],
        out_dim: int,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.patch_size = patch_size
        self.positions = patch_grid(grid_size, patch_size)
        self.feature_dim = 3 * width
        self.attention = attention
        self.readout = readout
        self.patch_embedding = nn.Linear(in_channels * patch_size**2, width)
        # Positions and queries start at unit scale: at 0.02 the model stays for hundreds of steps at the mean colour,
        # since it cannot tell its tokens apart.
        self.patch_positions = nn.Parameter(sincos_2d(self.positions, width))
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, width))
        self.transformer = Transformer(width, depth, num_heads, blocks)
        self.to_latents = nn.Linear(width, out_dim)
        init_linear(self.patch_embedding)
        init_linear(self.to_latents)
        self.register_buffer("bias", self._bias(), persistent=False)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Encoding:
        """Values ``(b, c, rows, columns)`` -> latents ``(b, n, d)`` and features ``(b, 3w)``; lengths are not read.

        Features are the mean and standard deviation of the patches' states and the mean of the latents' states.
        """
        patches = self.patch_embedding(patchify(values, self.patch_size)) + self.patch_positions
        suffix = repeat(self.latent_tokens, "n w -> b n w", b=len(values))
        states = self.transformer(torch.cat([patches, suffix], dim=1), self.bias)
        patch_states, latent_states = states.split([patches.shape[1], self.num_tokens], dim=1)
        features = torch.cat(
            [patch_states.mean(dim=1), patch_states.std(dim=1, correction=0), latent_states.mean(dim=1)], dim=1
        )
        if self.readout == "interleaved":
            latent_states = rearrange(latent_states.flatten(1), "b (w n) -> b n w", n=self.num_tokens)
        return Encoding(self.to_latents(latent_states), features)

    def resize(self, grid_size: tuple[int, int]) -> None:
        """Read another grid from now on: the patches' positions are resized, the latent tokens stay."""
        positions = patch_grid(grid_size, self.patch_size)
        resized = resize_positions(self.patch_positions.detach(), self.positions, positions)
        self.patch_positions = nn.Parameter(resized, requires_grad=self.patch_positions.requires_grad)
        self.positions = positions
        self.bias = self._bias()

    def _bias(self) -> Tensor | None:
        """What attention is denied, at the present grid; ``None`` for nothing."""
        if self.attention == "full":
            return None
        mask = latents_causal_mask(len(self.patch_positions), self.num_tokens)
        return mask_to_bias(mask.to(self.patch_positions.device))
