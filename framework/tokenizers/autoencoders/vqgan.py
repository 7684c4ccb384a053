"""Spaces of a VQGAN's codes: at every position of a grid, a score for each code.

Taming transformers (Esser et al. 2021) and MaskGIT (Chang et al. 2022). TiTok's first stage predicts the codes that
MaskGIT's VQGAN gives an image; its second stage decodes scores to pixels and trains the decoder further.

Shapes: b batch, k codes, h and w the grid of codes, d channels of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from framework.nn.conv import MaskGITBlock, conv, down_stages, group_norm, named, stage, up_stages
from framework.tokenizers.autoencoders.ldm import ldm_networks
from framework.tokenizers.interface import SPACES, ImageSpace, SpaceReconstruction
from framework.tokenizers.quantizers.vector_quantizer import VectorQuantizer

CERTAIN = 32.0
"""The score of a code that is sure, beside zeros: of 1024 codes the others get 1e-11, and scores are of unit scale."""


class VQGAN(ImageSpace):
    """Values are scores of codes ``(b, k, h, w)``, whose softmax mixes the codes that are decoded (TiTok).

    Args:
        encoder: images to ``(b, d, h, w)``; ``None`` where images are only decoded.
        decoder: the way back.
        num_codes: k.
        dim: d.
        downsampling: pixels per code.
        signed: whether encoder and decoder work on images in [-1, 1] instead of [0, 1].
    """

    def __init__(
        self, encoder: nn.Module | None, decoder: nn.Module, num_codes: int, dim: int, downsampling: int, signed: bool
    ) -> None:
        super().__init__()
        self.channels = num_codes
        self.downsampling = downsampling
        self.signed = signed
        self.encoder = encoder
        self.quantizer = VectorQuantizer(
            num_codes, dim, standardize=False, normalize=False, ema=None, kmeans_iterations=None, restart_dead=False
        )
        self.decoder = decoder

    def codes(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, height, width)`` in [0, 1] -> the codes nearest to their latents, ``(b, h, w)`` int64.

        Raises:
            TypeError: without an encoder.
        """
        latents = self._latents(images)
        codes = self.quantizer.latents_to_codes(rearrange(latents, "b d h w -> b (h w) d"))
        return codes.unflatten(1, latents.shape[2:])

    def encode(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, height, width)`` in [0, 1] -> scores that are sure of the codes, ``(b, k, h, w)``."""
        return self.from_target(self.codes(images))

    def target(self, images: Tensor) -> Tensor:
        """Codes ``(b, h, w)`` int64, a thousandth of the scores that stand for them."""
        return self.codes(images)

    def from_target(self, target: Tensor) -> Tensor:
        """Codes ``(b, h, w)`` int64 -> scores that are sure of them."""
        return CERTAIN * rearrange(F.one_hot(target, self.channels), "b h w k -> b k h w").float()

    def decode(self, values: Tensor) -> Tensor:
        """Scores of codes ``(b, k, h, w)`` -> images in about [0, 1]."""
        shares = values.float().softmax(dim=1)
        return self.decode_latents(einsum(shares, self.quantizer.codebook, "b k h w, k d -> b d h w"))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes ``(b, h, w)`` int64 -> images in about [0, 1]."""
        return self.decode_latents(rearrange(self.quantizer.codes_to_latents(codes), "b h w d -> b d h w"))

    def reconstruct(self, images: Tensor, generator: torch.Generator) -> SpaceReconstruction:
        """Through the nearest codes, straight-through; with the quantizer's losses and numbers."""
        latents = self._latents(images)
        quantized = self.quantizer(rearrange(latents, "b d h w -> b (h w) d"), generator)
        rows = latents.shape[2]
        rebuilt = self.decode_latents(rearrange(quantized.latents, "b (h w) d -> b d h w", h=rows))
        losses, metrics = (
            {name: value.mean() for name, value in numbers.items()} for numbers in (quantized.losses, quantized.metrics)
        )
        if self.quantizer.usage is not None:
            metrics |= self.quantizer.usage.metrics()
        return SpaceReconstruction(rebuilt, losses, metrics)

    def _latents(self, images: Tensor) -> Tensor:
        """``(b, d, h, w)`` float32, before they are quantized."""
        if self.encoder is None:
            raise TypeError(f"this {type(self).__name__} only decodes: it needs encodes: true, and weights for that")
        latents: Tensor = self.encoder(images * 2 - 1 if self.signed else images).float()
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Codes' latents or mixtures of them ``(b, d, h, w)`` -> images in about [0, 1]."""
        images = self.decoder(latents)
        return (images + 1) / 2 if self.signed else images


@SPACES.register()
class TamingVQGAN(VQGAN):
    """The VQGAN of taming transformers; the defaults are those of its ImageNet model with 1024 codes at 1/16.

    Args:
        width: channels of the first level, before its multiplier; channels of all levels are multiples of 32, or of
            4 below that.
        multipliers: channels of each level over ``width``; every further level halves the grid.
        num_res_blocks: blocks of a level; the decoder has one more.
        attention_resolutions: sides of the grids on which levels attend, at images of side ``resolution``.
        num_codes: k.
        dim: d.
        resolution: side of the images that the network is made for; see ``AutoencoderKL``.
    """

    def __init__(
        self,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        num_codes: int = 1024,
        dim: int = 256,
        resolution: int = 256,
    ) -> None:
        shape = (width, multipliers, num_res_blocks, attention_resolutions, resolution)
        super().__init__(*ldm_networks(dim, dim, *shape), num_codes, dim, 2 ** (len(multipliers) - 1), signed=True)


@SPACES.register()
class MaskGITVQGAN(VQGAN):
    """MaskGIT's VQGAN as TiTok has it; the defaults are those of its ImageNet model, 1024 codes at 1/16.

    Args:
        width: channels of the first level, before its multiplier; channels of all levels are multiples of 32, or of
            4 below that.
        multipliers: channels of each level over ``width``; every further level halves the grid.
        num_res_blocks: blocks of a level, and of the middle.
        num_codes: k.
        dim: d.
        encodes: without an encoder, it is only decoded to; TiTok's released weights hold none.
    """

    def __init__(
        self,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_codes: int = 1024,
        dim: int = 256,
        encodes: bool = True,
    ) -> None:
        widths = [width * multiplier for multiplier in multipliers]
        deepest, attends = widths[-1], [False] * len(widths)
        encoder = named(
            conv_in=conv(3, width, bias=False),
            down=down_stages(MaskGITBlock, width, widths, num_res_blocks, attends, lambda _: nn.AvgPool2d(2)),
            mid=stage(MaskGITBlock, deepest, deepest, num_res_blocks),
            norm_out=group_norm(deepest),
            activation=nn.SiLU(),
            conv_out=conv(deepest, dim, 1),
        )
        decoder = named(
            conv_in=conv(dim, deepest),
            mid=stage(MaskGITBlock, deepest, deepest, num_res_blocks),
            up=up_stages(MaskGITBlock, widths, num_res_blocks, attends),
            norm_out=group_norm(widths[0]),
            activation=nn.SiLU(),
            conv_out=conv(widths[0], 3),
        )
        downsampling = 2 ** (len(multipliers) - 1)
        super().__init__(encoder if encodes else None, decoder, num_codes, dim, downsampling, signed=False)
