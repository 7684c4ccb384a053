"""What a network learns about tokens with noise in them: the velocity of flow matching, or DDPM's noise.

Shapes: b batch, n tokens, d channels of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite, log, pi

import torch
from torch import Tensor

from framework.config.registry import Registry
from framework.generators.noise_schedule import NoiseSchedule


class DiffusionObjective(ABC):
    """How noise is put in, and what is predicted then.

    Attributes:
        outputs: channels that the network gives for each channel of a token.
    """

    outputs: int = 1

    @abstractmethod
    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of ``count`` sequences in training, ``(b,)`` on the CPU."""

    @abstractmethod
    def network_times(self, times: Tensor) -> Tensor:
        """Times ``(b,)`` as the network is told them, from 0 to 1000."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Clean tokens and noise ``(b, n, d)`` -> what the network sees at ``times (b,)``."""

    @abstractmethod
    def losses(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> dict[str, Tensor]:
        """Of every token, ``(b, n)``, a mean over channels.

        Args:
            output: of the network, ``(b, n, outputs d)`` float32.
            x: noised tokens ``(b, n, d)``, which it saw.
            clean: what they were made of.
            noise: likewise.
            times: ``(b,)``.
        """


DIFFUSION_OBJECTIVES = Registry("diffusion objective", DiffusionObjective)


@DIFFUSION_OBJECTIVES.register()
class Velocity(DiffusionObjective):
    """Flow matching on the straight path from noise (time 0) to tokens (time 1): predict their difference (Lipman et
    al. 2023, Liu et al. 2023); times are logistic-normal (Esser et al. 2024).

    Args:
        mean: of the normal numbers that the logistic function makes times; below 0 trains noisy times more.
        std: of these; a uniform distribution would need about 1.7.

    Raises:
        ValueError: if ``std`` is not above 0.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not (isfinite(mean) and 0 < std < float("inf")):
            raise ValueError(f"times have a finite mean and a standard deviation above 0, got {mean} and {std}")
        self.mean, self.std = mean, std

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))

    def network_times(self, times: Tensor) -> Tensor:
        return 1000 * times

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return torch.lerp(noise, clean, times[:, None, None])

    def losses(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> dict[str, Tensor]:
        return {"velocity": (output - (clean - noise)).square().mean(-1)}


@DIFFUSION_OBJECTIVES.register()
class DDPM(DiffusionObjective):
    """Predict the noise, at times that count from 0, the least noisy (Ho et al. 2020).

    Args:
        num_times: with linear betas; the signal that is left at the last one is below 1%.
        learned_range: learn the variance of a step too, between its two bounds, by the variational bound (Nichol and
            Dhariwal 2021); the network then gives twice as many channels.

    Raises:
        ValueError: if there are fewer than 21 times, for which linear betas would be above 1.
    """

    def __init__(self, num_times: int = 1000, learned_range: bool = False) -> None:
        if num_times < 21:
            raise ValueError(f"linear betas need at least 21 times, got {num_times}; samplers take fewer steps")
        self.schedule = NoiseSchedule.linear(num_times)
        self.learned_range = learned_range
        self.outputs = 2 if learned_range else 1

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.schedule.times), (count,), generator=generator)

    def network_times(self, times: Tensor) -> Tensor:
        return times.float()

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.schedule.noised(clean, noise, times)

    def losses(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> dict[str, Tensor]:
        if not self.learned_range:
            return {"noise": (output - noise).square().mean(-1)}
        predicted, ranges = output.chunk(2, dim=-1)
        # The bound trains the variance alone: the mean has the squared error, which says more.
        bound = self._bound(predicted.detach(), ranges, x, clean, times)
        return {"noise": (predicted - noise).square().mean(-1), "bound": bound}

    def _bound(self, predicted: Tensor, ranges: Tensor, x: Tensor, clean: Tensor, times: Tensor) -> Tensor:
        """Bits a channel of one step: its divergence from the posterior, or at time 0 what the tokens then cost."""
        schedule = self.schedule
        true_mean, true_log = schedule.posterior(clean, x, times)
        mean, _ = schedule.posterior(schedule.clean(x, predicted, times), x, times)
        log_variance = schedule.learned_log_variance(ranges, times)
        ratio = true_log - log_variance
        divergence = (ratio.exp() - ratio - 1 + (true_mean - mean).square() * (-log_variance).exp()) / 2
        cost = -_binned_log_likelihood(clean, mean, log_variance / 2)
        return torch.where(times[:, None, None] == 0, cost, divergence).mean(-1) / log(2)


def _binned_log_likelihood(values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of values in 256 bins from -1 to 1 under a normal distribution, as the official code has it.

    Its distribution function is an approximation with tanh, and the outermost bins reach to infinity.
    """

    def below(distance: Tensor) -> Tensor:
        z = distance * (-log_std).exp()
        return (1 + torch.tanh((2 / pi) ** 0.5 * (z + 0.044715 * z**3))) / 2

    upper, lower = below(values - mean + 1 / 255), below(values - mean - 1 / 255)
    upper = torch.where(values > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(values < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
