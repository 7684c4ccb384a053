"""Samplers against the laws of what they sample, with the best prediction there can be in a network's place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.generators.diffusion_objectives import DDPM, DIFFUSION_OBJECTIVES, DiffusionObjective, Velocity
from framework.generators.noise_schedule import NoiseSchedule
from framework.generators.samplers import DDIM, SAMPLERS, Ancestral, Euler, Heun, Predict, Sampler
from framework.runtime.hashing import hashed, normals

MEAN, STD = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])


def noise(step: int, count: int = 2000) -> Tensor:
    return normals(hashed(step, torch.arange(count)), 6).view(count, 3, 2)


def best_prediction(objective: DiffusionObjective, seen: list[float] | None = None) -> Predict:
    """The expectation of the objective's target given x, of tokens that are normal with ``MEAN`` and ``STD``."""

    def predict(x: Tensor, time: Tensor, progress: float) -> Tensor:
        if seen is not None:
            seen.append(progress)
        if isinstance(objective, Velocity):
            signal, spread = time, 1 - time
        else:
            assert isinstance(objective, DDPM)
            share = objective.schedule.signal[time].float()
            signal, spread = share.sqrt(), (1 - share).sqrt()
        residual = (x - signal * MEAN) / ((signal * STD).square() + spread.square())
        clean, drawn = MEAN + signal * STD.square() * residual, spread * residual
        return clean - drawn if isinstance(objective, Velocity) else drawn

    return predict


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [(Euler(200), 0.02), (Euler(100, shift=0.4), 0.04), (Heun(20), 0.02), (DDIM(200), 0.03), (DDIM(250, eta=1.0), 0.05),
     (Ancestral(250), 0.05), (Ancestral(400), 0.05)],
)  # fmt: skip
def test_a_known_normal_distribution_is_recovered(sampler: Sampler, tolerance: float) -> None:
    objective = sampler.objective()
    x = sampler.sample(best_prediction(objective), noise, objective).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), MEAN, atol=tolerance + 0.03, rtol=0)
    torch.testing.assert_close(x.std(0), STD, atol=0, rtol=tolerance + 0.02)
    quantiles = [values.flatten().sort().values[1200:-1200:1200] for values in ((x - MEAN) / STD, noise(0))]
    torch.testing.assert_close(*quantiles, atol=0.1, rtol=0)


def test_orders_of_convergence() -> None:
    """The exact flow maps noise z to MEAN + STD z; Euler's error falls with the step, Heun's with its square."""
    start = noise(0, 50)
    exact = MEAN + STD * start

    def error(sampler: Sampler) -> float:
        x = sampler.sample(best_prediction(Velocity()), lambda step: start, Velocity())
        return float((x - exact).abs().max())

    assert error(Euler(20)) / error(Euler(40)) == pytest.approx(2, abs=0.2)
    assert error(Heun(20)) / error(Heun(40)) == pytest.approx(4, abs=0.7)


@pytest.mark.parametrize(
    ("sampler", "count"),
    [(Euler(5), 5), (Heun(5), 9), (Heun(5, 0.01), 9), (DDIM(5), 5), (DDIM(5, eta=0.5), 5), (Ancestral(5), 5)],
)
def test_progress_rises_and_predictions_are_counted(sampler: Sampler, count: int) -> None:
    seen: list[float] = []
    sampler.sample(best_prediction(sampler.objective(), seen), lambda step: noise(step, 2), sampler.objective())
    assert len(seen) == count and seen == sorted(seen) and 0 <= seen[0] < 0.21 and seen[-1] <= 1
    if isinstance(sampler, Heun):
        assert seen[-1] < 0.99, "the end is no noised sequence"
    if isinstance(sampler, Ancestral):
        assert (seen[0], seen[-1]) == (0.0, 1.0)


def test_every_sampler_has_an_objective() -> None:
    names = {objective: DIFFUSION_OBJECTIVES.get(objective.__name__) for objective in (Velocity, DDPM)}
    for name, sampler in SAMPLERS:
        assert sampler.objective in names.values(), name


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Euler(0), "at least 1 steps"),
        (lambda: Heun(4, shift=0.0), "shift"),
        (lambda: DDIM(4, eta=2.0), "eta"),
        (lambda: Ancestral(1), "at least 2 steps"),
        (lambda: Velocity(std=0.0), "deviation"),
        (lambda: DDPM(20), "at least 21"),
        (lambda: DDIM(60).sample(best_prediction(DDPM()), noise, DDPM(50)), "at most as many steps"),
        (lambda: Ancestral().check(DDPM(100)), "at most as many steps as training has times, 100; got 250"),
        (lambda: DDIM(1), "at least 2 steps"),
        (lambda: Velocity(mean=math.nan), "finite mean"),
    ],
)
def test_numbers_out_of_range(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# Objectives


def test_velocity_is_the_path_s_derivative() -> None:
    objective = Velocity()
    clean, drawn = noise(1, 5), noise(2, 5)
    now, step = torch.full((5,), 0.4), 1e-3
    slope = (objective.noised(clean, drawn, now + step) - objective.noised(clean, drawn, now)) / step
    x = objective.noised(clean, drawn, now)
    assert objective.losses(slope, x, clean, drawn, now)["velocity"].max() < 1e-6
    assert torch.equal(objective.noised(clean, drawn, torch.zeros(5)), drawn)
    assert torch.equal(objective.noised(clean, drawn, torch.ones(5)), clean)


def test_times_are_logistic_normal() -> None:
    times = Velocity(-0.5, 1.2).draw_times(20_000, torch.Generator().manual_seed(0))
    logits = torch.logit(times.double())
    assert float(logits.mean()) == pytest.approx(-0.5, abs=0.03) and float(logits.std()) == pytest.approx(1.2, abs=0.03)
    counts = torch.bincount(DDPM(50).draw_times(20_000, torch.Generator().manual_seed(0)), minlength=50)
    assert len(counts) == 50 and float(((counts - 400) ** 2 / 400).sum()) < 90


def test_respacing_keeps_the_noise() -> None:
    schedule = NoiseSchedule.linear(1000)
    kept = torch.tensor([0, 10, 500, 999])
    few = schedule.respaced(kept)
    torch.testing.assert_close(few.signal, schedule.signal[kept], rtol=1e-12, atol=0)
    same = schedule.respaced(torch.arange(1000))
    torch.testing.assert_close(same.betas, schedule.betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("time", [0, 300])
def test_the_bound_is_a_divergence(time: int) -> None:
    """Against torch's own divergence of normal distributions; at time 0 it is the cost of 256 bins."""
    objective, times = DDPM(1000, learned_range=True), torch.full((4,), time)
    clean, drawn = noise(1, 4).tanh(), noise(2, 4)
    x, ranges = objective.noised(clean, drawn, times), noise(3, 4).tanh()
    output = torch.cat([drawn + 0.3 * noise(4, 4), ranges], dim=-1)
    bound = objective.losses(output, x, clean, drawn, times)["bound"]
    schedule = objective.schedule
    predicted = schedule.posterior(schedule.clean(x, output[..., :2], times), x, times)[0]
    own = torch.distributions.Normal(predicted, (schedule.learned_log_variance(ranges, times) / 2).exp())
    if time:
        mean, log_variance = schedule.posterior(clean, x, times)
        true = torch.distributions.Normal(mean, (log_variance / 2).exp())
        expected = torch.distributions.kl_divergence(true, own)
    else:
        upper = torch.where(clean > 0.999, torch.inf, clean + 1 / 255)
        lower = torch.where(clean < -0.999, -torch.inf, clean - 1 / 255)
        expected = -(own.cdf(upper) - own.cdf(lower)).clamp(min=1e-12).log()
    torch.testing.assert_close(bound, expected.mean(-1) / torch.tensor(2.0).log(), rtol=0.02, atol=2e-3)
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(objective.losses(output, x, clean, drawn, times)["bound"].sum(), output)
    assert not gradient[..., :2].any() and gradient[..., 2:].any()


def test_counted_normal_numbers() -> None:
    numbers = normals(torch.arange(200), 500)
    assert torch.equal(normals(torch.arange(200), 30), numbers[:, :30])
    assert torch.equal(normals(torch.tensor([7]), 500)[0], numbers[7])
    flat = numbers.flatten().double()
    shares = torch.histc(torch.special.ndtr(flat), 50, 0, 1) / len(flat)
    assert float((shares - 0.02).abs().max()) < 0.002
    assert abs(float(torch.corrcoef(numbers[:, :2].T)[0, 1])) < 0.2
