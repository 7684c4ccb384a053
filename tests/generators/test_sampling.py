"""Draws from logits: their law, and that they depend on their key alone."""

from __future__ import annotations

import pytest
import torch

from framework.generators.sampling import Sampling, race
from framework.runtime.hashing import hashed, purpose_key, unit_of

KEYS = hashed(purpose_key(0, "code"), torch.arange(20_000))
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def shares(sampling: Sampling, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    drawn = sampling.draw(logits.expand(len(KEYS), -1), KEYS)
    return torch.bincount(drawn, minlength=len(logits)) / len(KEYS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(shares(Sampling(temperature)), expected, atol=0.012, rtol=0)


def test_rare_codes_are_as_rare_as_they_should_be() -> None:
    """Of 512 equal codes, each is drawn as often as the others, as Poisson has it."""
    drawn = race(torch.zeros(1, 512).expand(8000, -1), KEYS[:8000])
    counts = torch.bincount(drawn, minlength=512).double()
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.2)
    assert abs(drawn.double().mean() / 511 - 0.5) < 0.02


def test_filters_leave_the_likeliest() -> None:
    assert (shares(Sampling(top_k=2))[2:] == 0).all()
    torch.testing.assert_close(shares(Sampling(top_k=2))[:2], LOGITS[:2].softmax(0), atol=0.012, rtol=0)
    assert shares(Sampling(top_p=0.1))[0] == 1  # at least one
    assert (shares(Sampling(top_p=0.7))[2:] == 0).all()  # .64, and the one that crosses
    assert shares(Sampling(temperature=0))[0] == 1
    assert torch.equal(Sampling(top_k=9).filtered(LOGITS[None]), LOGITS[None])


def test_what_the_filters_leave_is_drawn_even_if_it_comes_last() -> None:
    """Of this key and entry 3 the number is so near 1 that as a float32 it is 1, and the time infinite."""
    key = torch.tensor([22_423_427])
    assert unit_of(hashed(key, torch.tensor([3]))).float() == 1
    logits = torch.arange(8.0)[None].where(torch.arange(8) <= 3, torch.tensor(-10.0))
    assert Sampling(top_k=1).draw(logits, key).item() == 3


def test_a_draw_depends_on_its_row_alone() -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    every = race(logits, KEYS[:50])
    rows = torch.tensor([31, 4])
    assert torch.equal(race(logits[rows], KEYS[rows]), every[rows])
    assert not torch.equal(race(logits, KEYS[50:100]), every)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": 1e-40}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        Sampling(**wrong)  # type: ignore[arg-type]
