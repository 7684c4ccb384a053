from __future__ import annotations

import math

import pytest

from framework.engine.schedules import SCHEDULES, Constant, Schedule, WarmupCosine


def test_warmup_then_half_a_cosine() -> None:
    schedule = WarmupCosine(warmup_steps=4, end=0.1, max_steps=12)
    assert [schedule(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(8) == pytest.approx(0.55)
    assert schedule(11) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8)))


def test_constant() -> None:
    assert [Constant(max_steps=3)(step) for step in range(3)] == [1.0, 1.0, 1.0]
    assert [Constant(warmup_steps=2, max_steps=4)(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", [cls for _, cls in SCHEDULES])
@pytest.mark.parametrize("max_steps", [1, 20, 100, 101, 1000])
def test_every_schedule_stays_within_0_and_1_even_in_a_run_shorter_than_its_warmup(
    kind: type[Schedule], max_steps: int
) -> None:
    schedule = kind(warmup_steps=100, max_steps=max_steps)  # type: ignore[call-arg]
    factors = [schedule(step) for step in range(max_steps)]
    assert factors[0] == 0.01 and all(0 < factor <= 1 for factor in factors)
    assert factors[: min(100, max_steps)] == sorted(factors[: min(100, max_steps)])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must be 0 or more, got -1"):
        Constant(warmup_steps=-1, max_steps=3)
    with pytest.raises(ValueError, match="from 0 to 1; got 2"):
        WarmupCosine(end=2, max_steps=3)
