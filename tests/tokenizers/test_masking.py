from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from framework.tokenizers.interface import MASKING, MaskingSchedule
from framework.tokenizers.masking import (
    DelayedStart,
    FixedBudgets,
    FullLength,
    NestedTailMasking,
    PowerOfTwoLengths,
    TailTokenDrop,
)
from tests.tokenizers.build import small_tokenizer

DRAWS, TOKENS, PROGRESS = 4000, 8, 0.5
QUARTERS = {1: 1 / 4, 2: 1 / 4, 4: 1 / 4, 8: 1 / 4}
UNIFORM = {length: 1 / 8 for length in range(1, 9)}
# The share of each length that a schedule promises at half of training; every registered one must be listed.
CASES: list[tuple[MaskingSchedule, dict[int, float]]] = [
    (NestedTailMasking(), UNIFORM),
    (NestedTailMasking(3, 6), {length: 1 / 4 for length in (3, 4, 5, 6)}),
    (NestedTailMasking(full_share=0.5), {length: (1 + 8 * (length == 8)) / 16 for length in range(1, 9)}),
    (NestedTailMasking(full_share=1.0), {8: 1.0}),
    (NestedTailMasking(min_tokens=8), {8: 1.0}),
    (TailTokenDrop(), UNIFORM),
    (TailTokenDrop(2, 4), {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}),
    (PowerOfTwoLengths(), QUARTERS),
    (PowerOfTwoLengths(2, 4), {2: 1 / 2, 4: 1 / 2}),
    (PowerOfTwoLengths(draw="uniform_pow2"), {1: 1 / 8, 2: 1 / 8, 4: 2 / 8, 8: 4 / 8}),
    (PowerOfTwoLengths(3, 6, draw="uniform_pow2"), {4: 1 / 2, 6: 1 / 2}),
    (FixedBudgets([1, 2, 4, 8]), QUARTERS),
    (FixedBudgets([7, 2], [0.1, 0.9]), {2: 0.9, 7: 0.1}),
    (FixedBudgets([1, 5, 6], [0.0, 1.0, 0.0]), {5: 1.0}),
    (DelayedStart(FixedBudgets([1, 2, 4, 8]), start=0.5), QUARTERS),
    (DelayedStart(NestedTailMasking(), start=0.6), {8: 1.0}),
    (FullLength(), {8: 1.0}),
]
# One-D-Piece draws once for the batch; every other schedule must keep the law of the split batch.
ONE_DRAW_A_BATCH = TailTokenDrop


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_schedule_is_listed() -> None:
    assert {name for name, _ in MASKING} == {type(schedule).__name__ for schedule, _ in CASES}


@pytest.fixture(params=CASES, ids=lambda case: f"{type(case[0]).__name__}-{sorted(case[1])}")
def case(request: pytest.FixtureRequest) -> tuple[MaskingSchedule, dict[int, float]]:
    schedule, shares = request.param
    schedule.check(TOKENS)
    return schedule, shares


def test_distribution(case: tuple[MaskingSchedule, dict[int, float]]) -> None:
    schedule, shares = case
    draw = generator()
    drawn = torch.cat([schedule.lengths(1, TOKENS, PROGRESS, draw) for _ in range(DRAWS)])
    assert set(drawn.tolist()) == set(shares) <= set(range(1, TOKENS + 1))
    if len(shares) > 1:
        counts = [int((drawn == length).sum()) for length in shares]
        assert chisquare(counts, [share * DRAWS for share in shares.values()]).pvalue > 1e-3


def test_same_generator_state_gives_the_same_lengths(case: tuple[MaskingSchedule, dict[int, float]]) -> None:
    first, second, other = (case[0].lengths(64, TOKENS, PROGRESS, generator(seed)) for seed in (3, 3, 4))
    assert first.shape == (64,) and first.dtype == torch.int64 and first.device.type == "cpu"
    assert torch.equal(first, second)
    if len(case[1]) > 1 and not isinstance(case[0], ONE_DRAW_A_BATCH):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("sizes", [(32, 32), (1, 63), (17, 30, 17)])
def test_parts_of_a_batch_get_the_lengths_of_the_whole(
    case: tuple[MaskingSchedule, dict[int, float]], sizes: tuple[int, ...]
) -> None:
    schedule, shares = case
    draw = generator()
    parts = [schedule.lengths(size, TOKENS, PROGRESS, draw) for size in sizes]
    if isinstance(schedule, ONE_DRAW_A_BATCH):
        assert all(len(part.unique()) == 1 for part in parts)
    else:
        whole = schedule.lengths(64, TOKENS, PROGRESS, generator())
        assert torch.equal(torch.cat(parts), whole)
        assert len(whole.unique()) > 1 or len(shares) == 1


def test_delayed_start_keeps_everything_and_draws_nothing_before_its_time() -> None:
    schedule, draw = DelayedStart(NestedTailMasking(max_tokens=4), start=0.125), generator()
    state = draw.get_state()
    for progress in (0.0, 0.1249):
        assert schedule.lengths(64, TOKENS, progress, draw).tolist() == [TOKENS] * 64
    assert torch.equal(state, draw.get_state())
    for progress in (0.125, 1.0):
        expected = NestedTailMasking(max_tokens=4).lengths(64, TOKENS, progress, generator())
        assert torch.equal(schedule.lengths(64, TOKENS, progress, generator()), expected)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (NestedTailMasking, {"min_tokens": 0}, "min_tokens must be at least 1, got 0"),
        (TailTokenDrop, {"min_tokens": 4, "max_tokens": 3}, r"max_tokens must be at least min_tokens \(4\), got 3"),
        (NestedTailMasking, {"full_share": 1.5}, "full_share is a share of samples from 0 to 1, got 1.5"),
        (FixedBudgets, {"budgets": []}, r"one or more lengths of at least 1 token, got \[\]"),
        (FixedBudgets, {"budgets": [4, 0]}, r"one or more lengths of at least 1 token, got \[4, 0\]"),
        (FixedBudgets, {"budgets": [1, 2], "probabilities": [1.0]}, r"2 shares that sum to 1.*got \[1.0\]"),
        (FixedBudgets, {"budgets": [1, 2], "probabilities": [1.5, -0.5]}, "2 shares that sum to 1"),
        (FixedBudgets, {"budgets": [1, 2], "probabilities": [0.5, 0.4]}, "2 shares that sum to 1"),
        (FixedBudgets, {"budgets": [1, 2], "probabilities": [float("nan"), 0.5]}, "2 shares that sum to 1"),
        (DelayedStart, {"schedule": FullLength(), "start": 50}, "progress of training from 0 to 1, got 50"),
    ],
)
def test_wrong_arguments_are_refused(schedule: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**arguments)


@pytest.mark.parametrize(
    ("schedule", "num_tokens", "message"),
    [
        (NestedTailMasking(max_tokens=9), 8, "the encoder makes 8 tokens, which does not hold .* range 1 to 9"),
        (TailTokenDrop(min_tokens=7), 6, "the encoder makes 6 tokens"),
        (PowerOfTwoLengths(max_tokens=16), 12, "the encoder makes 12 tokens"),
        (PowerOfTwoLengths(), 12, "never keep tokens 9 to 12, .* to 8 or 16, or masking.draw to uniform_pow2"),
        (PowerOfTwoLengths(max_tokens=17), 32, "never keep tokens 17 to 17, .* to 16 or 32"),
        (FixedBudgets([2, 9]), 8, "the encoder makes 8 tokens, fewer than the budget 9"),
        (DelayedStart(FixedBudgets([2, 9]), start=0.1), 8, "fewer than the budget 9"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(schedule: MaskingSchedule, num_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule.check(num_tokens)
    with pytest.raises(ValueError, match=message):
        small_tokenizer(num_tokens=num_tokens, masking=schedule)


def test_every_length_up_to_the_end_fits() -> None:
    for num_tokens in (1, 2, 8, 64):
        PowerOfTwoLengths().check(num_tokens)
    PowerOfTwoLengths(max_tokens=8).check(12)
    PowerOfTwoLengths(draw="uniform_pow2").check(12)
    FixedBudgets([8]).check(8)
    NestedTailMasking(max_tokens=8).check(8)
