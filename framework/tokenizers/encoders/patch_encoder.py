"""A transformer over patches whose first outputs are the tokens; there are no queries.

ElasticTok (Yan et al. 2024): the patches are told which of their positions will be kept, so what the others hold must
move to those. Each length is another encoding.

Shapes: b batch, p patches, n tokens, w width, d channels of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.nn.positions import resize_positions, sincos_2d
from framework.nn.transformer import BlockOptions, Transformer, init_linear
from framework.tokenizers.encoders.patches import patch_grid, patchify
from framework.tokenizers.interface import ENCODERS, Encoder, Encoding


@ENCODERS.register()
class PatchEncoder(Encoder):
    """One state per patch, row by row; each is told whether its position is kept, and the first n become tokens.

    Args:
        num_tokens: n, the longest token sequence; at most the number of patches.
        patch_size: side of a patch in steps of the input space's grid (pixels, for PixelSpace).
        width: w.
        depth: number of blocks.
        num_heads: attention heads; must divide ``width``.
        blocks: the blocks' switches. ElasticTok's are ``{norm: rms, mlp: swiglu, mlp_ratio: 3, bias: false, rope_base:
            1e4}``: its rotary positions run along the row-major sequence, and with them there is no table of positions.
        in_channels: channels of the input space.
        grid_size: rows and columns of the input space.
        out_dim: d.

    Raises:
        ValueError: if the grid is not a multiple of the patch, or has fewer patches than ``num_tokens``.
    """

    contract = "length_conditioned"

    def __init__(
        self,
        num_tokens: int,
        patch_size: int = 8,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        blocks: BlockOptions = BlockOptions(),  # noqa: B008 - read only
        *,
        in_channels: int,
        grid_size: tuple[int, int],
        out_dim: int,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.patch_size = patch_size
        self.positions = self._fit(grid_size)
        self.feature_dim = 2 * width
        self.patch_embedding = nn.Linear(in_channels * patch_size**2, width)
        table = sincos_2d(self.positions, width) if blocks.rope_base is None else None
        self.patch_positions = None if table is None else nn.Parameter(table)
        self.kept_embedding = nn.Parameter(torch.randn(width))
        self.masked_embedding = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(width, depth, num_heads, blocks)
        self.to_latents = nn.Linear(width, out_dim)
        init_linear(self.patch_embedding)
        init_linear(self.to_latents)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Encoding:
        """Values ``(b, c, rows, columns)`` -> latents ``(b, n, d)`` and features ``(b, 2w)``, both for these lengths.

        Features are the mean and standard deviation of the patches' states.
        """
        patches = self.patch_embedding(patchify(values, self.patch_size))
        if self.patch_positions is not None:
            patches = patches + self.patch_positions
        index = torch.arange(patches.shape[1], device=values.device)
        kept = index < (self.num_tokens if lengths is None else lengths[:, None])
        patches = patches + torch.where(kept[..., None], self.kept_embedding, self.masked_embedding)
        states = self.transformer(patches)
        features = torch.cat([states.mean(dim=1), states.std(dim=1, correction=0)], dim=1)
        return Encoding(self.to_latents(states[:, : self.num_tokens]), features)

    def resize(self, grid_size: tuple[int, int]) -> None:
        """Read another grid from now on: a table of positions is resized, rotary ones go on with further rows.

        Raises:
            ValueError: if there are too few patches for the tokens, or, with rotary positions, rows of other lengths.
        """
        positions = self._fit(grid_size)
        if self.patch_positions is not None:
            resized = resize_positions(self.patch_positions.detach(), self.positions, positions)
            self.patch_positions = nn.Parameter(resized, requires_grad=self.patch_positions.requires_grad)
        elif positions[1] != self.positions[1]:
            # Along the sequence, the patch below would be at another distance than in training.
            raise ValueError(
                f"rotary positions know rows of {self.positions[1]} patches, got rows of {positions[1]}: keep the "
                "images' width, or train with a table of positions (blocks.rope_base: null)"
            )
        self.positions = positions

    def _fit(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches, which must be enough for the tokens."""
        rows, columns = patch_grid(grid_size, self.patch_size)
        if rows * columns < self.num_tokens:
            raise ValueError(
                f"a token is a patch, and {rows}x{columns} patches are fewer than num_tokens, {self.num_tokens}: "
                f"take larger images, smaller patches, or num_tokens of at most {rows * columns}"
            )
        return rows, columns
