from __future__ import annotations

import torch

from framework.runtime.rng import Generators, global_state, set_global_state, stable_seed


def draw(generators: Generators, purpose: str, count: int = 4) -> list[float]:
    return torch.rand(count, generator=generators(purpose)).tolist()


def test_seeds_are_the_same_for_ever_and_differ_by_every_part() -> None:
    assert stable_seed(0, "lengths", 0) == 7055144752005895584
    seeds = {stable_seed(seed, purpose, rank) for seed in range(5) for purpose in "abc" for rank in range(5)}
    assert len(seeds) == 75 and max(seeds) < 2**63


def test_purposes_ranks_and_seeds_draw_different_numbers_and_do_not_disturb_each_other() -> None:
    alone = draw(Generators(1), "lengths")
    mixed = Generators(1)
    draw(mixed, "noise", 100)
    assert draw(mixed, "lengths") == alone
    others = [(Generators(1), "noise"), (Generators(2), "lengths"), (Generators(1, rank=1), "lengths")]
    assert alone not in [draw(generators, purpose) for generators, purpose in others]


def test_state_goes_on_exactly() -> None:
    first = Generators(1)
    draw(first, "lengths")
    state = first.state_dict()
    expected = draw(first, "lengths"), draw(first, "new")
    second = Generators(1)
    draw(second, "new")
    second.load_state_dict(state)
    assert (draw(second, "lengths"), draw(second, "new")) == expected


def test_torchs_own_generator_is_seeded_and_goes_on_exactly() -> None:
    firsts = []
    for generators in (Generators(1), Generators(1), Generators(2), Generators(1, rank=1)):
        generators.seed_global()
        firsts.append(torch.rand(1).item())
    assert firsts[0] == firsts[1] and len(set(firsts)) == 3
    state = global_state()
    expected = torch.rand(3)
    set_global_state(state)
    assert torch.equal(torch.rand(3), expected)
