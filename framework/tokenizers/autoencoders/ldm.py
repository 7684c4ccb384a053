"""The convolutional encoder and decoder of taming transformers' VQGAN and of LDM's autoencoders (VA-VAE, SD-VAE).

Levels of residual blocks on grids that halve from one to the next. Which levels attend is fixed by the resolution that
the network was made for; on images of another size the same levels attend, on other grids.

Shapes: b batch, c channels, h and w pixels or the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from framework.nn.conv import (
    Downsample,
    ResidualBlock,
    SpatialAttention,
    conv,
    down_stages,
    group_norm,
    named,
    up_stages,
)


def ldm_networks(
    encoded_channels: int,
    latent_channels: int,
    width: int,
    multipliers: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    resolution: int,
) -> tuple[nn.Sequential, nn.Sequential]:
    """An encoder ``(b, 3, h, w) -> (b, encoded_channels, h / f, w / f)`` and a decoder from ``latent_channels`` back.

    f doubles from level to level. Unlike the official networks, which train for a hundred times as long, residual
    branches start at zero.

    Args:
        encoded_channels: of the encoder's last 3x3 convolution and of the 1x1 convolution behind it.
        latent_channels: of the decoder's first two convolutions.
        width: channels of the encoder's first convolution.
        multipliers: channels of each level over ``width``, the finest first.
        num_res_blocks: blocks of a level; the decoder has one more.
        attention_resolutions: sides of the grids on which levels attend after each block; the middle always does.
        resolution: side of the images for which these are the sides.

    Raises:
        ValueError: if there is no grid of such a side, or channels cannot be grouped.
    """
    sides = [resolution // 2**level for level in range(len(multipliers))]
    if wrong := set(attention_resolutions) - set(sides):
        raise ValueError(
            f"attention_resolutions {sorted(wrong)}: at resolution {resolution} there are grids of the sides {sides}"
        )
    attends = [side in attention_resolutions for side in sides]
    widths = [width * multiplier for multiplier in multipliers]
    encoder = named(
        conv_in=conv(3, width),
        down=down_stages(ResidualBlock, width, widths, num_res_blocks, attends, Downsample),
        mid=_middle(widths[-1]),
        norm_out=group_norm(widths[-1]),
        activation=nn.SiLU(),
        conv_out=conv(widths[-1], encoded_channels),
        quant_conv=conv(encoded_channels, encoded_channels, 1),
    )
    decoder = named(
        post_quant_conv=conv(latent_channels, latent_channels, 1),
        conv_in=conv(latent_channels, widths[-1]),
        mid=_middle(widths[-1]),
        up=up_stages(ResidualBlock, widths, num_res_blocks + 1, attends),
        norm_out=group_norm(widths[0]),
        activation=nn.SiLU(),
        conv_out=conv(widths[0], 3),
    )
    for block in [*encoder.modules(), *decoder.modules()]:
        if isinstance(block, ResidualBlock):
            nn.init.zeros_(block.conv2.weight)
            if block.conv2.bias is not None:
                nn.init.zeros_(block.conv2.bias)
    return encoder, decoder


def _middle(channels: int) -> nn.Sequential:
    first, last = (ResidualBlock(channels, channels) for _ in range(2))
    return named(block_1=first, attn_1=SpatialAttention(channels), block_2=last)
