"""Laws of autoregression over latents, and of the head that draws them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from framework.data.token_statistics import TokenStatistics
from framework.generators.continuous_ar import ContinuousAR
from framework.generators.diffusion_head import DiffusionHead
from framework.generators.diffusion_objectives import DDPM
from framework.generators.guidance import Guidance
from framework.generators.interface import TokenSpace
from framework.generators.samplers import DDIM, Ancestral, Euler, Heun
from framework.runtime.hashing import hashed, purpose_key
from framework.tokens import Tokens
from tests.stir import stirred

SPACE = TokenSpace(10, 3, None, (2, 4, 5, 8), 5)
LABELS, IDS = torch.arange(11) % 5, torch.arange(11) * 7 + 3
GUIDANCES = [
    Guidance(),
    Guidance(3.0),
    Guidance(3.0, (0.0, 0.3)),
    Guidance(3.0, (0.3, 0.7)),
    Guidance(4.0, (0.2, 1.0), "linear"),
]


def generator_of(space: TokenSpace = SPACE, **more: Any) -> ContinuousAR:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"size": None, "width": 32, "depth": 2, "num_heads": 4, "head_width": 16, "head_depth": 2}
    generator = stirred(ContinuousAR(space=space, **chosen | {"sampler": Euler(4)} | more)).eval()
    generator.prior.counts.copy_(torch.arange(20).view(5, 4) * 7 % 11)
    generator.scale.learn(TokenStatistics.of(torch.randn(50, 10, 3) * 3 + 1, torch.ones(50, 10, dtype=torch.bool)))
    return generator


def sequences(count: int = 12) -> tuple[Tokens, Tensor]:
    """Latents of all lengths, with labels; what is behind a length is no number."""
    latents = torch.randn(count, 10, 3, generator=torch.Generator().manual_seed(1))
    tokens = Tokens(latents, torch.tensor(SPACE.budgets)[torch.arange(count) % 4])
    return Tokens(latents.masked_fill(~tokens.mask[..., None], torch.nan), tokens.lengths), torch.arange(count) % 5


@pytest.mark.parametrize("guidance", GUIDANCES)
@torch.no_grad()
def test_decoding_is_teacher_forcing(guidance: Guidance) -> None:
    """Every token is what the head makes of states that are computed at once from all tokens before it."""
    generator = generator_of()
    tokens = generator.generate(LABELS, seed=1, sample_ids=IDS, guidance=guidance)
    assert len(set(tokens.lengths.tolist())) > 1
    latents = generator.scale.normalise(tokens.latents)
    nothing = torch.full_like(LABELS, 5)
    conditional, unconditional = (generator.states(latents, labels, tokens.lengths) for labels in (LABELS, nothing))
    keys = hashed(purpose_key(1, "noise"), IDS)
    for place in range(8):
        rows = tokens.lengths > place
        scale = guidance.scale_at(place / 8)
        without = None if scale == 1 else unconditional[rows, place]
        own = hashed(keys[rows], torch.full_like(keys[rows], place))
        expected = generator.head.sample(conditional[rows, place], own, without, scale)
        torch.testing.assert_close(latents[rows, place], expected, rtol=1e-4, atol=1e-4)


def test_rows_without_class_are_computed_where_there_is_guidance() -> None:
    generator = generator_of()
    seen: list[tuple[int, int]] = []
    generator.transformer.register_forward_hook(lambda module, given, result: seen.append(tuple(given[0].shape[:2])))
    given: dict[str, Any] = {"seed": 1, "sample_ids": IDS, "lengths": torch.full_like(LABELS, 8)}
    generator.generate(LABELS, guidance=Guidance(3.0, (0.25, 0.5)), **given)
    assert seen == [(11, 1), (11, 1), (11, 1), (11, 3), (22, 1), (22, 1), (11, 1), (11, 1), (11, 1)]


@pytest.mark.parametrize("sampler", [Heun(2), DDIM(3), Ancestral(3)])
def test_samples_do_not_depend_on_their_batch(sampler: Any) -> None:
    objective = None if isinstance(sampler, Heun) else DDPM(100, learned_range=True)
    generator = generator_of(sampler=sampler, objective=objective)
    every = generator.generate(LABELS, seed=1, sample_ids=IDS, guidance=Guidance(2.0))
    assert not every.latents[~every.mask].any() and every.latents[every.mask].all()
    chosen = torch.tensor([7, 3, 10])
    generator.batch_size = 1
    some = generator.generate(LABELS[chosen], seed=1, sample_ids=IDS[chosen], guidance=Guidance(2.0))
    assert torch.equal(some.lengths, every.lengths[chosen])
    torch.testing.assert_close(some.latents, every.latents[chosen], rtol=1e-4, atol=1e-4)
    for seed, ids in ((2, IDS), (1, IDS + 1)):
        others = generator.generate(LABELS, seed=seed, sample_ids=ids, guidance=Guidance(2.0), lengths=every.lengths)
        assert ((others.latents - every.latents).abs().amax((1, 2)) > 1e-3).all()


def test_padding_changes_nothing() -> None:
    generator = generator_of().train()
    tokens, labels = sequences()
    results = []
    for each in (tokens, Tokens(tokens.latents.nan_to_num(-7.0)[:, :8], tokens.lengths)):
        generator.zero_grad()
        loss = generator.loss(each, labels, torch.Generator().manual_seed(3))
        loss.losses["velocity"].backward()
        assert loss.by_position is not None and int(loss.count) == int(tokens.lengths.sum())
        torch.testing.assert_close(loss.by_position.sum() / loss.count, loss.losses["velocity"].detach())
        gradients = [parameter.grad for parameter in generator.parameters() if parameter.grad is not None]
        results.append([loss.losses["velocity"], *(gradient.clone() for gradient in gradients)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(bool(each.isfinite().all()) for each in results[0])


def test_a_head_learns_distributions_of_its_states() -> None:
    """Two states, two normal distributions, one of them with correlated channels."""
    torch.manual_seed(0)
    head = DiffusionHead(2, 3, width=32, depth=2, sampler=Heun(10), draws=1)
    states, draws = torch.eye(3)[:2][torch.arange(256) % 2], torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=6e-3)
    for _ in range(150):
        noise = torch.randn(256, 2, generator=draws)
        second = torch.stack([noise[:, 0], 0.9 * noise[:, 0] + 0.44 * noise[:, 1]], dim=1) - 1
        clean = torch.where(states[:, :1] > 0, 0.3 * noise + 2, second)
        optimizer.zero_grad()
        head.losses(states, clean, draws)["velocity"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        made = head.sample(states.repeat(8, 1), torch.arange(2048))
    first, second = made[::2], made[1::2]
    torch.testing.assert_close(first.mean(0), torch.tensor([2.0, 2.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(first.std(0), torch.tensor([0.3, 0.3]), atol=0.12, rtol=0)
    torch.testing.assert_close(second.mean(0), torch.tensor([-1.0, -1.0]), atol=0.2, rtol=0)
    assert float(torch.corrcoef(second.T)[0, 1]) == pytest.approx(0.9, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"space": TokenSpace(10, 3, 7, (10,), 5)}, "take LlamaGenAR"),
        ({"sampler": DDIM()}, "DDIM samples what DDPM has trained"),
        ({"draws": 0}, "draws of 1 or more"),
        ({"batch_size": 0}, "batch_size"),
        ({"width": None}, "needs width"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        generator_of(**arguments)
    with pytest.raises(ValueError, match="training mode"):
        generator_of().train().generate(LABELS, seed=0, sample_ids=IDS, guidance=Guidance())
