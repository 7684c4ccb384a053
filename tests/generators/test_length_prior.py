"""Lengths by class, and the scale of latents, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from framework.data.token_file import TokenFile
from framework.data.token_statistics import TokenStatistics
from framework.generators.dit import DiT
from framework.generators.interface import TokenSpace
from framework.generators.latent_scale import LatentScale
from framework.generators.length_prior import EmpiricalLengthPrior, equal_lengths
from framework.tokens import Tokens
from tests.data.token_sets import N, header, written

SPACE = TokenSpace(N, 2, None, (2, 4, 6), 3)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
LENGTHS = torch.tensor([2, 2, 2, 6, 4, 6])


def file_of(folder: Path, lengths: torch.Tensor = LENGTHS, labels: torch.Tensor | None = LABELS) -> TokenFile:
    latents = torch.randn(len(lengths), N, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    made = header(dim=2, vocabulary=None, dtype="float32")
    return TokenFile(written(folder / "some.tokens", Tokens(latents, lengths), made, labels=labels))


def test_chances_are_smoothed_counts(tmp_path: Path) -> None:
    """(n_cl + kappa p(l)) / (n_c + kappa), with kappa 2 and p = 1/2, 1/6, 1/3; a class without images has p."""
    prior = EmpiricalLengthPrior(SPACE, strength=2.0)
    prior.learn_from(file_of(tmp_path))
    assert prior.counts.tolist() == [[3, 0, 1], [0, 1, 1], [0, 0, 0]]
    expected = [[4 / 6, 1 / 18, 5 / 18], [1 / 4, 1 / 3, 5 / 12], [1 / 2, 1 / 6, 1 / 3]]
    torch.testing.assert_close(prior.chances, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(prior.chances.sum(1), torch.ones(3, dtype=torch.float64))
    prior.learn_from(file_of(tmp_path))
    assert prior.counts.sum() == 6, "learning again counts anew"


def test_draws_follow_the_chances_and_depend_on_their_number_alone() -> None:
    prior = EmpiricalLengthPrior(SPACE, strength=1.0)
    prior.counts.copy_(torch.tensor([[30, 50, 20], [0, 1, 99], [5, 5, 5]]))
    ids = torch.arange(9000)
    drawn = prior.draw(ids % 3, 5, ids)
    for label in range(3):
        shares = torch.bincount(drawn[ids % 3 == label], minlength=7)[[2, 4, 6]] / 3000
        torch.testing.assert_close(shares.double(), prior.chances[label], atol=0.03, rtol=0)
    some = torch.tensor([77, 3, 4000])
    assert torch.equal(prior.draw(some % 3, 5, some), drawn[some])
    assert not torch.equal(prior.draw(ids % 3, 6, ids), drawn)


def test_lengths_that_nobody_has_told(tmp_path: Path) -> None:
    prior = EmpiricalLengthPrior(SPACE)
    with pytest.raises(ValueError, match="has seen no data"):
        prior.draw(LABELS, 0, LABELS)
    one = EmpiricalLengthPrior(TokenSpace(N, 2, None, (4,), 3))
    assert one.draw(LABELS, 0, LABELS).tolist() == [4] * 6
    with pytest.raises(ValueError, match="nearest is 2"):
        prior.learn_from(file_of(tmp_path, torch.tensor([2, 3, 2, 6, 4, 6])))
    with pytest.raises(ValueError, match="from 0 to 2"):
        prior.learn_from(file_of(tmp_path, labels=LABELS + 2))
    with pytest.raises(ValueError, match="no labels"):
        prior.learn_from(file_of(tmp_path, labels=None))


@pytest.mark.parametrize("num_tokens", [1, 9, 100])
def test_batches_of_equal_length(num_tokens: int) -> None:
    lengths = torch.tensor([4, 2, 4, 6, 2, 2, 4])
    seen = []
    for length, rows in equal_lengths(lengths, num_tokens):
        assert lengths[rows].eq(length).all()
        assert len(rows) == 1 or len(rows) * length <= num_tokens
        seen += rows.tolist()
    assert sorted(seen) == list(range(7))


# The scale of latents


def test_scale_of_positions_is_drawn_towards_all_of_them(tmp_path: Path) -> None:
    """Shrinkage adds rows that have the moments of all kept tokens of the channel."""
    file = file_of(tmp_path)
    assert file.statistics is not None
    scale = LatentScale(SPACE, shrinkage=4.0)
    scale.learn(file.statistics)
    tokens = file.tokens(range(6))
    every = tokens.latents[tokens.mask].double()
    for position in range(6):
        own = tokens.latents[tokens.mask[:, position], position].double()
        first = (own.sum(0) + 4 * every.mean(0)) / (len(own) + 4)
        second = (own.square().sum(0) + 4 * every.square().mean(0)) / (len(own) + 4)
        torch.testing.assert_close(scale.mean[position], first.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(scale.std[position], (second - first**2).sqrt().float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scale.denormalise(scale.normalise(tokens.latents)), tokens.latents)


def test_scale_of_many_rows_is_their_own() -> None:
    latents = torch.randn(5000, N, 2) * torch.linspace(3, 0.1, N)[:, None] + torch.arange(N)[:, None]
    scale = LatentScale(SPACE, shrinkage=0.0)
    assert torch.equal(scale.normalise(latents), latents), "before anything was learned"
    scale.learn(TokenStatistics.of(latents, torch.ones(5000, N, dtype=torch.bool)))
    normal = scale.normalise(latents)
    torch.testing.assert_close(normal.mean(0), torch.zeros(N, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal.std(0), torch.ones(N, 2), atol=1e-3, rtol=0)
    one = LatentScale(SPACE, shrinkage=1e12)
    one.learn(TokenStatistics.of(latents, torch.ones(5000, N, dtype=torch.bool)))
    torch.testing.assert_close(one.std[0], one.std[-1])


def test_a_generator_learns_both(tmp_path: Path) -> None:
    generator = DiT(None, 16, 1, 2, space=SPACE)
    generator.learn_from(file_of(tmp_path))
    assert int(generator.prior.counts.sum()) == 6 and (generator.scale.std != 1).all()
    tokens = Tokens(torch.zeros(6, N, 0), LENGTHS, torch.zeros(6, N).long())
    codes = written(tmp_path / "codes.tokens", tokens, header())
    with pytest.raises(ValueError, match="holds codes"):
        generator.learn_from(TokenFile(codes))
