"""The arithmetic of DDPM's noise (Ho et al. 2020), over all of its times or some of them (Nichol and Dhariwal 2021).

Shapes: s times, b batch, n tokens, d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseSchedule:
    """Values of the past keep ``sqrt(signal)`` of the clean ones and gain ``sqrt(1 - signal)`` of noise.

    All methods read ``places (b,)``, numbers of this schedule's times from 0, the least noisy.

    Args:
        betas: share of variance that each time adds, ``(s,)`` float64.
        times: what the network calls them, ``(s,)`` int64.
    """

    def __init__(self, betas: Tensor, times: Tensor) -> None:
        self.betas, self.times = betas, times
        self.signal = (1 - betas).cumprod(0)
        self.signal_before = torch.cat([torch.ones_like(self.signal[:1]), self.signal[:-1]])
        variance = betas * (1 - self.signal_before) / (1 - self.signal)
        # The first posterior has no variance; as in the official code, its logarithm is taken from the second.
        self.log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        self.clean_share = betas * self.signal_before.sqrt() / (1 - self.signal)
        self.noised_share = (1 - self.signal_before) * (1 - betas).sqrt() / (1 - self.signal)

    @staticmethod
    def linear(num_times: int, first: float = 1e-4, last: float = 0.02) -> NoiseSchedule:
        """DDPM's betas; ``first`` and ``last`` are of 1000 times, and of fewer the more."""
        scale = 1000 / num_times
        # Constants, which are numbers even where a model is built without any ("meta").
        betas = torch.linspace(scale * first, scale * last, num_times, dtype=torch.float64, device="cpu")
        return NoiseSchedule(betas, torch.arange(num_times, device="cpu"))

    def respaced(self, kept: Tensor) -> NoiseSchedule:
        """The same noise at fewer times ``(r,)``, increasing."""
        signal = self.signal[kept]
        before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
        return NoiseSchedule(1 - signal / before, self.times[kept])

    def noised(self, clean: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        """Clean values ``(b, n, d)`` with ``noise`` at their places."""
        return _at(self.signal.sqrt(), places) * clean + _at((1 - self.signal).sqrt(), places) * noise

    def clean(self, x: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        """The way back: noised values ``(b, n, d)`` without their ``noise``."""
        return _at(self.signal.rsqrt(), places) * x - _at((1 / self.signal - 1).sqrt(), places) * noise

    def posterior(self, clean: Tensor, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(b, n, d)`` and log variance ``(b, 1, 1)`` of values one time earlier."""
        mean = _at(self.clean_share, places) * clean + _at(self.noised_share, places) * x
        return mean, _at(self.log_variance, places)

    def learned_log_variance(self, ranges: Tensor, places: Tensor) -> Tensor:
        """From -1, the posterior's, to 1, beta's: ``(b, n, d)`` of the network's ``ranges``."""
        share = (ranges + 1) / 2
        return share * _at(self.betas.log(), places) + (1 - share) * _at(self.log_variance, places)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """``(s,)`` float64 at places ``(b,)``: ``(b, 1, 1)`` float32."""
    return values.to(places.device)[places].float()[:, None, None]
