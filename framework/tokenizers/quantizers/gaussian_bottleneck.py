"""Continuous tokens with noise: a Gaussian posterior for each channel, held near the unit Gaussian.

The bottleneck of LDM (Rombach et al. 2022) and of TiTok's VAE mode; after Kingma & Welling 2014.

Shapes: b batch, n tokens, d channels of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from framework.losses.kl import KLLoss
from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer


@QUANTIZERS.register()
class GaussianBottleneck(Quantizer):
    """The encoder gives a mean and a log-variance for each channel; training decodes a sample, use decodes the mean.

    In use there is no noise, so the same image has the same tokens. TiTok's and VA-VAE's official code sample there
    too; ElasticTok takes the mean.

    Log-variances are clamped to [-30, 20], as in LDM: the variance and the divergence, which without a bound below
    would have no maximum, stay finite in float32 whatever the encoder gives. All is computed in float32, also under
    autocast.

    Args:
        dim: d, channels of a token; the encoder gives 2d, means before log-variances.
        kl: what a token pays for how much it says.
    """

    def __init__(self, dim: int = 16, kl: KLLoss = KLLoss()) -> None:  # noqa: B008 - read only
        super().__init__()
        self.dim = dim
        self.kl = kl

    @property
    def input_dim(self) -> int:
        """2d: means and log-variances."""
        return 2 * self.dim

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents ``(b, n, 2d)`` -> ``(b, n, d)`` float32, the loss ``kl`` and, to be logged, ``kl_bits`` a token."""
        mean, log_variance = latents.float().chunk(2, dim=-1)
        log_variance = log_variance.clamp(-30, 20)
        nats = self.kl.divergence(mean, log_variance)
        sample = mean
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            sample = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
        return Quantized(sample, None, {"kl": self.kl.weight * nats}, {"kl_bits": nats.detach() / math.log(2)})
