"""Token spaces and guidance."""

from __future__ import annotations

import math

import pytest
import torch

from framework.generators.guidance import Guidance, guided
from framework.generators.interface import TokenSpace


@pytest.mark.parametrize("schedule", ["constant", "linear", "power_cosine"])
def test_guidance_ends_at_its_scale_and_is_one_outside_its_interval(schedule: str) -> None:
    guidance = Guidance(4.0, (0.25, 1.0), schedule, power=2.0)  # type: ignore[arg-type]
    assert guidance.scale_at(1.0) == pytest.approx(4)
    assert guidance.scale_at(0.24) == 1
    assert Guidance(1.0, schedule=schedule).scale_at(0.7) == 1  # type: ignore[arg-type]
    scales = [guidance.scale_at(step / 20) for step in range(5, 21)]
    assert scales == sorted(scales) and min(scales) >= 1


def test_schedules_are_those_of_the_papers() -> None:
    assert Guidance(5.0, schedule="linear").scale_at(0.25) == pytest.approx(2)  # Semanticist's 1 to 5
    # RAR: scale_pow = (1 - cos((step / steps)^power pi)) / 2, then 1 + (scale - 1) scale_pow.
    rar = 1 + 15 * (1 - math.cos(math.pi * (96 / 256) ** 2.75)) / 2
    assert Guidance(16.0, schedule="power_cosine", power=2.75).scale_at(96 / 256) == pytest.approx(rar)
    assert rar == pytest.approx(1.17, abs=0.01)  # as the study of RAR-B has it


def test_guidance_of_predictions() -> None:
    with_class, without = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert torch.equal(guided(with_class, without, 3.0), torch.tensor([[4.0, -2.0]]))
    torch.testing.assert_close(guided(with_class, without, torch.tensor([[1.0]])), with_class)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": -1.0}, {"scale": math.nan}, {"interval": (0.5, 0.2)}, {"interval": (0.0, 2.0)}, {"power": 0.0},
     {"schedule": "cubic"}],
)  # fmt: skip
def test_guidance_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        Guidance(**wrong)  # type: ignore[arg-type]


def test_spaces_refuse_what_is_not_in_them() -> None:
    space = TokenSpace(16, 3, 240, (4, 8, 12), 10)
    assert space.longest == 12
    space.check_labels(torch.tensor([0, 9]))
    space.check_lengths(torch.tensor([4, 12]))
    with pytest.raises(ValueError, match="from 0 to 9, got 10"):
        space.check_labels(torch.tensor([3, 10]))
    with pytest.raises(ValueError, match="whole numbers, got torch.float32"):
        space.check_labels(torch.tensor([1.7]))
    many = TokenSpace(16, 3, 240, (4, 8, 12), 256)
    many.check_labels(torch.tensor([0, 255], dtype=torch.uint8))
    with pytest.raises(ValueError, match="sample_ids are whole numbers"):
        many.checked(torch.tensor([1, 2]), torch.tensor([0.2, 0.9]), None, torch.device("cpu"))
    with pytest.raises(ValueError, match="got 9: the nearest is 8"):
        space.check_lengths(torch.tensor([4, 9]))
    for budgets in ((), (4, 4), (8, 4), (0, 4), (4, 17)):
        with pytest.raises(ValueError, match="budgets are lengths from 1 to 16"):
            TokenSpace(16, 3, 240, budgets, 10)
    with pytest.raises(ValueError, match="at least one"):
        TokenSpace(16, 3, 0, (4,), 10)
