from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from framework.losses.values import LatentLoss, ProxyCodeLoss

VALUES = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
CODES = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
def test_latents_are_compared_value_by_value(norm: str, power: int) -> None:
    target = torch.randn_like(VALUES)
    expected = (VALUES - target).abs().pow(power).mean()
    torch.testing.assert_close(LatentLoss(norm, weight=3.0)(VALUES, target), 3 * expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_codes_are_predicted(smoothing: float) -> None:
    shares = torch.full((5, 2, 3, 4), smoothing / 5)
    shares = shares + (1 - smoothing) * F.one_hot(CODES, 5).movedim(-1, 0)
    expected = -(shares.movedim(0, 1) * VALUES.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ProxyCodeLoss(smoothing, weight=2.0)(VALUES, CODES), 2 * expected)
    even = ProxyCodeLoss(smoothing)(torch.zeros_like(VALUES), CODES)
    torch.testing.assert_close(even, torch.tensor(math.log(5)))


def test_they_are_computed_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert LatentLoss()(VALUES.bfloat16(), VALUES).dtype == torch.float32
        assert ProxyCodeLoss()(VALUES.bfloat16(), CODES).dtype == torch.float32


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(TypeError, match="no latents to be near to: take ProxyCodeLoss"):
        LatentLoss()(VALUES, CODES)
    with pytest.raises(TypeError, match="no codes to predict: take LatentLoss"):
        ProxyCodeLoss()(VALUES, VALUES)
    with pytest.raises(ValueError, match="label_smoothing is a share, at least 0 and below 1; got 1"):
        ProxyCodeLoss(1.0)
