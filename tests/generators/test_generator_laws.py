"""What every registered generator promises."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import framework.components  # noqa: F401 - registers them
from framework.data.token_file import TokenFile
from framework.generators.guidance import Guidance
from framework.generators.interface import GENERATORS, Generator, TokenSpace
from framework.tokens import Tokens
from tests.data.token_sets import N, header, written
from tests.stir import stirred

SMALL = {"size": None, "width": 32, "depth": 2, "num_heads": 4, "head_width": 16, "steps": 4}
BUDGETS = (2, 3, 6)
NAMES = [name for name, _ in GENERATORS]
LABELS, IDS = torch.arange(9) % 3, torch.arange(9) * 5 + 2


def generator_of(name: str, folder: Path) -> tuple[Generator, Tokens, Tensor]:
    """With sequences of every length, of the kind that it makes, which it has learned from."""
    generator, made = GENERATORS.get(name), None
    small = {key: value for key, value in SMALL.items() if key in inspect.signature(generator).parameters}
    torch.manual_seed(0)
    for vocabulary in (30, None):
        try:
            made = generator(space=TokenSpace(N, 3, vocabulary, BUDGETS, 3), **small)
            break
        except ValueError:
            continue  # of one kind only
    assert isinstance(made, Generator)
    lengths, labels = torch.tensor(BUDGETS)[torch.arange(12) % 3], torch.arange(12) // 3 % 3
    latents, codes = torch.randn(12, N, 3) + 1, torch.randint(30, (12, N))
    if made.space.vocabulary is None:
        tokens, told = Tokens(latents, lengths), {"vocabulary": None, "dtype": "float32"}
    else:
        tokens, told = Tokens(latents[..., :0], lengths, codes), {"vocabulary": 30}
    made.learn_from(TokenFile(written(folder / "some.tokens", tokens, header(**told), labels=labels)))
    return stirred(made).eval(), tokens, labels


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_a_function_of_its_number_and_class(name: str, tmp_path: Path) -> None:
    generator, _, _ = generator_of(name, tmp_path)

    def made(rows: Tensor, **more: Any) -> Tokens:
        given = {"seed": 1, "sample_ids": IDS[rows], "guidance": Guidance(2.0, (0.2, 1.0))} | more
        return generator.generate(LABELS[rows], **given)

    every, some = made(torch.arange(9)), torch.tensor([7, 2, 5])
    assert every.latents.shape[:2] == (9, 6) and set(every.lengths.tolist()) <= set(BUDGETS)
    few = made(some)
    assert torch.equal(few.lengths, every.lengths[some])
    assert (few.codes is None) == (generator.space.vocabulary is None) == (every.codes is None)
    if few.codes is not None and every.codes is not None:
        assert torch.equal(few.codes, every.codes[some])
    torch.testing.assert_close(few.latents, every.latents[some], rtol=1e-4, atol=1e-4)
    wanted = torch.tensor(BUDGETS)[torch.arange(9) % 3]
    for other in ({"seed": 2}, {"sample_ids": IDS + 1}):
        one, two = made(torch.arange(9), lengths=wanted), made(torch.arange(9), lengths=wanted, **other)
        assert torch.equal(one.lengths, wanted) and torch.equal(two.lengths, wanted)
        values = [each.latents if each.codes is None else each.codes for each in (one, two)]
        assert not torch.equal(*values) and not values[0][~one.mask[:, :6]].any()
    with pytest.raises(ValueError, match="nearest is 3"):
        made(torch.arange(9), lengths=torch.full((9,), 4))
    with pytest.raises(ValueError, match="from 0 to 2"):
        generator.generate(LABELS + 1, seed=0, sample_ids=IDS, guidance=Guidance())
    with pytest.raises(ValueError, match="training mode"):
        generator.train().generate(LABELS, seed=0, sample_ids=IDS, guidance=Guidance())


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_a_mean_over_its_count_and_does_not_see_padding(name: str, tmp_path: Path) -> None:
    """A batch of sequences, and the same with other and with more padding."""
    generator, tokens, labels = generator_of(name, tmp_path)
    rows = torch.arange(12)[tokens.lengths <= 3]
    tokens, labels = tokens.select(rows), labels[rows]
    behind = ~tokens.mask
    other = Tokens(
        tokens.latents.masked_fill(behind[..., None], 1e6),
        tokens.lengths,
        None if tokens.codes is None else tokens.codes.masked_fill(behind, 29),
    )
    batches = tokens, other, tokens.truncate(3)
    seen = [generator.loss(each, labels, torch.Generator().manual_seed(0)) for each in batches]
    for loss in seen:
        assert 0 < int(loss.count) <= int(tokens.lengths.sum())
        assert loss.losses.keys() == seen[0].losses.keys()
        for key, value in loss.losses.items():
            assert bool(value.isfinite()) and torch.equal(value, seen[0].losses[key])
