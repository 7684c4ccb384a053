from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor

from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.objectives import OBJECTIVES, DeterministicGroupGRPO, PolicyObjective, Reinforce, RewardsAt

NUM_TOKENS = 8
BUDGETS = torch.arange(1, NUM_TOKENS + 1)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(images: int = 6) -> tuple[Tensor, Tensor]:
    """Logits and rewards (b, 8) float64."""
    both = torch.randn(2, images, NUM_TOKENS, generator=seeded(), dtype=torch.float64)
    return both[0].requires_grad_(), both[1]


def at(rewards: Tensor) -> RewardsAt:
    """Rewards that are looked up in a table (b, g)."""
    return lambda chosen: rewards.gather(1, chosen)


def gradient(
    objective: PolicyObjective, logits: Tensor, rewards: Tensor, generator: torch.Generator, old: Tensor | None = None
) -> Tensor:
    output = objective.loss(logits, at(rewards), BUDGETS, 0.0, generator, old)
    return torch.autograd.grad(torch.stack(list(output.losses.values())).sum(), logits)[0]


def exact_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """Of the batch's mean expected reward, by the policy-gradient theorem, one term per budget."""
    probs = logits.detach().softmax(dim=1)
    total = torch.zeros_like(probs)
    for budget in range(NUM_TOKENS):
        score = torch.nn.functional.one_hot(torch.tensor(budget), NUM_TOKENS) - probs
        total += probs[:, [budget]] * rewards[:, [budget]] * score
    return total / len(logits)


def standardised(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(dim=1, keepdim=True)) / rewards.std(dim=1, correction=0, keepdim=True)


def many_gradients(objective: PolicyObjective, rewards: Tensor, draws: int) -> Tensor:
    """Gradients (draws, b, g) of independent draws at the logits of the table."""
    logits = table()[0].detach().repeat(draws, 1).requires_grad_()
    gradients = gradient(objective, logits, rewards.repeat(draws, 1), seeded(7)) * draws
    return rearrange(gradients, "(draws b) g -> draws b g", draws=draws)


def test_the_objectives_are_registered() -> None:
    assert {name for name, _ in OBJECTIVES} >= {"Reinforce", "DeterministicGroupGRPO"}


def test_the_group_form_is_the_policy_gradient_of_standardised_rewards() -> None:
    logits, rewards = table()
    got = gradient(DeterministicGroupGRPO(entropy=0), logits, rewards, seeded())
    torch.testing.assert_close(got, -exact_gradient(logits, standardised(rewards)))


@pytest.mark.parametrize(
    ("objective", "factor"), [(Reinforce("expected_reward", entropy=0), 1.0), (Reinforce(mu=0.5, entropy=0), 1.5)]
)
def test_the_mean_gradient_of_reinforce_is_the_exact_one(objective: PolicyObjective, factor: float) -> None:
    logits, rewards = table()
    gradients = many_gradients(objective, rewards, 20_000)
    error = gradients.std(dim=0) / math.sqrt(20_000)
    assert ((gradients.mean(dim=0) + factor * exact_gradient(logits, rewards)).abs() < 5 * error).all()


def test_the_expected_reward_is_the_better_baseline() -> None:
    # A reward far from zero is where a baseline matters; both scaled to the same mean gradient.
    rewards = table()[1] - 3
    expected = many_gradients(Reinforce("expected_reward", entropy=0), rewards, 2000).var(dim=0).sum()
    literal = (many_gradients(Reinforce(entropy=0), rewards, 2000) / 1.1).var(dim=0).sum()
    assert expected < 0.4 * literal


def test_equation_8_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 6.0, 8.0]])
    uniform = torch.zeros(2, 4, requires_grad=True)
    output = Reinforce(mu=0.5, entropy=0).loss(uniform, at(rewards), torch.tensor([1, 2, 4, 8]), 0.0, seeded())
    slopes = torch.autograd.grad(output.losses["policy"], uniform)[0]
    gained = rewards.gather(1, slopes.argmin(dim=1, keepdim=True))[:, 0]
    # The mean length is 3.75, so that the third budget is the nearest.
    advantages = gained + 0.5 * (gained - torch.tensor([3.0, 6.0]))
    torch.testing.assert_close(output.losses["policy"], (advantages * math.log(4)).mean())


def test_the_mean_length_is_of_the_batch() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 6.0, 8.0]])
    split = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    probs = split.softmax(dim=1)
    drawn = Reinforce(mu=0, entropy=0).loss(split.requires_grad_(), at(torch.ones(2, 4)), BUDGETS[:4], 0.0, seeded())
    index = torch.autograd.grad(drawn.losses["policy"], split)[0].argmin(dim=1, keepdim=True)
    output = Reinforce(mu=0.5, entropy=0).loss(split, at(rewards), torch.tensor([1, 2, 4, 8]), 0.0, seeded())
    gained = rewards.gather(1, index)[:, 0]
    mean = (probs.detach() * torch.tensor([1, 2, 4, 8])).sum(dim=1).mean()
    assert 3 < mean < 6
    advantages = gained + 0.5 * (gained - rewards[:, 2])
    wanted = -(advantages * probs.log().gather(1, index)[:, 0]).mean()
    torch.testing.assert_close(output.losses["policy"], wanted)


def test_draws_follow_the_policy_and_never_take_what_is_impossible() -> None:
    logits = torch.tensor([0.0, -1e30, 1.0, -1e4]).repeat(20_000, 1).requires_grad_()
    output = Reinforce(mu=0, entropy=0).loss(logits, at(torch.ones(20_000, 4)), torch.arange(1, 5), 0.0, seeded())
    drawn = torch.autograd.grad(output.losses["policy"], logits)[0].argmin(dim=1)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([1 / (1 + math.e), 0, math.e / (1 + math.e), 0], abs=0.015)


def test_draws_of_two_half_batches_are_those_of_the_batch() -> None:
    logits, rewards = table()
    objective, whole, halves = Reinforce("expected_reward", entropy=0), seeded(), seeded()
    parts = [gradient(objective, logits[rows], rewards[rows], halves) / 2 for rows in (slice(3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts), gradient(objective, logits, rewards, whole))


def test_the_entropy_bonus_decays_by_half_a_cosine() -> None:
    logits, rewards = table()
    objective = DeterministicGroupGRPO(entropy=0.4, entropy_end=0.1)
    probs = logits.detach().softmax(dim=1)
    entropy = -(probs * probs.log()).sum(dim=1).mean().item()
    weights = [
        -objective.loss(logits, at(rewards), BUDGETS, progress, seeded()).losses["entropy"].item() / entropy
        for progress in (0.0, 0.5, 1.0)
    ]
    assert weights == pytest.approx([0.4, 0.25, 0.1])


def test_metrics_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    rewards, budgets = torch.tensor([[1.0, 2.0]]), torch.tensor([2, 6])
    metrics = DeterministicGroupGRPO().loss(logits, at(rewards), budgets, 0.0, seeded()).metrics
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    wanted = {"entropy": entropy, "log_probability": math.log(0.75), "length": 5.0, "reward": 1.75}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(wanted)
    many = (logits.repeat(4000, 1), at(rewards.repeat(4000, 1)), budgets, 0.0, seeded())
    for baseline in ("mean_length", "expected_reward"):
        assert Reinforce(baseline).loss(*many).metrics["reward"].item() == pytest.approx(1.75, abs=0.03)


def test_clipping_starts_exact_and_stops_rewarding_beyond_the_clip() -> None:
    logits, rewards = table()
    exact = gradient(DeterministicGroupGRPO(entropy=0), logits, rewards, seeded())
    clipped = DeterministicGroupGRPO(clip=0.2, updates=4, entropy=0)
    torch.testing.assert_close(gradient(clipped, logits, rewards, seeded()), exact)
    old = clipped.loss(logits, at(rewards), BUDGETS, 0.0, seeded()).log_probabilities
    torch.testing.assert_close(gradient(clipped, logits, rewards, seeded(), old), exact)
    # All mass already on the best budget: more of it is not rewarded, and neither is less of the worse ones.
    moved = (old + 5 * torch.nn.functional.one_hot(rewards.argmax(dim=1), NUM_TOKENS)).requires_grad_()
    one_good = torch.where(rewards == rewards.amax(dim=1, keepdim=True), 1.0, 0.0).double()
    assert gradient(clipped, moved, one_good, seeded(), old).abs().max() < 1e-12
    # And the other way round there is no clip: a policy that left the best budget is called back.
    moved = (old - 5 * torch.nn.functional.one_hot(rewards.argmax(dim=1), NUM_TOKENS)).requires_grad_()
    assert gradient(clipped, moved, one_good, seeded(), old).abs().max() > 1e-4
    # The surrogate is PPO's, weighted by the old policy.
    ratio = (moved.log_softmax(dim=1) - old).exp()
    advantages = standardised(rewards)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = clipped.loss(moved, at(rewards), BUDGETS, 0.0, seeded(), old).losses["policy"]
    torch.testing.assert_close(loss, -(old.exp() * surrogate).sum(dim=1).mean())


def test_a_subset_is_evenly_spaced_and_reads_nothing_else() -> None:
    objective = DeterministicGroupGRPO(budgets=3, entropy=0)
    now = torch.full((2, 9), -math.log(9))
    assert objective.choose(now, torch.arange(1, 10), seeded()).tolist() == [[0, 4, 8]] * 2
    assert DeterministicGroupGRPO().choose(now, torch.arange(1, 10), seeded()).tolist() == [list(range(9))] * 2
    logits, rewards = table()
    unknown = torch.full_like(rewards, torch.nan)
    group = objective.choose(logits.detach(), BUDGETS, seeded())[0]
    unknown[:, group] = rewards[:, group]
    output = objective.loss(logits, at(unknown), BUDGETS, 0.0, seeded())
    assert output.metrics["reward"].isfinite()
    advantages = torch.zeros_like(rewards)
    advantages[:, group] = standardised(rewards[:, group])
    got = gradient(objective, logits, unknown, seeded())
    torch.testing.assert_close(got, -exact_gradient(logits, advantages))


def test_the_divergence_from_the_uniform_policy() -> None:
    logits, rewards = table()
    loss = DeterministicGroupGRPO(kl=0.3).loss(logits, at(rewards), BUDGETS, 0.0, seeded()).losses["kl"]
    uniform = torch.full_like(rewards, 1 / NUM_TOKENS)
    wanted = torch.nn.functional.kl_div(
        uniform.log(), logits.log_softmax(dim=1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(loss, 0.3 * wanted)
    assert "kl" not in DeterministicGroupGRPO().loss(logits, at(rewards), BUDGETS, 0.0, seeded()).losses


ALL: list[PolicyObjective] = [
    Reinforce(entropy=0),
    Reinforce("expected_reward", entropy=0),
    DeterministicGroupGRPO(entropy=0),
    DeterministicGroupGRPO(budgets=4, entropy=0),
    DeterministicGroupGRPO(clip=0.2, updates=2, entropy=0),
]


@pytest.mark.parametrize("objective", ALL[1:], ids=lambda objective: str(vars(objective)))
def test_equal_rewards_teach_nothing(objective: PolicyObjective) -> None:
    logits, _ = table()
    logits = logits.detach().float().requires_grad_()
    # Eq. 8 literal is left out: its mean gradient is zero, but that of each draw is not.
    for level in (0.0, -0.3):
        assert gradient(objective, logits, torch.full((6, NUM_TOKENS), level), seeded()).abs().max() < 1e-6


def test_an_image_without_spread_is_skipped_and_the_others_are_not() -> None:
    logits, rewards = table()
    rewards[0] = 0.7 + 1e-8 * rewards[0]
    got = gradient(DeterministicGroupGRPO(entropy=0), logits, rewards, seeded())
    assert (got[0] == 0).all() and (got[1:].abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("objective", ALL, ids=lambda objective: str(vars(objective)))
def test_extreme_logits_give_numbers(objective: PolicyObjective) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, 1e4, -1e4, 1.0, 2.0, 3.0], [-1e4] * 7 + [1e4]]).requires_grad_()
    rewards = torch.randn(2, NUM_TOKENS, generator=seeded())
    objective.entropy = 0.1
    for old in (None, logits.detach().flip(1).log_softmax(dim=1)):
        output = objective.loss(logits, at(rewards), BUDGETS, 0.0, seeded(), old)
        assert gradient(objective, logits, rewards, seeded(), old).isfinite().all()
        assert all(value.isfinite() for value in [*output.losses.values(), *output.metrics.values()])
    objective.entropy = 0.0


@pytest.mark.parametrize(
    ("objective", "recovered"),
    [
        (Reinforce("mean_length"), 0.8),
        (Reinforce("expected_reward"), 0.8),
        (DeterministicGroupGRPO(), 0.8),
        (DeterministicGroupGRPO(budgets=4), 0.65),
        (DeterministicGroupGRPO(clip=0.2, updates=4), 0.8),
    ],
    ids=lambda case: str(vars(case)) if isinstance(case, PolicyObjective) else "",
)
def test_a_policy_learns_what_the_features_tell(objective: PolicyObjective, recovered: float) -> None:
    """Share of the gap from the best fixed length to the oracle, on images that were not trained on."""
    torch.manual_seed(0)
    half = torch.randn(768, 4, generator=seeded())
    # Normalised already, so that the policy's own normalisation takes nothing away.
    features = torch.nn.functional.layer_norm(torch.cat([half, -half], dim=1), (8,))
    best = 1 + (NUM_TOKENS - 1) * (2 * features[:, :1]).sigmoid()
    rewards = -((BUDGETS - best) / NUM_TOKENS).abs()
    policy = LearnedPolicy(width=32, depth=1, num_tokens=NUM_TOKENS, feature_dim=8)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    generator, old = seeded(9), None
    for step in range(300):
        if step % objective.updates == 0:
            rows, old = torch.randint(512, (128,), generator=generator), None
        output = objective.loss(policy.logits(features[rows]), at(rewards[rows]), BUDGETS, step / 300, generator, old)
        old = output.log_probabilities if old is None else old
        optimizer.zero_grad()
        torch.stack(list(output.losses.values())).sum().backward()
        optimizer.step()
    held_out = rewards[512:]
    chosen = policy.logits(features[512:]).argmax(dim=1, keepdim=True)
    fixed = held_out[:, rewards[:512].mean(dim=0).argmax()].mean()
    share = (held_out.gather(1, chosen).mean() - fixed) / (held_out.amax(dim=1).mean() - fixed)
    assert share > recovered


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reinforce("expected_reward", mu=0.1), "mu .* mean_length, got 0.1 with expected_reward"),
        (lambda: DeterministicGroupGRPO(budgets=1), "at least 2"),
        (lambda: DeterministicGroupGRPO(clip=0.2), "2 with clip"),
        (lambda: DeterministicGroupGRPO(clip=1.5, updates=2), "between 0 and 1"),
        (lambda: gradient(DeterministicGroupGRPO(budgets=9), *table(), seeded()), "8 budgets, fewer than objective"),
    ],
)
def test_wrong_arguments_are_refused_in_words(make: type, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
