"""Laws of DiT: what is padded, grouped or skipped changes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.data.token_statistics import TokenStatistics
from framework.generators.diffusion_objectives import DDPM
from framework.generators.dit import SIZES, DiT
from framework.generators.guidance import Guidance
from framework.generators.interface import TokenSpace
from framework.generators.length_prior import EmpiricalLengthPrior
from framework.generators.samplers import DDIM, Ancestral, Euler, Heun, Sampler
from framework.tokens import Tokens
from tests.stir import stirred

SPACE = TokenSpace(10, 3, None, (2, 4, 5, 8), 5)
LABELS, IDS = torch.arange(11) % 5, torch.arange(11) * 7 + 3
SAMPLERS: list[Sampler] = [Euler(6), Heun(4), DDIM(6, eta=0.5), Ancestral(6)]


def generator_of(space: TokenSpace = SPACE, **more: Any) -> DiT:
    torch.manual_seed(0)
    chosen = {"size": None, "width": 32, "depth": 2, "num_heads": 4} | more
    if isinstance(chosen.get("sampler"), (DDIM, Ancestral)):
        chosen.setdefault("objective", DDPM(100, learned_range=True))
    generator = stirred(DiT(space=space, **chosen)).eval()
    counts = torch.arange(generator.prior.counts.numel()).view_as(generator.prior.counts)
    generator.prior.counts.copy_(counts * 7 % 11)
    statistics = TokenStatistics.of(torch.randn(50, 10, 3) * 3 + 1, torch.ones(50, 10, dtype=torch.bool))
    generator.scale.learn(statistics)
    return generator


def sequences(count: int = 12) -> tuple[Tokens, Tensor]:
    """Latents of all lengths, with labels; what is behind a length is no number."""
    latents = torch.randn(count, 10, 3, generator=torch.Generator().manual_seed(1))
    tokens = Tokens(latents, torch.tensor(SPACE.budgets)[torch.arange(count) % 4])
    return Tokens(latents.masked_fill(~tokens.mask[..., None], 1e4), tokens.lengths), torch.arange(count) % 5


def gradients(generator: DiT, tokens: Tokens, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator.zero_grad()
    loss = generator.loss(tokens, labels, torch.Generator().manual_seed(3))
    torch.stack(list(loss.losses.values())).sum().backward()
    assert int(loss.count) == int(tokens.lengths.sum())
    assert loss.by_position is not None and loss.by_position.shape == (8,)
    torch.testing.assert_close(loss.by_position.sum() / loss.count, next(iter(loss.losses.values())).detach())
    named = {name: each.grad for name, each in generator.named_parameters() if each.grad is not None}
    return loss.losses, {name: gradient.clone() for name, gradient in named.items()}


def assert_close(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5, msg=name)


# Training


@pytest.mark.parametrize("objective", [None, DDPM(100), DDPM(100, learned_range=True)])
@pytest.mark.parametrize("positions", [["learned"], ["rope1d"], ["learned", "rope1d"]])
def test_groups_of_equal_length_are_key_padding(objective: DDPM | None, positions: list[str]) -> None:
    tokens, labels = sequences()
    both = [generator_of(objective=objective, positions=positions, mixed_lengths=mixed).train()
            for mixed in ("groups", "key_padding")]  # fmt: skip
    for ours, others in zip(*(gradients(generator, tokens, labels) for generator in both), strict=True):
        assert_close(ours, others)


@pytest.mark.parametrize("mixed_lengths", ["groups", "key_padding"])
def test_padding_changes_nothing(mixed_lengths: str) -> None:
    generator = generator_of(mixed_lengths=mixed_lengths).train()
    tokens, labels = sequences()
    others = Tokens(tokens.latents.masked_fill(~tokens.mask[..., None], -7.0)[:, :8], tokens.lengths)
    for ours, theirs in zip(gradients(generator, tokens, labels), gradients(generator, others, labels), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_forward_does_not_see_padding() -> None:
    generator = generator_of()
    tokens, labels = sequences(4)
    x, times = tokens.latents, torch.tensor([10.0, 300.0, 600.0, 900.0])
    padded = generator(x[:, :8], times, labels, tokens.lengths, tokens.mask[:, :8])
    for row, length in enumerate(tokens.lengths.tolist()):
        one = slice(row, row + 1)
        alone = generator(x[one, :length], times[one], labels[one], tokens.lengths[one])
        torch.testing.assert_close(alone[0], padded[row, :length], rtol=1e-4, atol=1e-5)


def test_length_is_a_condition() -> None:
    generator = generator_of()
    x, time, label = torch.randn(1, 4, 3), torch.tensor([500.0]), torch.tensor([2])
    first, second = (generator(x, time, label, torch.tensor([length])) for length in (4, 5))
    assert (first - second).abs().max() > 1e-3
    new = DiT(None, 32, 2, 4, space=SPACE)
    assert new.length_embedding is not None and not new.length_embedding.any()
    assert DiT(None, 32, 2, 4, space=TokenSpace(10, 3, None, (10,), 5)).length_embedding is None


def test_labels_are_dropped_in_training_only() -> None:
    generator = generator_of(label_dropout=1.0)
    tokens, labels = sequences()
    others = (labels + 1) % 5

    def loss(given: Tensor) -> Tensor:
        return generator.loss(tokens, given, torch.Generator().manual_seed(0)).losses["velocity"]

    assert not torch.equal(loss(labels), loss(others))
    generator.train()
    assert torch.equal(loss(labels), loss(others))


def test_it_learns_where_tokens_are() -> None:
    """Of tokens that class and position determine, samples come near them, at each length."""
    torch.manual_seed(0)
    space = TokenSpace(4, 2, None, (2, 4), 2)
    generator = DiT(None, 32, 1, 2, sampler=Heun(8), space=space)
    places = torch.tensor([[3.0, -2.0], [-5.0, 4.0]])[:, None] + torch.arange(4.0)[:, None]
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    labels, lengths = torch.arange(32) % 2, torch.tensor([2, 4])[torch.arange(32) // 2 % 2]
    tokens = Tokens(places[labels] + 0.1 * torch.randn(32, 4, 2), lengths)
    generator.scale.learn(TokenStatistics.of(tokens.latents, tokens.mask))
    draws = torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        generator.loss(tokens, labels, draws).losses["velocity"].backward()
        optimizer.step()
    made = generator.eval().generate(labels, seed=0, sample_ids=torch.arange(32), guidance=Guidance(), lengths=lengths)
    distance = (made.latents - places[labels]).masked_fill(~made.mask[..., None], 0).abs()
    assert float(distance.sum() / (2 * made.mask.sum())) < 0.5


# Generation


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_samples_do_not_depend_on_their_batch(sampler: Sampler) -> None:
    guidance = Guidance(2.0, (0.3, 1.0))
    generator = generator_of(sampler=sampler)
    every = generator.generate(LABELS, seed=1, sample_ids=IDS, guidance=guidance)
    assert len(set(every.lengths.tolist())) > 1 and every.latents.shape == (11, 8, 3)
    assert not every.latents[~every.mask].any() and every.latents[every.mask].all()
    chosen = torch.tensor([7, 3, 10])
    generator.batch_size = 1
    some = generator.generate(LABELS[chosen], seed=1, sample_ids=IDS[chosen], guidance=guidance)
    assert torch.equal(some.lengths, every.lengths[chosen])
    torch.testing.assert_close(some.latents, every.latents[chosen], rtol=1e-4, atol=1e-4)
    for seed, ids in ((2, IDS), (1, IDS + 1)):
        others = generator.generate(LABELS, seed=seed, sample_ids=ids, guidance=guidance, lengths=every.lengths)
        assert ((others.latents - every.latents).abs().amax((1, 2)) > 1e-3).all()


class Counted(nn.Module):
    """Counts rows that the network computes."""

    def __init__(self, generator: DiT) -> None:
        super().__init__()
        self.rows: list[int] = []
        generator.transformer.register_forward_hook(lambda module, given, result: self.rows.append(len(given[0])))


def test_outside_the_interval_no_row_without_class_is_computed() -> None:
    """And where there is guidance, it is that of all rows computed always, with a scale of 1 outside."""
    generator = generator_of(sampler=Euler(10))
    counted = Counted(generator)
    given: dict[str, Any] = {"seed": 1, "sample_ids": IDS, "lengths": torch.full_like(LABELS, 5)}
    inside = generator.generate(LABELS, guidance=Guidance(3.0, (0.25, 0.75)), **given)
    assert counted.rows == [11, 11, 11, 22, 22, 22, 22, 22, 11, 11]

    class Always(Guidance):
        def scale_at(self, progress: float) -> float:
            return 3.0 if 0.25 <= progress <= 0.75 else 1 + 1e-12

    counted.rows.clear()
    always = generator.generate(LABELS, guidance=Always(), **given)
    assert counted.rows == [22] * 10
    torch.testing.assert_close(inside.latents, always.latents, rtol=1e-4, atol=1e-4)
    without = generator.generate(LABELS, guidance=Guidance(), **given)
    assert (without.latents - inside.latents).abs().max() > 1e-2


def test_bfloat16_is_near_float32() -> None:
    """As autocast, with and without a mask, and as weights."""
    generator = generator_of(mixed_lengths="key_padding")
    tokens, labels = sequences()
    given: dict[str, Any] = {"seed": 1, "sample_ids": IDS, "guidance": Guidance(2.0)}
    loss, made = generator.loss(tokens, labels, torch.Generator().manual_seed(0)), generator.generate(LABELS, **given)
    with torch.autocast("cpu", torch.bfloat16):
        other = generator.loss(tokens, labels, torch.Generator().manual_seed(0))
        near = generator.generate(LABELS, **given)
    torch.testing.assert_close(other.losses["velocity"], loss.losses["velocity"], rtol=0.02, atol=0)
    nearer = generator.bfloat16().generate(LABELS, **given)
    for each in (near, nearer):
        assert each.latents.dtype == torch.float32
        assert 1e-6 < float((each.latents - made.latents).abs().mean() / made.latents.abs().mean()) < 0.05


def test_all_channels_are_guided_unless_fewer_are_asked_for() -> None:
    generator = generator_of()
    x, time = torch.randn(2, 4, 3), torch.tensor([0.3])
    labels, lengths = torch.tensor([1, 2]), torch.tensor([4, 4])
    plain, full = (generator._predict(labels, lengths, Guidance(s), x, time, 0.3) for s in (1.0, 3.0))
    assert (plain - full).abs().amin((0, 1)).min() > 0
    generator.guided_channels = 1
    first = generator._predict(labels, lengths, Guidance(3.0), x, time, 0.3)
    torch.testing.assert_close(first[..., :1], full[..., :1])
    torch.testing.assert_close(first[..., 1:], plain[..., 1:], rtol=1e-4, atol=1e-5)


def test_sizes_are_dit_s() -> None:
    """Millions of parameters of the paper's table 4, here with 16 channels a token and 256 positions, all trained."""
    for size, millions in (("S", 33), ("B", 130), ("L", 458), ("XL", 675)):
        with torch.device("meta"):
            generator = DiT(size, space=TokenSpace(256, 16, None, (256,), 1000))  # type: ignore[arg-type]
        assert sum(each.numel() for each in generator.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert list(SIZES) == ["S", "B", "L", "XL"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"space": TokenSpace(10, 3, 7, (10,), 5)}, "take LlamaGenAR"),
        ({"sampler": Euler(), "objective": DDPM()}, "Euler samples what Velocity has trained"),
        ({"sampler": DDIM(), "objective": None}, "DDIM samples what DDPM has trained"),
        ({"guided_channels": 4}, "guided_channels are from 1 to 3"),
        ({"width": 30}, "multiple of num_heads"),
        ({"size": None, "width": None}, "needs width"),
        ({"length_prior": partial(EmpiricalLengthPrior, strength=0.0)}, "strength"),
        ({"shrinkage": -1.0}, "shrinkage"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        generator_of(**arguments)


def test_requests_that_do_not_fit() -> None:
    generator = generator_of()
    given: dict[str, Any] = {"seed": 1, "sample_ids": IDS, "guidance": Guidance()}
    with pytest.raises(ValueError, match="from 0 to 4"):
        generator.generate(LABELS + 1, **given)
    with pytest.raises(ValueError, match="nearest is 2"):
        generator.generate(LABELS, **given, lengths=torch.full_like(LABELS, 3))
    with pytest.raises(ValueError, match="count from 0"):
        generator.generate(LABELS, **given | {"sample_ids": IDS - 4})
    with pytest.raises(ValueError, match="one length for each"):
        generator.generate(LABELS, **given, lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="training mode"):
        generator.train().generate(LABELS, **given)
    assert len(generator.eval().generate(LABELS[:0], **given | {"sample_ids": IDS[:0]})) == 0
