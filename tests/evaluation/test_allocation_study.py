from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.fidelity import Fidelity, SquaredError
from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.rewards import ContinuousReward, Reward, ThresholdReward, WeightedReward
from framework.allocation.rules import FixedLength, OracleAllocation, png_bytes
from framework.allocation.search import BinarySearch, LinearSearch
from framework.allocation.weighting import FixedWeights
from framework.evaluation.allocation_study import AllocationStudy, describe, rank_correlation, study_allocation
from framework.evaluation.rate_distortion import rate_distortion
from framework.tokenizers.interface import Allocation, AllocationPolicy
from framework.tokenizers.tokenizer import Tokenizer
from tests.evaluation.fakes import FixedImages
from tests.stir import stirred
from tests.tokenizers.build import small_tokenizer

BUDGETS = (1, 2, 4)
ERRORS = torch.tensor([[0.8, 0.35, 0.02], [0.2, 0.15, 0.05], [0.5, 0.45, 0.0], [0.1, 0.1, 0.1]])
# With alpha 1, beta 0.4 and four tokens, a token costs 0.1:
#   rewards    -0.90 -0.55 -0.42 | -0.30 -0.35 -0.45 | -0.60 -0.65 -0.40 | -0.20 -0.30 -0.50
#   means      -0.50 at one token, -0.4625 at two, -0.4425 at four


def made_up(
    errors: Tensor = ERRORS,
    lengths: tuple[int, ...] = (4, 2, 4, 1),
    budgets: tuple[int, ...] = BUDGETS,
    reward: Reward | None = None,
    sizes: tuple[int, ...] | None = None,
    encoder_passes_per_trial: int = 0,
) -> AllocationStudy:
    return AllocationStudy(
        errors.float(),
        errors.double(),
        budgets,
        budgets[-1],
        (reward or ContinuousReward(1.0, 0.4)).eval(),
        Allocation(torch.tensor(lengths), 0.5, 0.25),
        encoder_passes_per_trial,
        torch.tensor(sizes or tuple(range(len(errors))), dtype=torch.float64),
        tuple(f"image,{row}" for row in range(len(errors))),
        tuple("ab"[row % 2] for row in range(len(errors))),
        {"data": "made up"},
    )


def random_study(seed: int, reward: Reward, num_images: int = 40) -> AllocationStudy:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(num_images, 8, generator=generator) * 0.1
    lengths = torch.randint(1, 9, (num_images,), generator=generator)
    return made_up(errors, tuple(lengths.tolist()), tuple(range(1, 9)), reward)


def test_numbers_by_hand() -> None:
    summary = made_up(sizes=(30, 10, 40, 20)).summary()
    rewards = {name: numbers["reward"] for name, numbers in summary["policies"].items()}
    # The best of all thresholds for the search is 0.2, with lengths 4, 1, 4 and 1.
    assert rewards == pytest.approx(
        {
            "policy": (-0.42 - 0.35 - 0.4 - 0.2) / 4,
            "fixed_at_mean": -0.625 * 0.4625 - 0.375 * 0.4425,  # 2.75 tokens lie at 3/8 between two and four
            "best_fixed": -0.4425,
            "full": -0.4425,
            "shuffled": -0.25 * 0.5 - 0.25 * 0.4625 - 0.5 * 0.4425,
            "png": (-0.42 - 0.3 - 0.4 - 0.3) / 4,  # 1, 2, 4 and 4 tokens by increasing size
            "binary_search": (-0.42 - 0.3 - 0.4 - 0.2) / 4,
            "oracle": (-0.42 - 0.3 - 0.4 - 0.2) / 4,
        }
    )
    assert list(rewards) == list(summary["policies"]) == ["policy", *summary["differences"]]
    policy = summary["policies"]["policy"]
    assert policy["length"] == 2.75 and policy["length_std"] == pytest.approx(1.6875**0.5)
    assert policy["mse"] == pytest.approx((0.02 + 0.15 + 0.0 + 0.1) / 4)
    assert policy["mse_std"] == pytest.approx(torch.tensor([0.02, 0.15, 0.0, 0.1]).std(correction=0).item())
    assert policy["rqpr"] == {"0.005": 0.25, "0.01": 0.25, "0.02": 0.5}
    assert (policy["encoder_passes"], policy["decoder_passes"]) == (0.5, 0.25)
    assert summary["policies"]["oracle"]["decoder_passes"] == 3
    assert summary["gap"] == pytest.approx({"fixed_at_mean": 0.1125 / 0.125, "best_fixed": 0.1 / 0.1125})
    gained = summary["differences"]["fixed_at_mean"]
    assert gained["reward"] == pytest.approx(0.1125)
    assert gained["reward_interval"][0] < gained["reward"] < gained["reward_interval"][1]
    assert gained["mse"] == pytest.approx(0.0675 - 0.625 * 0.2625 - 0.375 * 0.0425)
    assert summary["unimodal"] == 3 / 4 and summary["falling"] == 6 / 8
    assert summary["rank_correlation"] == {
        "error_at_shortest": rank_correlation(torch.tensor([4, 2, 4, 1]), ERRORS[:, 0]),
        "png_bytes": rank_correlation(torch.tensor([4, 2, 4, 1]), torch.tensor([30, 10, 40, 20])),
    }


def test_bits_count_tokens_and_where_lengths_differ_the_lengths() -> None:
    study = replace(made_up(), bits_per_token=10.0)
    bits = {name: numbers["bits"] for name, numbers in study.systems().items()}
    assert bits == pytest.approx({"full": 40, "adaptive": 27.5 + math.log2(3)})
    alike = replace(made_up(lengths=(2, 2, 2, 2)), bits_per_token=10.0)
    assert alike.systems()["adaptive"]["bits"] == 20
    assert [numbers["bits"] for numbers in made_up().systems().values()] == [None, None]
    psnr = -10 * (torch.tensor([0.02, 0.15, 1e-10, 0.1]).double().log10()).mean().item()
    assert study.systems()["adaptive"]["psnr"] == pytest.approx(psnr)


def test_choices_by_kind_are_means_over_its_images() -> None:
    study = replace(made_up(), kinds=("10 digits", "2 digits", "10 digits", "2 digits"))
    assert list(study.by_kind()) == ["2 digits", "10 digits"] and made_up().by_kind() == {}
    assert study.by_kind()["10 digits"] == pytest.approx({"count": 2, "length": 4, "reward": -0.41, "mse": 0.01})
    assert study.by_kind()["2 digits"] == pytest.approx({"count": 2, "length": 1.5, "reward": -0.275, "mse": 0.125})


def test_shuffled_is_the_mean_over_all_permutations() -> None:
    study = made_up()
    orders = [made_up(lengths=order).choices["policy"] for order in permutations((4, 2, 4, 1))]
    shuffled = study.choices["shuffled"]
    for table in (study.rewards, study.squared_errors, (study.squared_errors <= 0.1).double()):
        assert shuffled.mean(table) == pytest.approx(sum(order.mean(table) for order in orders) / len(orders))
    lengths = study.tables["length"]
    assert shuffled.mean(lengths) == 2.75 and shuffled.std(lengths) == pytest.approx(1.6875**0.5)


def test_a_fixed_length_at_a_budget_is_that_budget() -> None:
    study = made_up(lengths=(1, 1, 2, 4))
    assert study.choices["fixed_at_mean"].mean(study.rewards) == pytest.approx(-0.4625)
    only = made_up(ERRORS[:, :1], (1, 1, 1, 1), (1,))
    assert only.choices["fixed_at_mean"].shares.tolist() == [[1.0]] * 4
    assert only.summary()["gap"] == {"fixed_at_mean": None, "best_fixed": None}


@pytest.mark.parametrize("reward", [ContinuousReward(), ThresholdReward(0.03), WeightedReward(FixedWeights())])
def test_nothing_beats_the_oracle(reward: Reward) -> None:
    study = random_study(0, reward)
    rewards = {name: choice.per_image(study.rewards) for name, choice in study.choices.items()}
    assert all((rewards["oracle"] >= other - 1e-12).all() for other in rewards.values())
    assert all((choice.shares.sum(1) - 1).abs().max() < 1e-12 for choice in study.choices.values())
    assert rewards["best_fixed"].mean().item() == pytest.approx(study.rewards.mean(0).max().item())
    fixed, policy = (study.choices[name].mean(study.tables["length"]) for name in ("fixed_at_mean", "policy"))
    assert fixed == pytest.approx(policy)


def test_intervals_are_of_paired_differences() -> None:
    study = made_up(lengths=(4, 4, 4, 4))
    same = study.summary()["differences"]["full"]
    assert same == {"reward": 0, "reward_interval": [0, 0], "mse": 0, "mse_interval": [0, 0]}


def test_sizes_order_the_policys_lengths() -> None:
    study = made_up(sizes=(50, 40, 40, 10))
    assert study.choices["png"].shares.argmax(1).tolist() == [2, 1, 2, 0]  # of equal sizes the first is the shorter


def test_the_search_takes_a_threshold_rewards_own_threshold() -> None:
    study = random_study(1, ThresholdReward(0.04))
    assert study.search_threshold == 0.04
    lengths = study.search(0.04).lengths
    passed = study.distortions.gather(1, (lengths - 1)[:, None])[:, 0] <= 0.04
    assert (passed | (lengths == 8)).all()
    assert study.choices["binary_search"].decoder_passes == 3


def test_other_rewards_search_for_the_best_quantile_in_hindsight() -> None:
    study = random_study(2, ContinuousReward(10.0, 0.5))
    found = study.choices["binary_search"].mean(study.rewards)
    for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        lengths = study.search(study.distortions.double().quantile(share).item()).lengths
        assert found >= study.rewards.gather(1, (lengths - 1)[:, None]).mean().item() - 1e-12


def test_shares_of_unimodal_rewards_hard_and_smoothed() -> None:
    errors = torch.tensor([[0.5, 0.03, 0.019, 0.018], [0.5, 0.021, 0.0199, 0.0199], [0.01, 0.03, 0.01, 0.01]])
    summary = made_up(errors, (1, 2, 3), (1, 2, 3, 4), ThresholdReward(0.02, 10.0, 0.1)).summary()
    assert summary["unimodal_hard"] == pytest.approx(2 / 3)  # the last image passes, fails and passes again
    assert summary["falling"] == pytest.approx(6 / 9)
    assert "unimodal_hard" not in made_up().summary()


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    first, second = torch.tensor([10, 20, 20, 30]), torch.tensor([1.0, 2.0, 3.0, 9.0])
    assert rank_correlation(first, second) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    assert rank_correlation(first, torch.ones(4)) is None


def test_a_spread_reaches_from_the_shortest_length_to_the_longest() -> None:
    study = made_up(ERRORS.repeat(5, 1), (4, 2, 1, 2) * 5)
    assert study.lengths[study.spread(3)].tolist() == [1, 2, 4]
    assert sorted(study.spread(50)) == list(range(20))


def test_a_reward_is_described_with_all_that_it_was_made_with_and_learned() -> None:
    assert describe(ThresholdReward(0.02, 10.0, 0.1)) == {
        "name": "ThresholdReward", "threshold": 0.02, "gamma": 10.0, "tau": 0.1,
    }  # fmt: skip
    weighting = {"name": "FixedWeights", "momentum": 0.99, "fidelity": 0.25, "scales": [1.0, 1.0], "batches": 0.0}
    assert describe(WeightedReward(FixedWeights(0.25))) == {"name": "WeightedReward", "weighting": weighting}


class LargestError(Fidelity):
    """Another number than the squared error."""

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return (reconstructions - images).abs().flatten(1).amax(1)


def images() -> FixedImages:
    pixels = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return FixedImages(pixels, ["cat", "coin"] * 10)


def adaptive(tokenizer: Tokenizer, policy: Any, *arguments: Any, **options: Any) -> AdaptiveTokenizer:
    built: AllocationPolicy = policy(
        *arguments, **options, num_tokens=tokenizer.num_tokens, feature_dim=tokenizer.encoder.feature_dim
    )
    return AdaptiveTokenizer(tokenizer, built).eval()


@pytest.mark.parametrize("encoder", ["SuffixTokenViT", "PatchEncoder"])
def test_a_search_of_the_table_is_a_search_of_the_tokenizer(encoder: str) -> None:
    tokenizer = small_tokenizer(encoder_name=encoder).eval()
    errors = rate_distortion(tokenizer, images(), range(1, tokenizer.num_tokens + 1)).errors
    threshold = errors.median().item() * 1.000001
    model = adaptive(tokenizer, BinarySearch, threshold)
    study = study_allocation(model, ContinuousReward(), SquaredError(), images(), {})
    found = study.search(threshold)
    assert torch.equal(found.lengths, study.lengths) and len(set(found.lengths.tolist())) > 1
    assert (found.encoder_passes, found.decoder_passes) == pytest.approx(
        (study.allocation.encoder_passes, study.allocation.decoder_passes)
    )
    model = adaptive(tokenizer, OracleAllocation, ContinuousReward())
    oracle = study_allocation(model, ContinuousReward(), SquaredError(), images(), {})
    assert torch.equal(oracle.choices["policy"].shares, oracle.choices["oracle"].shares)
    assert oracle.allocation.encoder_passes == oracle.choices["oracle"].encoder_passes
    assert oracle.allocation.decoder_passes == oracle.choices["oracle"].decoder_passes == tokenizer.num_tokens


def test_a_study_measures_what_it_says() -> None:
    tokenizer, told = small_tokenizer().eval(), []
    model = adaptive(tokenizer, LearnedPolicy, [1, 3, 6])
    stirred(model.policy)
    study = study_allocation(
        model, ContinuousReward(), LargestError(), images(), {"step": 3}, 12, lambda *state: told.append(state)
    )
    curve = rate_distortion(tokenizer, images(), (1, 3, 6), 12)
    torch.testing.assert_close(study.squared_errors, curve.errors)
    assert (study.distortions > study.squared_errors).all()
    assert (study.keys, study.groups, study.budgets) == (curve.keys, curve.groups, (1, 3, 6))
    assert told[-1] == ("squared errors", 12, 12) and ("errors", 12, 12) in told
    rows = [int(key.split("@")[1].split(",")[0]) for key in study.keys]
    chosen = images().images[rows]
    assert torch.equal(study.lengths, model.allocate(chosen)[1].lengths)
    assert torch.equal(study.png_bytes, png_bytes(chosen))
    expected = {"images": 12, "of": 20, "policy": "LearnedPolicy", "fidelity": "LargestError()", "num_tokens": 6}
    assert expected.items() <= study.protocol.items() and study.protocol["weights"] == {"step": 3}


def test_a_policy_of_one_length_is_measured_beside_the_default_lengths() -> None:
    model = adaptive(small_tokenizer(), FixedLength, 3)
    study = study_allocation(model, ContinuousReward(), SquaredError(), images(), {})
    assert study.budgets == (1, 2, 3, 4, 6)
    summary = study.summary()
    assert summary["policies"]["policy"]["reward"] == pytest.approx(study.rewards[:, 2].mean().item())
    assert summary["differences"]["shuffled"]["reward"] == pytest.approx(0)
    assert summary["rank_correlation"] == {"error_at_shortest": None, "png_bytes": None}


def test_costs_are_averaged_over_images_not_batches() -> None:
    pixels = torch.rand(70, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # a batch of 64 and one of 6
    data = FixedImages(pixels, ["cat"] * 70)
    tokenizer = small_tokenizer().eval()
    threshold = rate_distortion(tokenizer, data, range(1, 7)).errors[:, 2].median().item() * 1.000001
    study = study_allocation(adaptive(tokenizer, LinearSearch, threshold), ContinuousReward(), SquaredError(), data, {})
    trials = study.lengths.clamp(max=5).double().mean().item()  # the longest is what remains
    assert study.allocation.decoder_passes == pytest.approx(trials) and 1 < trials < 5
