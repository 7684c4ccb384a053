"""Lengths by class, and the scale of latents, by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from framework.data.token_file import TokenFile
from framework.data.token_statistics import TokenStatistics
from framework.generators.dit import DiT
from framework.generators.guidance import Guidance
from framework.generators.interface import TokenSpace
from framework.generators.latent_scale import LatentScale
from framework.generators.length_prior import EmpiricalLengthPrior, LengthPrior, PredictedLength, equal_lengths
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
    prior = EmpiricalLengthPrior(2.0, space=SPACE)
    prior.learn_from(file_of(tmp_path))
    assert prior.counts.tolist() == [[3, 0, 1], [0, 1, 1], [0, 0, 0]]
    expected = [[4 / 6, 1 / 18, 5 / 18], [1 / 4, 1 / 3, 5 / 12], [1 / 2, 1 / 6, 1 / 3]]
    torch.testing.assert_close(prior.chances, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(prior.chances.sum(1), torch.ones(3, dtype=torch.float64))
    prior.learn_from(file_of(tmp_path))
    assert prior.counts.sum() == 6, "learning again counts anew"


def test_draws_follow_the_chances_and_depend_on_their_number_alone() -> None:
    prior = EmpiricalLengthPrior(1.0, space=SPACE)
    prior.counts.copy_(torch.tensor([[30, 50, 20], [0, 1, 99], [5, 5, 5]]))
    ids = torch.arange(9000)
    drawn = prior.draw(ids % 3, 5, ids)
    for label in range(3):
        shares = torch.bincount(drawn[ids % 3 == label], minlength=7)[[2, 4, 6]] / 3000
        torch.testing.assert_close(shares.double(), prior.chances[label], atol=0.03, rtol=0)
    some = torch.tensor([77, 3, 4000])
    assert torch.equal(prior.draw(some % 3, 5, some), drawn[some])
    assert not torch.equal(prior.draw(ids % 3, 6, ids), drawn)


def test_lengths_that_nobody_has_told() -> None:
    prior = EmpiricalLengthPrior(space=SPACE)
    with pytest.raises(ValueError, match="has seen no data"):
        prior.draw(LABELS, 0, LABELS)
    one = EmpiricalLengthPrior(space=TokenSpace(N, 2, None, (4,), 3))
    assert one.draw(LABELS, 0, LABELS).tolist() == [4] * 6


@pytest.mark.parametrize("kind", [EmpiricalLengthPrior, PredictedLength])
def test_files_of_other_lengths_and_classes(kind: type[LengthPrior], tmp_path: Path) -> None:
    prior = kind(space=SPACE)
    with pytest.raises(ValueError, match="nearest is 2"):
        prior.learn_from(file_of(tmp_path, torch.tensor([2, 3, 2, 6, 4, 6])))
    with pytest.raises(ValueError, match="from 0 to 2"):
        prior.learn_from(file_of(tmp_path, labels=LABELS + 2))
    with pytest.raises(ValueError, match="no labels"):
        prior.learn_from(file_of(tmp_path, labels=None))
    with pytest.raises(ValueError, match="strength|width"):
        kind(0, space=SPACE)


def trained(prior: PredictedLength, labels: torch.Tensor, lengths: torch.Tensor) -> PredictedLength:
    optimizer = torch.optim.Adam(prior.parameters(), 0.03)
    for _ in range(300):
        optimizer.zero_grad()
        (prior.losses(labels, lengths)["budget"] / len(labels)).backward()
        optimizer.step()
    return prior


def test_predicted_lengths_are_uniform_first_and_then_the_shares_of_the_data() -> None:
    torch.manual_seed(0)
    prior = PredictedLength(space=SPACE)
    torch.testing.assert_close(prior.chances, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    loss = prior.losses(LABELS, LENGTHS)["budget"]
    torch.testing.assert_close(loss, 6 * torch.tensor(3.0).log())
    labels = torch.cat([LABELS, torch.tensor([2, 2, 2, 2, 2])])
    trained(prior, labels, torch.cat([LENGTHS, torch.tensor([2, 4, 4, 6, 6])]))
    expected = [[3 / 4, 0, 1 / 4], [0, 1 / 2, 1 / 2], [1 / 5, 2 / 5, 2 / 5]]
    torch.testing.assert_close(prior.chances, torch.tensor(expected, dtype=torch.float64), atol=0.02, rtol=0)
    ids = torch.arange(9000)
    shares = torch.bincount(prior.draw(ids * 0, 5, ids), minlength=7)[[2, 4, 6]] / 9000
    torch.testing.assert_close(shares.double(), prior.chances[0], atol=0.02, rtol=0)


def test_predicted_lengths_share_what_a_count_does_not() -> None:
    """Two kinds of classes, and forty images of each: classes of a kind tell of each other."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 8, generator=generator).mul(1.5).double().softmax(1)
    true, labels = kinds[torch.arange(60) % 2], torch.arange(60).repeat_interleave(40)
    space = TokenSpace(8, 2, None, tuple(range(1, 9)), 60)
    places = torch.multinomial(true[labels], 1, generator=generator)[:, 0]
    counted = EmpiricalLengthPrior(20.0, space=space)  # the best of 2, 5, 20 and 50
    counted.counts.copy_(torch.bincount(labels * 8 + places, minlength=480).view(60, 8))
    torch.manual_seed(0)
    predicted = trained(PredictedLength(1, space=space), labels, 1 + places)

    @torch.no_grad()
    def divergence(prior: LengthPrior) -> float:
        return float((true * (true / prior.chances).log()).sum(1).mean())

    assert divergence(predicted) < 0.5 * divergence(counted)


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


def test_a_generator_trains_what_predicts_lengths() -> None:
    """From every sequence, those whose class is dropped for guidance among them."""
    torch.manual_seed(0)
    prior = partial(PredictedLength, width=4)
    generator = DiT(None, 16, 1, 2, label_dropout=1.0, length_prior=prior, space=SPACE).train()
    tokens = Tokens(torch.randn(6, N, 2), LENGTHS)
    found = generator.loss(tokens, LABELS, torch.Generator().manual_seed(0))
    expected = generator.prior.losses(LABELS, LENGTHS)["budget"] / LENGTHS.sum()
    assert set(found.losses) == {"velocity", "budget"} and torch.equal(found.losses["budget"], expected)
    sum(found.losses.values(), torch.zeros(())).backward()
    assert isinstance(generator.prior, PredictedLength)
    gradient = generator.prior.head.bias.grad
    assert gradient is not None and gradient.abs().sum() > 0
    with torch.no_grad():
        generator.prior.head.bias.copy_(torch.tensor([-50.0, 50.0, -50.0]))
    made = generator.eval().generate(LABELS, seed=0, sample_ids=torch.arange(6), guidance=Guidance(2.0))
    assert made.lengths.tolist() == [4] * 6


def test_the_scale_stays_exact_where_a_generator_becomes_bfloat16() -> None:
    generator = DiT(None, 16, 1, 2, space=SPACE)
    generator.scale.mean.fill_(10.03)
    generator.bfloat16()
    assert generator.head.weight.dtype == torch.bfloat16 and generator.scale.mean.dtype == torch.float32
    torch.testing.assert_close(generator.scale.mean, torch.full((6, 2), 10.03), rtol=1e-7, atol=0)
    assert generator.to("meta").scale.mean.device.type == "meta"
    assert set(generator.scale.state_dict()) == {"mean", "std"}


def test_a_generator_learns_both(tmp_path: Path) -> None:
    generator = DiT(None, 16, 1, 2, space=SPACE)
    generator.learn_from(file_of(tmp_path))
    assert int(generator.prior.counts.sum()) == 6 and (generator.scale.std != 1).all()
    tokens = Tokens(torch.zeros(6, N, 0), LENGTHS, torch.zeros(6, N).long())
    codes = written(tmp_path / "codes.tokens", tokens, header())
    with pytest.raises(ValueError, match="holds codes"):
        generator.learn_from(TokenFile(codes))
