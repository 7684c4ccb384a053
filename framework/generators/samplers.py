"""From noise to tokens, in steps.

Shapes: b batch, n tokens, d channels of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from framework.config.registry import Registry
from framework.generators.diffusion_objectives import DDPM, DiffusionObjective, Velocity
from framework.generators.noise_schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor, float], Tensor]
"""Noised tokens ``(b, n, d)``, the objective's time ``(1,)`` of all, and how far sampling is, from 0 to 1 -> the
network's outputs ``(b, n, outputs d)`` float32, guided."""

Noise = Callable[[int], Tensor]
"""Standard normal numbers ``(b, n, d)``: of number 0 where sampling starts, and then of each step from 1."""


class Sampler(ABC):
    """How a trained network makes tokens.

    Attributes:
        objective: which must have trained the network.
        steps: see the sampler.
    """

    objective: ClassVar[type[DiffusionObjective]]
    steps: int

    @abstractmethod
    def sample(self, predict: Predict, noise: Noise, objective: DiffusionObjective) -> Tensor:
        """Clean tokens ``(b, n, d)``."""

    def check(self, objective: DiffusionObjective) -> None:
        """Refuse another objective than its own, and more steps than that has times.

        Raises:
            ValueError: naming both.
        """
        if not isinstance(objective, self.objective):
            fitting = [name for name, kind in SAMPLERS if isinstance(objective, kind.objective)]
            raise ValueError(
                f"{type(self).__name__} samples what {self.objective.__name__} has trained, and the objective is "
                f"{type(objective).__name__}: take {' or '.join(fitting)}"
            )
        if isinstance(objective, DDPM) and self.steps > len(objective.schedule.times):
            raise ValueError(
                f"{type(self).__name__} takes at most as many steps as training has times, "
                f"{len(objective.schedule.times)}; got {self.steps}"
            )


SAMPLERS = Registry("sampler", Sampler)


@SAMPLERS.register()
class Euler(Sampler):
    """Along the velocity from time 0 to 1, one prediction a step.

    Args:
        steps: of time, equal ones before the shift.
        shift: s of time ``s t / (1 + (s - 1) t)``; below 1 steps are smaller near the noise.

    Raises:
        ValueError: if a number is out of its range.
    """

    objective = Velocity

    def __init__(self, steps: int = 50, shift: float = 1.0) -> None:
        self.steps, self.times = steps, _flow_times(steps, shift)

    def sample(self, predict: Predict, noise: Noise, objective: DiffusionObjective) -> Tensor:
        x = noise(0)
        for now, then in pairwise(self.times):
            x = x + (then - now) * predict(x, x.new_tensor([now]), now)
        return x


@SAMPLERS.register()
class Heun(Sampler):
    """As ``Euler``, with the mean of the velocities at both ends of a step (Karras et al. 2022).

    That is two predictions a step, and one in the last, whose end is no noised sequence any more.

    Args:
        steps: of time, equal ones before the shift.
        shift: see ``Euler``.

    Raises:
        ValueError: if a number is out of its range.
    """

    objective = Velocity

    def __init__(self, steps: int = 25, shift: float = 1.0) -> None:
        self.steps, self.times = steps, _flow_times(steps, shift)

    def sample(self, predict: Predict, noise: Noise, objective: DiffusionObjective) -> Tensor:
        x = noise(0)
        for now, then in pairwise(self.times):
            velocity = predict(x, x.new_tensor([now]), now)
            if then < 1:
                ahead = predict(x + (then - now) * velocity, x.new_tensor([then]), then)
                velocity = (velocity + ahead) / 2
            x = x + (then - now) * velocity
        return x


@SAMPLERS.register()
class DDIM(Sampler):
    """Steps of any size along DDPM's times, with as much noise as wanted (Song et al. 2021).

    Args:
        steps: from every ``num_times / steps``-th time to the one before.
        eta: 0 adds no noise; 1 adds as much as a step of DDPM.

    Raises:
        ValueError: if a number is out of its range.
    """

    objective = DDPM

    def __init__(self, steps: int = 50, eta: float = 0.0) -> None:
        _check_steps(steps, 2)  # the first time alone, the least noisy, would be all of one step
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is from 0 to 1, got {eta}")
        self.steps, self.eta = steps, eta

    def kept(self, num_times: int) -> Tensor:
        """The times that are visited, from 0 at equal strides."""
        return torch.arange(self.steps) * num_times // self.steps

    def sample(self, predict: Predict, noise: Noise, objective: DiffusionObjective) -> Tensor:
        assert isinstance(objective, DDPM)
        schedule, x = _respaced(self, objective), noise(0)
        for visit in _visits(schedule, objective, x.device):
            predicted = predict(x, visit.time, visit.progress)[..., : x.shape[-1]]
            clean = schedule.clean(x, predicted, visit.place)
            signal, before = (float(each[visit.number]) for each in (schedule.signal, schedule.signal_before))
            spread = self.eta * ((1 - before) / (1 - signal) * (1 - signal / before)) ** 0.5
            x = before**0.5 * clean + (1 - before - spread**2) ** 0.5 * predicted
            if spread:
                x = x + spread * noise(visit.step)
        return x


@SAMPLERS.register()
class Ancestral(Sampler):
    """DDPM's own: each step draws from the posterior, with the variance that the network gives, or the smaller bound.

    Args:
        steps: over evenly spaced times, the first and the last among them.

    Raises:
        ValueError: if there are fewer than 2.
    """

    objective = DDPM

    def __init__(self, steps: int = 250) -> None:
        _check_steps(steps, 2)
        self.steps = steps

    def kept(self, num_times: int) -> Tensor:
        """The times that are visited."""
        return torch.linspace(0, num_times - 1, self.steps, dtype=torch.float64).round().long()

    def sample(self, predict: Predict, noise: Noise, objective: DiffusionObjective) -> Tensor:
        assert isinstance(objective, DDPM)
        schedule, x = _respaced(self, objective), noise(0)
        for visit in _visits(schedule, objective, x.device):
            predicted, *ranges = predict(x, visit.time, visit.progress).split(x.shape[-1], dim=-1)
            x, log_variance = schedule.posterior(schedule.clean(x, predicted, visit.place), x, visit.place)
            for each in ranges:
                log_variance = schedule.learned_log_variance(each, visit.place)
            if visit.number:
                x = x + (log_variance / 2).exp() * noise(visit.step)
        return x


class _Visit(NamedTuple):
    """One time of a schedule, ``number`` there, that a sampler comes to in its step ``step`` from 1."""

    step: int
    number: int
    place: Tensor
    time: Tensor
    progress: float


def _visits(schedule: NoiseSchedule, objective: DDPM, device: torch.device) -> Iterator[_Visit]:
    """From the noisiest to the least noisy."""
    last = len(objective.schedule.times) - 1
    for step, number in enumerate(reversed(range(len(schedule.times))), 1):
        time = schedule.times[[number]]
        yield _Visit(step, number, torch.tensor([number], device=device), time.to(device), 1 - int(time) / last)


def _respaced(sampler: DDIM | Ancestral, objective: DDPM) -> NoiseSchedule:
    sampler.check(objective)
    return objective.schedule.respaced(sampler.kept(len(objective.schedule.times)))


def _flow_times(steps: int, shift: float) -> list[float]:
    """From 0 to 1, one more than steps."""
    _check_steps(steps, 1)
    if not 0 < shift < float("inf"):
        raise ValueError(f"the shift of times is above 0, got {shift}")
    even = [step / steps for step in range(steps)]
    return [*(shift * time / (1 + (shift - 1) * time) for time in even), 1.0]


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise ValueError(f"this sampler takes at least {least} steps, got {steps}")
