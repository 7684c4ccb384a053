from __future__ import annotations

import math

import pytest
import torch

from framework.evaluation.image_metrics import psnr, rqpr, squared_error


def test_squared_error_is_a_mean_over_pixels_and_channels_of_each_image() -> None:
    images = torch.zeros(2, 3, 4, 4)
    rebuilt = images.clone()
    rebuilt[0] = 0.5
    rebuilt[1, 0, 0, 0] = 1.0
    assert squared_error(images, rebuilt).tolist() == pytest.approx([0.25, 1 / 48])


def test_squared_error_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) cannot be compared .* \(1, 3, 4, 4\)"):
        squared_error(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_psnr_is_in_decibels_and_finite_for_an_exact_copy() -> None:
    errors = torch.tensor([0.01, 0.02, 0.0], dtype=torch.float64)
    assert psnr(errors).tolist() == pytest.approx([20.0, 10 * math.log10(50), 100.0])


def test_rqpr_counts_images_at_or_below_the_threshold() -> None:
    errors = torch.tensor([[0.03, 0.01], [0.02, 0.005], [0.04, 0.02], [0.5, 0.021]])
    assert rqpr(errors, 0.02).tolist() == [0.25, 0.75]
