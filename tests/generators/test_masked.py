"""Laws of MaskGIT over sequences of different lengths."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.generators.guidance import Guidance
from framework.generators.interface import TokenSpace
from framework.generators.length_prior import EmpiricalLengthPrior, equal_lengths
from framework.generators.masked import MaskGIT
from framework.generators.sampling import Sampling
from framework.nn.transformer import BlockOptions
from framework.tokens import Tokens
from tests.stir import stirred

SPACE = TokenSpace(14, 3, 40, (3, 6, 9, 12), 5)
LABELS, IDS = torch.arange(11) % 5, torch.arange(11) * 7 + 3


def generator_of(**more: Any) -> MaskGIT:
    torch.manual_seed(0)
    chosen = {"width": 32, "depth": 2, "num_heads": 4, "steps": 5, "input_dropout": 0.0, "space": SPACE} | more
    generator = stirred(MaskGIT(**chosen)).eval()
    counts = torch.arange(generator.prior.counts.numel()).view_as(generator.prior.counts)
    generator.prior.counts.copy_(counts * 7 % 11)
    return generator


def sequences(count: int = 12) -> tuple[Tokens, Tensor]:
    """Codes of all lengths, with labels."""
    lengths = torch.tensor(SPACE.budgets)[torch.arange(count) % 4]
    codes = torch.randint(40, (count, 14), generator=torch.Generator().manual_seed(0))
    return Tokens(torch.zeros(count, 14, 0), lengths, codes), torch.arange(count) % 5


class Watched:
    """Everything that the network was shown."""

    def __init__(self, generator: MaskGIT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[Tensor] = []
        states = generator.states

        def watched(codes: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
            self.codes.append(codes.clone())
            return states(codes, labels, lengths)

        monkeypatch.setattr(generator, "states", watched)

    def hidden(self, lengths: Tensor) -> Tensor:
        """Where codes were hidden in a training batch, whose sequences are shown in groups of equal length."""
        found = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.bool)
        groups = zip(self.codes, equal_lengths(lengths, found.numel()), strict=False)
        for codes, (length, rows) in groups:
            assert codes.shape == (len(rows), length), "none has padding"
            found[rows, :length] = codes == 40
        return found


# Training


def test_padding_changes_nothing_and_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of().train()
    watched = Watched(generator, monkeypatch)
    tokens, labels = sequences()
    assert tokens.codes is not None
    others = Tokens(tokens.latents, tokens.lengths, torch.where(tokens.mask, tokens.codes, 39)).truncate(12)
    results = []
    for each in (tokens, others):
        generator.zero_grad()
        loss = generator.loss(each, labels, torch.Generator().manual_seed(3))
        loss.losses["code"].backward()
        gradients = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
        results.append([loss.losses["code"], loss.count, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    hidden = watched.hidden(tokens.lengths)
    assert hidden.any(1).all()
    assert int(hidden.sum()) == int(results[0][1])


@pytest.mark.parametrize("blocks", [BlockOptions(rope_base=100.0), BlockOptions(registers=2)])
def test_alone_or_padded(blocks: BlockOptions) -> None:
    generator = generator_of(blocks=blocks)
    tokens, labels = sequences(4)
    assert tokens.codes is not None
    padded = generator(tokens.codes[:, :12], labels, tokens.lengths)
    for row, length in enumerate(tokens.lengths.tolist()):
        one = slice(row, row + 1)
        alone = generator(tokens.codes[one, :length], labels[one], tokens.lengths[one])
        torch.testing.assert_close(alone[0], padded[row, :length], rtol=1e-4, atol=1e-5)


def test_hidden_shares_are_arccosines_of_each_row_s_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of(width=4, depth=1, num_heads=1)
    watched = Watched(generator, monkeypatch)
    count = 8000
    lengths = torch.tensor([3, 12])[torch.arange(count) % 2]
    tokens = Tokens(torch.zeros(count, 12, 0), lengths, torch.zeros(count, 12).long())
    generator.loss(tokens, torch.zeros(count).long(), torch.Generator().manual_seed(0))
    hidden = watched.hidden(lengths)
    numbers = hidden.sum(1)
    for length in (3, 12):
        shares = torch.bincount(numbers[lengths == length], minlength=13)[: length + 1] * 2 / count
        # share <= x exactly where u >= cos(pi x / 2); a number m comes from shares within half a token of m.
        edges = [0.0] + [(m + 0.5) / length for m in range(1, length)] + [1.0]
        below = [1 - math.cos(math.pi * edge / 2) for edge in edges]
        expected = torch.tensor([0.0] + [b - a for a, b in zip(below, below[1:], strict=False)])
        torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    places = hidden[lengths == 12].float().mean(0)
    assert float(places.max() - places.min()) < 0.05


def test_the_loss_is_smoothed_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch with a mask over its padding, which groups of equal length do not have."""
    generator = generator_of()
    watched = Watched(generator, monkeypatch)
    tokens, labels = sequences()
    assert tokens.codes is not None
    loss = generator.loss(tokens, labels, torch.Generator().manual_seed(3))
    hidden = watched.hidden(tokens.lengths)
    shown = tokens.codes[:, :12].masked_fill(hidden, 40)
    logs = generator(shown, labels, tokens.lengths).log_softmax(-1)[hidden]
    own = logs.gather(1, tokens.codes[:, :12][hidden][:, None])[:, 0]
    torch.testing.assert_close(loss.losses["code"], -(0.9 * own + 0.1 * logs.mean(1)).mean())
    torch.testing.assert_close(loss.metrics["nll"], -own.mean())
    other = generator.loss(tokens, (labels + 1) % 5, torch.Generator().manual_seed(3)).losses["code"]
    assert not torch.equal(other, loss.losses["code"])


# Generation


@pytest.mark.parametrize("steps", [1, 4, 9, 30])
def test_each_row_reveals_as_many_as_it_is_long(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the network's eyes: what is hidden falls by at least one a step, along each row's own curve, to nothing."""
    generator = generator_of(steps=steps)
    watched = Watched(generator, monkeypatch)
    lengths = torch.tensor(SPACE.budgets)[torch.arange(11) % 4]
    codes = generator.decode(LABELS, lengths, 1, IDS, Guidance())
    assert (codes < 40).all() and not codes[torch.arange(12) >= lengths[:, None]].any()
    seen = [(each == 40).sum(1) for each in watched.codes] + [torch.zeros(11).long()]
    assert torch.equal(seen[0], lengths)
    for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False), 1):
        expected = [
            max(0, min(math.floor(math.acos(step / steps) * 2 / math.pi * length), had - 1))
            for length, had in zip(lengths.tolist(), before.tolist(), strict=True)
        ]
        assert after.tolist() == expected
    for before, after in zip(watched.codes, [*watched.codes[1:], codes], strict=True):
        assert torch.equal(after[before != 40], before[before != 40]), "what is revealed stays"
    assert len(watched.codes) == min(steps, 12)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(3.0), Guidance(3.0, (0.3, 1.0)), Guidance(4.0, schedule="linear")]
)
def test_samples_do_not_depend_on_their_batch(guidance: Guidance) -> None:
    generator = generator_of()
    every = generator.generate(LABELS, seed=1, sample_ids=IDS, guidance=guidance)
    assert every.codes is not None and len(set(every.lengths.tolist())) > 1
    chosen = torch.tensor([7, 3, 10])
    generator.batch_size = 1
    some = generator.generate(LABELS[chosen], seed=1, sample_ids=IDS[chosen], guidance=guidance)
    assert torch.equal(some.codes, every.codes[chosen]) and torch.equal(some.lengths, every.lengths[chosen])
    together = generator.decode(LABELS, every.lengths, 1, IDS, guidance)
    assert torch.equal(together, every.codes[:, : together.shape[1]]), "lengths may be mixed"
    for seed, ids in ((2, IDS), (1, IDS + 1)):
        others = generator.generate(LABELS, seed=seed, sample_ids=ids, guidance=guidance, lengths=every.lengths)
        assert (others.codes != every.codes).any(1).all()


def test_rows_without_class_are_computed_where_there_is_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of(steps=4)
    watched = Watched(generator, monkeypatch)
    given: dict[str, Any] = {"seed": 1, "sample_ids": IDS, "lengths": torch.full_like(LABELS, 12)}
    generator.generate(LABELS, guidance=Guidance(3.0, (0.25, 0.5)), **given)
    assert [len(codes) for codes in watched.codes] == [11, 22, 22, 11]


def test_without_noise_the_surest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of(noise=0.0, sampling=Sampling(temperature=0), steps=4)
    watched = Watched(generator, monkeypatch)
    lengths = torch.full_like(LABELS, 12)
    generator.decode(LABELS, lengths, 0, IDS, Guidance(2.0))
    first, second = watched.codes[0][:11], watched.codes[1][:11]
    nothing = torch.full_like(LABELS, 5)
    conditional, unconditional = (generator(first, labels, lengths) for labels in (LABELS, nothing))
    chances = (unconditional + 2 * (conditional - unconditional)).log_softmax(-1).amax(-1)
    revealed = second != 40
    assert (chances.masked_fill(~revealed, 9).amin(1) >= chances.masked_fill(revealed, -99).amax(1)).all()
    noisy = generator_of(noise=50.0, sampling=Sampling(temperature=0), steps=4)
    others = Watched(noisy, monkeypatch)
    noisy.decode(LABELS, lengths, 0, IDS, Guidance(2.0))
    assert not torch.equal(others.codes[1][:11] != 40, revealed)


def test_one_step_draws_from_the_softmax() -> None:
    generator = generator_of(steps=1, space=TokenSpace(3, 3, 6, (3,), 5), width=16)
    ids = torch.arange(4000)
    tokens = generator.generate(torch.zeros(4000).long(), seed=0, sample_ids=ids, guidance=Guidance())
    chances = generator(torch.full((1, 3), 6), torch.tensor([0]), torch.tensor([3])).softmax(-1)[0]
    assert tokens.codes is not None
    for position in range(3):
        shares = torch.bincount(tokens.codes[:, position], minlength=6) / 4000
        torch.testing.assert_close(shares, chances[position], atol=0.03, rtol=0)


def test_it_learns_sequences_by_heart() -> None:
    torch.manual_seed(0)
    space = TokenSpace(6, 3, 20, (2, 6), 4)
    generator = MaskGIT(32, 1, 2, steps=3, noise=0.0, space=space)
    labels = torch.arange(32) % 4
    lengths = torch.tensor([2, 6])[labels % 2]
    codes = torch.randint(20, (4, 6))[labels]
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    draws = torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        generator.loss(Tokens(torch.zeros(32, 6, 0), lengths, codes), labels, draws).losses["code"].backward()
        optimizer.step()
    generator.eval().sampling = Sampling(temperature=0)
    made = generator.generate(labels, seed=0, sample_ids=torch.arange(32), guidance=Guidance(1.5), lengths=lengths)
    assert made.codes is not None and torch.equal(made.codes, codes * made.mask)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"space": TokenSpace(10, 3, None, (10,), 5)}, "take a DiT"),
        ({"steps": 0}, "steps"),
        ({"noise": -1.0}, "noise"),
        ({"noise": math.nan}, "noise"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"length_prior": partial(EmpiricalLengthPrior, strength=0.0)}, "strength"),
        ({"blocks": BlockOptions(rope_base=100.0, registers=2)}, "either registers or rope_base"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        generator_of(**arguments)
    with pytest.raises(ValueError, match="have none"):
        generator_of().loss(Tokens(torch.zeros(2, 3, 3), torch.tensor([3, 3])), LABELS[:2], torch.Generator())
    with pytest.raises(ValueError, match="training mode"):
        generator_of().train().generate(LABELS, seed=0, sample_ids=IDS, guidance=Guidance())
