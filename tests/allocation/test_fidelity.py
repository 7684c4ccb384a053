from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.allocation.fidelity import FIDELITIES, Fidelity, SquaredError
from framework.losses.interface import Loss
from framework.losses.reconstruction import PixelLoss


class LossPerImage(Fidelity):
    """As in the docstring of Fidelity."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        pairs = zip(reconstructions.split(1), images.split(1), strict=True)
        return torch.stack([self.loss(*pair) for pair in pairs])


class KeepsItsClass(Fidelity):
    """As in the docstring of Fidelity."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        classes = self.classifier(images).argmax(1)
        return F.cross_entropy(self.classifier(reconstructions), classes, reduction="none")


def test_squared_error_is_per_image_and_in_unit_range() -> None:
    images = torch.zeros(3, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    assert SquaredError()(reconstructions, images).tolist() == [0.0, 0.25, 1.0]
    one_pixel = images.clone()
    one_pixel[1, 2, 3, 3] = 1
    assert SquaredError()(one_pixel, images).tolist() == pytest.approx([0, 1 / 48, 0])


def test_squared_error_is_float32_of_half_precision() -> None:
    images, reconstructions = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.501)
    error = SquaredError()(reconstructions.bfloat16(), images.bfloat16())
    assert error.dtype == torch.float32
    assert FIDELITIES.get("SquaredError") is SquaredError


def test_a_loss_or_a_classifier_becomes_a_fidelity_in_a_small_class() -> None:
    generator = torch.Generator().manual_seed(0)
    images, reconstructions = (torch.rand(4, 3, 4, 4, generator=generator) for _ in range(2))
    four_times = LossPerImage(PixelLoss(norm="l2"))(reconstructions, images)
    assert torch.allclose(four_times, 4 * SquaredError()(reconstructions, images))
    torch.manual_seed(0)
    classes = KeepsItsClass(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)))
    assert (classes(images, images) < F.cross_entropy(torch.zeros(4, 5), torch.zeros(4).long())).all()
    assert classes(reconstructions, images).shape == (4,)
