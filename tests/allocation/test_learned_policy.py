from __future__ import annotations

import pytest
import torch

from framework.allocation.learned_policy import LearnedPolicy
from framework.tokenizers.interface import POLICIES, AllocationRequest


def policy(budgets: list[int] | None = None, depth: int = 2) -> LearnedPolicy:
    return LearnedPolicy(budgets, width=8, depth=depth, num_tokens=16, feature_dim=6)


def request(features: torch.Tensor) -> AllocationRequest:
    def never(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a learned policy reconstructs nothing")

    return AllocationRequest(features, torch.zeros(len(features), 3, 4, 4), never)


def test_it_is_registered() -> None:
    assert POLICIES.get("LearnedPolicy") is LearnedPolicy


def test_budgets_default_to_every_length() -> None:
    assert policy().budgets == tuple(range(1, 17))
    assert policy([2, 5, 16]).budgets == (2, 5, 16)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_it_starts_uniform(depth: int) -> None:
    assert torch.equal(policy([2, 5, 16], depth).logits(torch.randn(4, 6)), torch.zeros(4, 3))


def test_it_takes_the_most_likely_budget_and_spends_no_pass() -> None:
    learned = policy([2, 5, 16])
    torch.nn.init.normal_(learned.network[-1].get_parameter("weight"))
    features = torch.randn(64, 6)
    logits = learned.logits(features)
    allocation = learned(request(features))
    assert allocation.lengths.tolist() == [(2, 5, 16)[index] for index in logits.argmax(dim=1).tolist()]
    assert len(set(allocation.lengths.tolist())) > 1
    assert (allocation.encoder_passes, allocation.decoder_passes) == (0, 0)
    assert logits.requires_grad and not allocation.lengths.is_floating_point()


def test_it_computes_in_float32_under_autocast() -> None:
    learned = policy()
    torch.nn.init.normal_(learned.network[-1].get_parameter("weight"))
    features = torch.randn(8, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = learned.logits(features)
    assert under.dtype == torch.float32
    assert torch.equal(under, learned.logits(features.float()))


@pytest.mark.parametrize("budgets", [[0, 4], [4, 17], [8, 4], [4, 4, 8], []])
def test_wrong_budgets_are_refused_in_words(budgets: list[int]) -> None:
    with pytest.raises(ValueError, match="budgets must .*16 tokens"):
        policy(budgets)
