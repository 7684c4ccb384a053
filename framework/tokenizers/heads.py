"""Heads: from the decoder's states at positions to values of the output space.

Shapes: b batch, p positions, w width, c channels.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from framework.nn.transformer import Linear, init_linear
from framework.tokenizers.interface import HEADS, Head


@HEADS.register()
class PixelShuffleHead(Head):
    """Each position's state becomes its patch by one linear layer, as in TiTok's single-stage decoder.

    Args:
        refine_channels: with 0, the patches are the values. Otherwise each patch gets so many more channels, and two
            3x3 convolutions over the whole grid make a correction of them, which softens the patches' borders.
        smooth: a last 3x3 convolution over the values, as TiTok has it.
        width: w of the decoder.
        out_channels: c of the output space.
        patch_size: side of a patch.
    """

    def __init__(
        self, refine_channels: int = 0, smooth: bool = False, *, width: int, out_channels: int, patch_size: int
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.patch_size = patch_size
        channels = out_channels + refine_channels
        self.to_patch = Linear(width, channels * patch_size**2)
        self.refine: nn.Sequential | None = None
        if refine_channels:
            correction = nn.Conv2d(refine_channels, out_channels, 3, padding=1)
            self.refine = nn.Sequential(nn.Conv2d(channels, refine_channels, 3, padding=1), nn.GELU(), correction)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1) if smooth else None
        self.apply(init_linear)
        if refine_channels:
            nn.init.zeros_(correction.weight)
        if self.smooth is not None:
            nn.init.dirac_(self.smooth.weight)

    def forward(self, states: Tensor, positions: tuple[int, int], route: Tensor | None = None) -> Tensor:
        """States ``(b, p, w)`` -> values ``(b, c, rows * patch, columns * patch)``."""
        values = _patches_in_place(self.to_patch(states, route), positions, self.patch_size)
        if self.refine is not None:
            values = values[:, : self.out_channels] + self.refine(values)
        return values if self.smooth is None else self.smooth(values)


@HEADS.register()
class ProxyCodeHead(Head):
    """Each position's state becomes its values by two linear layers with a tanh between: TiTok's two-stage decoder.

    There the output space is ``MaskGITVQGAN``, and the values are scores of its codes.

    Args:
        width: w of the decoder.
        out_channels: c of the output space.
        patch_size: side of a patch.
    """

    def __init__(self, *, width: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.hidden = Linear(width, 2 * width)
        self.to_patch = Linear(2 * width, out_channels * patch_size**2)
        self.apply(init_linear)

    def forward(self, states: Tensor, positions: tuple[int, int], route: Tensor | None = None) -> Tensor:
        """States ``(b, p, w)`` -> values ``(b, c, rows * patch, columns * patch)``."""
        patches = self.to_patch(self.hidden(states, route).tanh(), route)
        return _patches_in_place(patches, positions, self.patch_size)


def _patches_in_place(patches: Tensor, positions: tuple[int, int], patch_size: int) -> Tensor:
    """Flat patches ``(b, p, side * side * c)`` -> values ``(b, c, rows * side, columns * side)``."""
    form = "b (rows columns) (p q c) -> b (rows p) (columns q) c"
    values = rearrange(patches, form, rows=positions[0], p=patch_size, q=patch_size)
    return values.permute(0, 3, 1, 2)  # a view with channels last in memory, as convolutions like it
