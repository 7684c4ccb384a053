"""The laws that every registered policy keeps, on a real tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import framework.components  # noqa: F401 - registers every policy
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.rewards import ContinuousReward
from framework.tokenizers.interface import POLICIES
from tests.stir import stirred
from tests.tokenizers.build import small_tokenizer

# What a policy needs beside its defaults; a newcomer without an entry takes its defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "BinarySearch": {"threshold": 0.3},
    "LinearSearch": {"threshold": 0.3},
    "FirstPassThreshold": {"threshold": 0.3, "tokens_per_pass": 2},
    "FixedLength": {"length": 3},
    "OracleAllocation": {"reward": ContinuousReward(beta=0.05)},
    "ComplexityLookup": {"edges": [700.0, 800.0], "budgets": [1, 3, 6]},
}
IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES *= torch.linspace(0, 1, 12)[:, None, None, None]  # from plain to noisy


@pytest.fixture(params=[name for name, _ in POLICIES])
def adaptive(request: pytest.FixtureRequest) -> AdaptiveTokenizer:
    tokenizer = small_tokenizer()
    sizes = {"num_tokens": tokenizer.num_tokens, "feature_dim": tokenizer.encoder.feature_dim}
    policy = POLICIES.get(request.param)(**ARGUMENTS.get(request.param, {}), **sizes)
    return AdaptiveTokenizer(tokenizer, stirred(policy)).eval()


def test_lengths_are_budgets_and_costs_are_counted(adaptive: AdaptiveTokenizer) -> None:
    budgets = adaptive.policy.budgets
    assert list(budgets) == sorted(set(budgets)) and 1 <= budgets[0] and budgets[-1] <= adaptive.num_tokens
    tokens, allocation = adaptive.allocate(IMAGES)
    assert allocation.lengths.shape == (12,) and allocation.lengths.dtype == torch.int64
    assert set(allocation.lengths.tolist()) <= set(budgets)
    assert torch.equal(tokens.lengths, allocation.lengths)
    assert allocation.encoder_passes == 0 and 0 <= allocation.decoder_passes <= len(budgets)
    assert adaptive.decode(tokens).shape == IMAGES.shape


def test_the_choice_for_an_image_does_not_depend_on_its_batch(adaptive: AdaptiveTokenizer) -> None:
    together = adaptive.encode(IMAGES).lengths
    alone = torch.cat([adaptive.encode(IMAGES[row : row + 1]).lengths for row in range(12)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), adaptive.encode(IMAGES.flip(0)).lengths)


def test_using_a_policy_changes_nothing(adaptive: AdaptiveTokenizer) -> None:
    before = {name: value.clone() for name, value in adaptive.state_dict().items()}
    state = torch.random.get_rng_state()
    first, again = adaptive.encode(IMAGES), adaptive.encode(IMAGES)
    assert torch.equal(first.lengths, again.lengths) and torch.equal(first.latents, again.latents)
    assert not first.latents.requires_grad
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in adaptive.state_dict().items())
