"""The latent space of LDM's autoencoder, whose encoder gives a Gaussian posterior for each latent.

Rombach et al. 2022. VA-VAE (Yao et al. 2025) has the same network at 1/16 with 32 channels, SD-VAE at 1/8 with 4.

Shapes: b batch, c latent channels, h and w the grid of latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from framework.losses.kl import KLLoss
from framework.nn.channel_statistics import ChannelStatistics
from framework.tokenizers.autoencoders.ldm import ldm_networks
from framework.tokenizers.interface import SPACES, ImageSpace, SpaceReconstruction


@dataclass(frozen=True)
class Posterior:
    """Independent Gaussians.

    Args:
        mean: ``(b, c, h, w)``.
        log_variance: natural logarithms, likewise.
    """

    mean: Tensor
    log_variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviations ``(b, c, h, w)``."""
        return (0.5 * self.log_variance).exp()

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw ``(b, c, h, w)``, through which gradients pass."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Nats from the unit Gaussian, ``(b,)``, summed over all of an image's latents."""
        return KLLoss().divergence(self.mean.flatten(1), self.log_variance.flatten(1))

    def nll(self, latents: Tensor) -> Tensor:
        """Negative log-likelihood of latents ``(b, c, h, w)`` in nats, ``(b,)``."""
        error = (latents - self.mean).square() * (-self.log_variance).exp()
        return 0.5 * reduce(error + self.log_variance + math.log(2 * math.pi), "b c h w -> b", "sum")


@SPACES.register()
class AutoencoderKL(ImageSpace):
    """Latents of an autoencoder: the posterior's mean, brought to zero mean and unit deviation in each channel.

    The defaults are VA-VAE's. SD-VAE's are ``{multipliers: [1, 2, 4, 4], attention_resolutions: [], latent_channels:
    4}``. The official code samples the posterior there; here the same image has the same latents. Log-variances are
    clamped to [-30, 20].

    Each channel's mean and deviation are state beside the weights. They are 0 and 1 until training or ``normalise_by``
    has seen images, or a converted checkpoint brings its own.

    Args:
        width: channels of the first level, before its multiplier; channels of all levels are multiples of 32, or of
            4 below that.
        multipliers: channels of each level over ``width``; every further level halves the grid.
        num_res_blocks: blocks of a level; the decoder has one more.
        attention_resolutions: sides of the grids on which levels attend, at images of side ``resolution``.
        latent_channels: c.
        resolution: side of the images that the network is made for. It decides only which levels attend: weights
            trained at 256 keep it when images of another size are encoded.
        kl_weight: of the posterior's divergence from the unit Gaussian when the network is trained, as LDM counts it:
            it sums both the divergence over an image's latents and the pixel errors over its values, which are means
            here, so that the divergence is divided by the number of pixel values.

    Raises:
        ValueError: if channels cannot be grouped, or no level has a grid of a side that should attend.
    """

    def __init__(
        self,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        latent_channels: int = 32,
        resolution: int = 256,
        kl_weight: float = 1e-6,
    ) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.channels = latent_channels
        self.downsampling = 2 ** (len(multipliers) - 1)
        shape = (width, multipliers, num_res_blocks, attention_resolutions, resolution)
        self.encoder, self.decoder = ldm_networks(2 * latent_channels, latent_channels, *shape)
        self.statistics = ChannelStatistics(latent_channels)

    def posterior(self, images: Tensor) -> Posterior:
        """Images ``(b, 3, height, width)`` in [0, 1] -> its Gaussians of latents, not normalised, in float32."""
        mean, log_variance = self.encoder(images * 2 - 1).float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))

    def encode(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, height, width)`` in [0, 1] -> the posterior's means, normalised, ``(b, c, h, w)``."""
        return self.statistics(self.posterior(images).mean)

    def decode(self, values: Tensor) -> Tensor:
        """Normalised latents ``(b, c, h, w)`` -> images in about [0, 1]."""
        return self._to_images(self.statistics.inverse(values))

    def reconstruct(self, images: Tensor, generator: torch.Generator) -> SpaceReconstruction:
        """Through one draw of the posterior; in training, ``normalise_by`` is not needed afterwards."""
        posterior = self.posterior(images)
        self.statistics.collect(posterior.mean)
        nats = posterior.kl().mean()
        losses = {"kl": self.kl_weight * nats / images[0].numel()}
        return SpaceReconstruction(self._to_images(posterior.sample(generator)), losses, {"kl_nats": nats.detach()})

    def _to_images(self, latents: Tensor) -> Tensor:
        return (self.decoder(latents) + 1) / 2

    @torch.no_grad()
    def normalise_by(self, batches: Iterable[Tensor]) -> None:
        """Take each channel's mean and deviation from images, ``(b, 3, height, width)`` in [0, 1] a batch.

        Raises:
            ValueError: if there is no image.
        """
        self.statistics.measure(self.posterior(images).mean for images in batches)
