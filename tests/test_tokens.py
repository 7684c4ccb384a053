from __future__ import annotations

import pytest
import torch

from framework.tokens import Tokens


def tokens(**changes: object) -> Tokens:
    parts = {"latents": torch.randn(3, 4, 2), "lengths": torch.tensor([1, 3, 4]), "codes": torch.arange(12).view(3, 4)}
    return Tokens(**{**parts, **changes})  # type: ignore[arg-type]


def test_mask_is_a_prefix_of_each_row() -> None:
    assert tokens().mask.tolist() == [
        [True, False, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_truncate_cuts_everything_and_lengths() -> None:
    whole = tokens()
    cut = whole.truncate(2)
    assert torch.equal(cut.latents, whole.latents[:, :2])
    assert cut.lengths.tolist() == [1, 2, 2]
    assert cut.codes is not None and cut.codes.tolist() == [[0, 1], [4, 5], [8, 9]]


def test_select_rows_and_new_lengths() -> None:
    chosen = tokens().select(torch.tensor([2, 0]))
    assert len(chosen) == 2 and chosen.lengths.tolist() == [4, 1]
    assert tokens().with_lengths(torch.tensor([2, 2, 2])).lengths.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.randn(3, 4)}, r"latents must be \(b, n, d\), got shape \(3, 4\)"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths must be int64 of shape \(3,\), got torch.int64 of shape \(2,\)"),
        ({"lengths": torch.ones(3)}, r"got torch.float32"),
        ({"codes": torch.zeros(3, 5)}, r"codes must have shape \(3, 4\), got \(3, 5\)"),
    ],
)
def test_misfits_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(**changes)
