from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.allocation.weighting import DynamicParetoWeighting, FixedWeights, Weighting

TOKENS = 16


def tables() -> tuple[Tensor, Tensor]:
    """Fidelity and efficiency (500, 16) of images of many difficulties."""
    generator = torch.Generator().manual_seed(2)
    height, decay = torch.rand(2, 500, 1, generator=generator)
    lengths = torch.arange(1, TOKENS + 1)
    return -0.05 * height * lengths ** (-2 * decay), (1 - lengths / TOKENS).expand(500, TOKENS)


def settled(weighting: Weighting, fidelity: Tensor, efficiency: Tensor) -> Weighting:
    for _ in range(200):
        weighting(fidelity, efficiency)
    return weighting.eval()


def gains(weighting: Weighting, fidelity: Tensor, efficiency: Tensor) -> list[float]:
    """What each objective gains when every image takes its best budget, from 0 to 1."""
    best = weighting.eval()(fidelity, efficiency).argmax(dim=1, keepdim=True)
    return [
        ((term.gather(1, best)[:, 0] - term.amin(dim=1)).mean() / (term.amax(dim=1) - term.amin(dim=1)).mean()).item()
        for term in (fidelity, efficiency)
    ]


def test_scales_are_global_so_images_keep_their_differences() -> None:
    easy, hard = torch.tensor([[-0.01, 0.0], [-0.1, 0.0]])
    reward = FixedWeights(0.5)(torch.stack([easy, hard]), torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    assert reward.argmax(dim=1).tolist() == [0, 1]


def test_scales_average_all_batches_at_first_and_then_forget() -> None:
    weighting = FixedWeights(momentum=0.9)
    efficiency = torch.tensor([[1.0, 0.0]])
    for size in (1.0, 2.0, 3.0):
        weighting(torch.tensor([[0.0, size]]), efficiency)
    torch.testing.assert_close(weighting.scales, torch.tensor([2.0, 1.0]))
    for _ in range(200):
        weighting(torch.tensor([[0.0, 7.0]]), efficiency)
    torch.testing.assert_close(weighting.scales, torch.tensor([7.0, 1.0]))


@pytest.mark.parametrize("make", [FixedWeights, DynamicParetoWeighting])
def test_state_moves_in_training_mode_alone_and_is_saved(make: type[Weighting]) -> None:
    fidelity, efficiency = tables()
    weighting = make()
    fresh = {name: value.clone() for name, value in weighting.state_dict().items()}
    weighting.eval()(fidelity, efficiency)
    assert all(torch.equal(fresh[name], value) for name, value in weighting.state_dict().items())
    weighting.train()(fidelity, efficiency)
    assert not torch.equal(fresh["scales"], weighting.scales)
    copy = make()
    copy.load_state_dict(weighting.state_dict())
    assert torch.equal(copy.eval()(fidelity, efficiency), weighting.eval()(fidelity, efficiency))


def test_dynamic_weights_are_the_nash_bargain_of_the_front() -> None:
    fidelity, efficiency = tables()
    dynamic = settled(DynamicParetoWeighting(), fidelity, efficiency)
    ours = gains(dynamic, fidelity, efficiency)
    products = {}
    for percent in range(5, 100, 5):
        fixed = settled(FixedWeights(percent / 100), fidelity, efficiency)
        others = gains(fixed, fidelity, efficiency)
        products[percent] = others[0] * others[1]
        assert not all(other > own + 1e-6 for other, own in zip(others, ours, strict=True))
    assert ours[0] * ours[1] > max(products.values()) - 1e-3
    assert products[10] < ours[0] * ours[1] - 0.1 and products[90] < ours[0] * ours[1] - 0.1
    # The fixed point: w_i ~ 1 / U_i.
    torch.testing.assert_close(dynamic.weights[0].item(), ours[1] / sum(ours), atol=0.01, rtol=0)


def test_the_bargain_knows_no_units() -> None:
    fidelity, efficiency = tables()
    one = settled(DynamicParetoWeighting(), fidelity, efficiency)
    other = settled(DynamicParetoWeighting(), 1000 * fidelity, efficiency)
    torch.testing.assert_close(one.weights, other.weights)
    torch.testing.assert_close(one(fidelity, efficiency), other(1000 * fidelity, efficiency))


def test_the_term_that_gains_little_weighs_more_until_the_clamp() -> None:
    weighting = DynamicParetoWeighting(min_weight=0.3)
    weighting.scales.copy_(torch.tensor([2.0, 1.0]))
    weighting.gains.copy_(torch.tensor([0.8, 0.6]))
    torch.testing.assert_close(weighting.weights, torch.tensor([0.6, 0.4]))
    assert weighting.metrics() == pytest.approx(
        {"weight_fidelity": 0.6, "regret_fidelity": 0.6, "regret_efficiency": 0.4}, abs=1e-5
    )
    weighting.gains.copy_(torch.tensor([0.02, 0.9]))
    torch.testing.assert_close(weighting.weights, torch.tensor([0.7, 0.3]))


def test_budgets_that_are_all_alike_give_numbers() -> None:
    for weighting in (FixedWeights(), DynamicParetoWeighting()):
        assert weighting(torch.full((3, 2), -0.1), torch.full((3, 2), 0.5)).isfinite().all()
        assert weighting.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FixedWeights(1.5), "weight from 0 to 1, got 1.5"),
        (lambda: FixedWeights(momentum=1.0), "below 1; got 1.0"),
        (lambda: DynamicParetoWeighting(min_weight=0.6), "from 0 to 0.5; got 0.6"),
    ],
)
def test_wrong_arguments_are_refused_in_words(make: type, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
