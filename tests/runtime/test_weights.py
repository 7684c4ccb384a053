"""Digests of weights and parts."""

from __future__ import annotations

from copy import deepcopy

import torch

from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.rules import FixedLength
from framework.allocation.search import BinarySearch, LinearSearch
from framework.runtime.weights import part_digest, weights_digest


def test_a_part_is_its_class_its_settings_and_its_weights() -> None:
    given = {"num_tokens": 6, "feature_dim": 4}
    torch.manual_seed(0)
    learned = LearnedPolicy(width=8, depth=1, **given)
    other = deepcopy(learned)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    parts = [
        FixedLength(3, **given), FixedLength(5, **given), LinearSearch(0.1, **given), LinearSearch(0.2, **given),
        LinearSearch(0.1, [1, 6], **given), BinarySearch(0.1, **given), learned, other,
    ]  # fmt: skip
    assert len({part_digest(part) for part in parts}) == len(parts)
    again = deepcopy(learned).requires_grad_(False).eval()
    again.is_frozen = True  # type: ignore[assignment]
    assert part_digest(again) == part_digest(learned), "where a part stands is not what it is"
    assert part_digest(LinearSearch(0.1, **given)) == part_digest(parts[2])
    assert weights_digest(parts[0].state_dict()) == weights_digest(parts[5].state_dict()), "these have none"
