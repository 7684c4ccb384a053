from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from framework.engine.ema import ExponentialMovingAverage


class Model(nn.Module):
    mean: Tensor
    count: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.judge = nn.Linear(2, 2)
        self.judge.is_frozen = True  # type: ignore[assignment]
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def move(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        self.mean = self.mean + 1  # another tensor under the same name, as some layers do
        self.count += 1


def test_the_formula_with_its_warmup() -> None:
    model = Model()
    average = ExponentialMovingAverage(model, 0.5)
    weight, mean = model.layer.weight.detach().double(), torch.zeros(2).double()
    for step in range(20):
        model.move(step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        weight = decay * weight + (1 - decay) * model.layer.weight.detach().double()
        mean = decay * mean + (1 - decay) * model.mean.double()
    torch.testing.assert_close(average.average["layer.weight"].double(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(average.average["mean"].double(), mean, rtol=1e-6, atol=1e-6)
    assert average.average["count"].item() == 20
    assert set(average.state_dict()) == {"layer.weight", "layer.bias", "mean", "count"}


def test_swapping_in_and_back_even_after_an_error() -> None:
    model = Model()
    average = ExponentialMovingAverage(model, 0.5)
    model.move(0)
    average.update(model, 0)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    held = {name: value.clone() for name, value in average.average.items()}
    with pytest.raises(KeyError), average.swapped(model):
        inside = model.state_dict()
        assert all(torch.equal(inside[name], value) for name, value in held.items())
        assert not torch.equal(inside["layer.weight"], own["layer.weight"])
        assert torch.equal(inside["judge.weight"], own["judge.weight"])
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, held[name]) for name, value in average.average.items())


def test_a_loaded_average_is_a_copy() -> None:
    model = Model()
    first, second = ExponentialMovingAverage(model, 0.9), ExponentialMovingAverage(model, 0.9)
    model.move(0)
    first.update(model, 0)
    second.load_state_dict(first.state_dict())
    expected = second.average["mean"].clone()
    model.move(1)
    first.update(model, 1)
    assert torch.equal(second.average["mean"], expected) and not torch.equal(first.average["mean"], expected)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and below 1, got {decay}"):
        ExponentialMovingAverage(Model(), decay)
