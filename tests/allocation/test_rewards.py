from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from framework.allocation.rewards import ContinuousReward, ThresholdReward, WeightedReward, is_unimodal
from framework.allocation.weighting import FixedWeights

NUM_TOKENS = 16
BUDGETS = torch.arange(1, NUM_TOKENS + 1)


def falling_curves(convex: bool) -> Tensor:
    """Distortions (200, 16) float64 of random falling curves; convex ones fall ever more slowly."""
    steps = torch.rand(200, NUM_TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if convex:
        steps = steps.sort(dim=1, descending=True).values
    return 0.06 * (1 - steps.cumsum(dim=1) / steps.sum(dim=1, keepdim=True)) ** (3 if convex else 1)


def test_continuous_reward_by_hand() -> None:
    distortions = torch.tensor([[0.05, 0.02], [0.01, 0.0]])
    rewards = ContinuousReward(alpha=20, beta=0.2)(distortions, torch.tensor([64, 256]), 256)
    torch.testing.assert_close(rewards, torch.tensor([[-1.05, -0.6], [-0.25, -0.2]]))


def test_hard_threshold_by_hand() -> None:
    distortions = torch.tensor([[0.05, 0.02], [0.01, 0.021]])
    rewards = ThresholdReward(0.02, gamma=10, tau=0)(distortions, torch.tensor([64, 256]), 256)
    torch.testing.assert_close(rewards, torch.tensor([[-0.3, 1.0], [1.75, -0.01]]))


def test_smoothed_threshold_by_hand() -> None:
    reward = ThresholdReward(0.02, gamma=10, tau=0.1)
    met = 1 / (1 + math.exp(0.5))  # 0.001 above the threshold, with a width of 0.002
    wanted = torch.tensor([[0.5 * 1.75, met * 1.75 - (1 - met) * 0.01]], dtype=torch.float64)
    got = reward(torch.tensor([[0.02, 0.021]], dtype=torch.float64), torch.tensor([64, 64]), 256)
    torch.testing.assert_close(got, wanted)


def test_smoothed_threshold_tends_to_the_hard_one() -> None:
    curves = falling_curves(convex=True)
    hard = ThresholdReward(tau=0)(curves, BUDGETS, NUM_TOKENS)
    away = (curves - 0.02).abs() > 1e-3
    gaps = [(ThresholdReward(tau=t)(curves, BUDGETS, NUM_TOKENS) - hard)[away].abs().max() for t in (0.1, 0.01, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-9


@pytest.mark.parametrize("reward", [ContinuousReward(), ThresholdReward(), WeightedReward(FixedWeights())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_keep_the_dtype_and_prefer_less_distortion(reward: torch.nn.Module, dtype: torch.dtype) -> None:
    distortions = falling_curves(convex=True).to(dtype)
    rewards = reward(distortions, BUDGETS, NUM_TOKENS)
    assert rewards.dtype == dtype and rewards.shape == distortions.shape
    reward.eval()
    assert (reward(distortions + 0.001, BUDGETS, NUM_TOKENS) < reward(distortions, BUDGETS, NUM_TOKENS)).all()


def test_the_hard_threshold_jumps_where_it_is_first_met_and_is_unimodal_but_not_concave() -> None:
    curves = falling_curves(convex=False)
    rewards = ThresholdReward(0.02, tau=0)(curves, BUDGETS, NUM_TOKENS)
    first = (curves <= 0.02).int().argmax(dim=1)
    assert torch.equal(rewards.argmax(dim=1), first)
    assert is_unimodal(rewards).all()
    assert (rewards.diff(dim=1).diff(dim=1) > 0).any(dim=1).double().mean() > 0.9


def test_the_continuous_reward_is_unimodal_on_convex_curves_alone() -> None:
    reward = ContinuousReward(alpha=20, beta=1.0)
    assert is_unimodal(reward(falling_curves(convex=True), BUDGETS, NUM_TOKENS)).all()
    assert not is_unimodal(reward(falling_curves(convex=False), BUDGETS, NUM_TOKENS)).all()


def test_a_curve_that_passes_twice_is_not_unimodal() -> None:
    distortions = torch.tensor([[0.03, 0.01, 0.025, 0.01]])
    assert not is_unimodal(ThresholdReward(tau=0)(distortions, torch.arange(1, 5), 4)).item()


def test_is_unimodal() -> None:
    tables = [[0, 1, 2, 1], [3, 2, 1, 0], [0, 1, 2, 3], [1, 1, 1, 1], [0, 2, 2, 1], [1, 0, 0, 1], [0, 1, 0, 1]]
    assert is_unimodal(torch.tensor(tables, dtype=torch.float32)).tolist() == [True] * 5 + [False] * 2
    assert is_unimodal(torch.zeros(2, 1)).tolist() == [True, True]


def test_weighted_reward_joins_the_raw_terms() -> None:
    reward = WeightedReward(FixedWeights(0.25)).train()
    distortions = torch.tensor([[0.6, 0.2], [0.4, 0.4]])
    got = reward(distortions, torch.tensor([2, 8]), 8)
    # Scales: the mean range of fidelity is (0.4 + 0) / 2, of efficiency 0.75.
    torch.testing.assert_close(got, -0.25 * distortions / 0.2 + torch.tensor([0.75, 0.0]) * 0.75 / 0.75)
    assert reward.metrics() == {"weight_fidelity": 0.25}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ContinuousReward(alpha=-1), "alpha and beta .* at least 0"),
        (lambda: ThresholdReward(threshold=0), "threshold .* above 0"),
        (lambda: ThresholdReward(tau=-0.1), "gamma and tau"),
    ],
)
def test_wrong_arguments_are_refused_in_words(make: type, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
