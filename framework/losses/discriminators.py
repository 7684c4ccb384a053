"""Networks that tell images from reconstructions, patch by patch.

Shapes: b batch, height and width in pixels, h and w a grid of overlapping patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from framework.config.registry import Registry
from framework.losses.blur_pool import BlurPool


class Discriminator(nn.Module, ABC):
    """Says of each patch how much it looks like one of an image and not of a reconstruction."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, height, width)`` in about [0, 1] -> logits ``(b, 1, h, w)``, positive for real ones."""


DISCRIMINATORS = Registry("discriminator", Discriminator)


@DISCRIMINATORS.register()
class PatchDiscriminator(Discriminator):
    """VQGAN's (Esser et al. 2021), after pix2pix: strided convolutions with batch normalisation.

    With the three strided layers of VQGAN a patch is 70 pixels wide; images of 32x32 pixels have 2x2 logits. Batch
    normalisation is over each micro-batch of each process, so that ``train.accumulate`` is not exact with it.

    Args:
        width: channels of the first layer; they double with each layer, up to eight times as many.
        depth: strided layers.
    """

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < depth - 1 else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images * 2 - 1)
        return logits


@DISCRIMINATORS.register()
class BlurPatchDiscriminator(Discriminator):
    """TiTok's (Yu et al. 2024): convolutions, blurred halving, group normalisation, the largest value of each cell.

    TiTok has a grid of 16x16 logits for 256x256 pixels. Images whose grid is smaller than that after the halvings keep
    their own; of 32x32 pixels, with three stages, it is 4x4.

    Args:
        width: channels of the first stage, a multiple of 32; they double with each stage after it.
        depth: stages; each halves the grid.
        grid: rows and columns of logits at most.

    Raises:
        ValueError: if ``width`` is no multiple of 32.
    """

    def __init__(self, width: int = 128, depth: int = 3, grid: int = 16) -> None:
        super().__init__()
        if width % 32:
            raise ValueError(f"group normalisation has 32 groups: width must be a multiple of 32, got {width}")
        self.grid = grid
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.1)]
        before = width
        for i in range(depth):
            after = width * 2**i
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                BlurPool((1, 3, 3, 1), padding=1, mode="constant"),
                nn.GroupNorm(32, after),
                nn.LeakyReLU(0.1),
            ]
            before = after
        self.stages = nn.Sequential(*layers)
        self.to_logits = nn.Sequential(
            nn.Conv2d(before, before, 1), nn.LeakyReLU(0.1), nn.Conv2d(before, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        states = self.stages(images)
        height, width = (min(side, self.grid) for side in states.shape[-2:])
        logits: Tensor = self.to_logits(adaptive_max_pool2d(states, (height, width)))
        return logits
