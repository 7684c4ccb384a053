from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from framework.tokenizers.interface import MASKING
from framework.tokenizers.masking import FullLength, NestedTailMasking
from tests.tokenizers.build import small_tokenizer

DRAWS, TOKENS = 8000, 8
# The share of each length 1..8 that a schedule promises; every registered one must be listed.
SHARES = {
    "NestedTailMasking": [
        ({}, [1 / 8] * 8),
        ({"min_tokens": 3, "max_tokens": 6}, [0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0, 0]),
        ({"full_share": 0.5}, [1 / 16] * 7 + [1 / 16 + 1 / 2]),
        ({"min_tokens": 8}, [0] * 7 + [1]),
    ],
    "FullLength": [({}, [0] * 7 + [1])],
}


def test_every_schedule_is_listed() -> None:
    assert {name for name, _ in MASKING} == set(SHARES)


@pytest.mark.parametrize(
    ("name", "arguments", "shares"), [(name, *case) for name, cases in SHARES.items() for case in cases]
)
def test_distribution_and_determinism(name: str, arguments: dict[str, object], shares: list[float]) -> None:
    schedule = MASKING.get(name)(**arguments)
    drawn = schedule.lengths(DRAWS, TOKENS, 0.5, torch.Generator().manual_seed(3))
    assert drawn.shape == (DRAWS,) and drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=TOKENS + 1)[1:].double()
    expected = torch.tensor(shares, dtype=torch.float64) * DRAWS
    assert (counts[expected == 0] == 0).all()
    if (expected > 0).sum() > 1:
        assert chisquare(counts[expected > 0].numpy(), expected[expected > 0].numpy()).pvalue > 1e-3
    again = schedule.lengths(DRAWS, TOKENS, 0.5, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, again)


def test_lengths_differ_within_a_batch() -> None:
    assert len(NestedTailMasking().lengths(64, 16, 0.0, torch.Generator().manual_seed(0)).unique()) > 8


def test_full_length_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    FullLength().lengths(4, 8, 0.0, generator)
    assert torch.equal(state, generator.get_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_tokens": 0}, "min_tokens must be at least 1, got 0"),
        ({"min_tokens": 4, "max_tokens": 3}, r"max_tokens must be at least min_tokens \(4\), got 3"),
        ({"full_share": 1.5}, "full_share is a share of samples from 0 to 1, got 1.5"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NestedTailMasking(**arguments)  # type: ignore[arg-type]


def test_a_range_beyond_the_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="the encoder makes 8 tokens, which does not hold .* range 1 to 9"):
        NestedTailMasking(max_tokens=9).check(8)
    with pytest.raises(ValueError, match="the encoder makes 6 tokens"):
        small_tokenizer(masking=NestedTailMasking(min_tokens=7))
    NestedTailMasking(max_tokens=8).check(8)
