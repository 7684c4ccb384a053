from __future__ import annotations

import math

import pytest
import torch

from framework.allocation.search import BinarySearch, FirstPassThreshold, LinearSearch, candidate_budgets
from tests.allocation.curves import Curves, FirstPixel, first_below, random_errors

BUDGETS = [None, [1], [4], [3, 9], [1, 2, 5, 8, 13], [2, 4, 6, 8, 10, 12, 14, 16]]


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 0.5, 1.0])
def test_searches_agree_with_brute_force_on_monotone_curves(budgets: list[int] | None, threshold: float) -> None:
    errors = random_errors(50, 16, monotone=True, seed=0)
    for search in (BinarySearch, LinearSearch):
        policy = search(threshold, budgets, FirstPixel(), num_tokens=16, feature_dim=4)
        allocation = policy(Curves(errors).request)
        assert allocation.lengths.tolist() == first_below(errors, policy.budgets, threshold)
        assert allocation.lengths.dtype == torch.int64


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_linear_search_is_exact_on_any_curve(budgets: list[int] | None) -> None:
    errors = random_errors(100, 16, monotone=False, seed=1)
    policy = LinearSearch(0.25, budgets, FirstPixel(), num_tokens=16, feature_dim=4)
    assert policy(Curves(errors).request).lengths.tolist() == first_below(errors, policy.budgets, 0.25)


def test_binary_search_on_any_curve_meets_the_threshold_or_takes_the_longest() -> None:
    errors = random_errors(200, 16, monotone=False, seed=2)
    lengths = BinarySearch(0.25, None, FirstPixel(), num_tokens=16, feature_dim=4)(Curves(errors).request).lengths
    met = errors[torch.arange(200), lengths - 1] <= 0.25
    assert (met | (lengths == 16)).all()
    exact = torch.tensor(first_below(errors, tuple(range(1, 17)), 0.25))
    assert (lengths >= exact).all() and (lengths > exact).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_and_its_rows_alone_get_the_same(seed: int) -> None:
    errors = random_errors(8, 16, monotone=bool(seed % 2), seed=seed)
    for search in (BinarySearch, LinearSearch):
        policy = search(0.3, None, FirstPixel(), num_tokens=16, feature_dim=4)
        together = policy(Curves(errors).request)
        alone = [policy(Curves(row[None]).request) for row in errors]
        assert together.lengths.tolist() == [allocation.lengths.item() for allocation in alone]
        assert together.decoder_passes == pytest.approx(sum(one.decoder_passes for one in alone) / 8)


@pytest.mark.parametrize("num_budgets", [1, 2, 3, 8, 15, 16])
def test_trials_are_counted_and_few(num_budgets: int) -> None:
    errors = random_errors(64, 16, monotone=True, seed=3)
    budgets = list(range(1, num_budgets + 1))
    curves = Curves(errors, encoder_passes_per_trial=1)
    binary = BinarySearch(0.4, budgets, FirstPixel(), num_tokens=16, feature_dim=4)(curves.request)
    assert binary.decoder_passes == binary.encoder_passes == curves.trials.float().mean().item()
    assert curves.trials.amax() <= math.ceil(math.log2(num_budgets))
    assert len(curves.batches) <= math.ceil(math.log2(num_budgets))

    curves = Curves(errors)
    linear = LinearSearch(0.4, budgets, FirstPixel(), num_tokens=16, feature_dim=4)(curves.request)
    assert curves.trials.tolist() == [min(length, num_budgets - 1) for length in linear.lengths.tolist()]
    assert linear.decoder_passes == curves.trials.double().mean().item()
    assert linear.encoder_passes == 0
    assert curves.batches == sorted(curves.batches, reverse=True)


@pytest.mark.parametrize("place", range(1, 6))
def test_a_step_at_every_place_is_found(place: int) -> None:
    """Off by one at either end: errors of 1 before the place, exactly the threshold from it on."""
    errors = torch.where(torch.arange(1, 6) >= place, 0.5, 1.0)[None]
    for search in (BinarySearch, LinearSearch):
        policy = search(0.5, None, FirstPixel(), num_tokens=5, feature_dim=4)
        assert policy(Curves(errors).request).lengths.tolist() == [place]


def test_errors_that_are_no_numbers_never_pass() -> None:
    errors = torch.full((2, 5), math.nan)
    for search in (BinarySearch, LinearSearch):
        policy = search(0.5, None, FirstPixel(), num_tokens=5, feature_dim=4)
        assert policy(Curves(errors).request).lengths.tolist() == [5, 5]


def test_first_pass_stops_each_image_by_its_own_error() -> None:
    errors = torch.tensor([[0.0] * 16, [1.0] * 7 + [0.1] * 9, [1.0] * 16])
    curves = Curves(errors, encoder_passes_per_trial=1)
    policy = FirstPassThreshold(0.1, 4, FirstPixel(), num_tokens=16, feature_dim=4)
    allocation = policy(curves.request)
    assert policy.budgets == (4, 8, 12, 16)
    assert allocation.lengths.tolist() == [4, 8, 16]
    assert curves.trials.tolist() == [1, 2, 3]
    assert allocation.encoder_passes == allocation.decoder_passes == 2
    assert FirstPassThreshold(0.1, 6, num_tokens=16, feature_dim=4).budgets == (6, 12, 16)
    assert FirstPassThreshold(0.1, 32, num_tokens=16, feature_dim=4).budgets == (16,)


@pytest.mark.parametrize("budgets", [[], [0, 2], [2, 2], [3, 1], [1, 17], [-1]])
def test_budgets_that_do_not_fit_are_refused(budgets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"budgets must increase, from 1 to at most the tokenizer's 16 tokens, got"):
        BinarySearch(0.5, budgets, num_tokens=16, feature_dim=4)


def test_a_refusal_of_budgets_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"got \[32, 8\]; try \[8, 16\]"):
        candidate_budgets([32, 8], 16)
    with pytest.raises(ValueError, match=r"got \[\]; try \[16\]"):
        candidate_budgets([], 16)
    with pytest.raises(ValueError, match=r"got \[17\]; try \[16\]"):
        candidate_budgets(17, 16)
    for nothing in (0, -1):
        with pytest.raises(ValueError, match=r"budgets must increase, from 1"):
            candidate_budgets(nothing, 16)


def test_a_number_stands_for_every_length_from_it() -> None:
    assert candidate_budgets(14, 16) == (14, 15, 16) and candidate_budgets(None, 3) == (1, 2, 3)
