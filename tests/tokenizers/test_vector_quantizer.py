from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from framework.engine.between_steps import learn_between_steps
from framework.nn.between_steps import LearnsBetweenSteps
from framework.runtime.ranks import Ranks
from framework.tokenizers.quantizers.vector_quantizer import VectorQuantizer

TITOK: dict[str, Any] = {"standardize": False, "ema": None, "kmeans_iterations": None, "restart_dead": False}
GOLDEN = Path(__file__).parents[1] / "golden"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(num_codes: int = 16, dim: int = 4, **options: Any) -> VectorQuantizer:
    """TiTok's form but for the options."""
    torch.manual_seed(0)
    return VectorQuantizer(num_codes, dim, **(TITOK | options))


def step(module: VectorQuantizer, *batches: Tensor) -> None:
    """Micro-batches, then what is learned between steps."""
    for latents in batches:
        module(latents)
    learn_between_steps(module, Ranks())


def learn_together(ranks: Sequence[VectorQuantizer]) -> None:
    """As the engine does it, with a copy of the module for each rank."""
    learners = [[m for m in rank.modules() if isinstance(m, LearnsBetweenSteps)] for rank in ranks]
    for same in zip(*learners, strict=True):
        for tensors in zip(*(module.averaged() for module in same), strict=True):
            mean = torch.stack(tensors).mean(0)
            for tensor in tensors:
                tensor.copy_(mean)
        for tensors in zip(*(module.shared() for module in same), strict=True):
            for tensor in tensors[1:]:
                tensor.copy_(tensors[0])
    for modules in learners:
        for module in modules:
            module.learn()


def assert_equal_states(first: VectorQuantizer, second: VectorQuantizer, tolerance: float = 1e-6) -> None:
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], atol=tolerance, rtol=0, msg=name)


def equal_rows(first: Tensor, second: Tensor) -> Tensor:
    """Which rows of the first, ``(n, d)``, equal which of the second, ``(m, d)``: bool ``(n, m)``."""
    return (first[:, None] - second).abs().amax(-1) < 1e-6


# The form


def test_golden_titok() -> None:
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "titok_vq.npz").items()}
    titok = quantizer(64, 4)
    titok.load_state_dict(titok.state_dict() | {"codebook": golden["state_dict/quantize.embedding.weight"]})
    latents = rearrange(golden["mid/z"], "b d 1 n -> b n d")
    result = titok(latents)
    assert torch.equal(result.codes, rearrange(golden["mid/tokens"], "b 1 n -> b n"))
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result.latents, rearrange(golden["mid/z_quantized"], "b d 1 n -> b n d"), **close)
    losses = {name: loss.mean() for name, loss in result.losses.items()}
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(losses[name], golden[f"out/{name}_loss"], rtol=1e-5, atol=0)
    total = losses["commitment"] + losses["codebook"]
    torch.testing.assert_close(total, golden["out/quantizer_loss"], rtol=1e-5, atol=0)
    # Of the whole model's loss, only this part reaches the codebook.
    (gradient,) = torch.autograd.grad(total, titok.codebook)
    torch.testing.assert_close(gradient, golden["grad/quantize.embedding.weight"], **close)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(normalize: bool) -> None:
    """Past the quantizer a gradient comes through normalisation only; each loss moves its own side."""
    vq = quantizer(normalize=normalize)
    latents, gradient = randn(2, 3, 4, seed=1).requires_grad_(), randn(2, 3, 4, seed=2)
    result = vq(latents)
    (passed,) = torch.autograd.grad((result.latents * gradient).sum(), latents, retain_graph=True)
    own = F.normalize(latents, dim=-1) if normalize else latents
    (expected,) = torch.autograd.grad((own * gradient).sum(), latents, retain_graph=True)
    torch.testing.assert_close(passed, expected)
    moves = {
        name: torch.autograd.grad(loss.sum(), (latents, vq.codebook), retain_graph=True, allow_unused=True)
        for name, loss in result.losses.items()
    }
    assert {name: [g is not None for g in pair] for name, pair in moves.items()} == {
        "commitment": [True, False], "codebook": [False, True]
    }  # fmt: skip
    used = torch.zeros(16, dtype=torch.bool).index_fill(0, result.codes.unique(), True)
    assert torch.equal(moves["codebook"][1].abs().sum(1) > 1e-9, used)
    chosen = vq.codes_to_latents(result.codes)
    torch.testing.assert_close(result.metrics["quantization_error"], (own - chosen).square().mean(-1).detach())
    torch.testing.assert_close(result.losses["commitment"], 0.25 * result.losses["codebook"])


def test_the_entropy_penalty() -> None:
    vq = quantizer(entropy=0.5, temperature=0.3)
    latents = randn(2, 5, 4, seed=1).requires_grad_()
    penalty = vq(latents).losses["entropy"]
    z, e = F.normalize(latents, dim=-1), vq.codes_to_latents(torch.arange(16))
    p = (-(z[:, :, None] - e).square().sum(-1) / 0.3).softmax(-1)
    expected = torch.special.entr(p).sum(-1).mean() - torch.special.entr(p.mean((0, 1))).sum()
    torch.testing.assert_close(penalty.mean(), 0.5 * expected)
    for found, wanted in zip(
        torch.autograd.grad(penalty.mean(), (latents, vq.codebook)),
        torch.autograd.grad(0.5 * expected, (latents, vq.codebook)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    assert penalty.shape == (2, 5) and "entropy" not in quantizer()(latents).losses


def test_float32_under_autocast() -> None:
    """With enough tokens and codes that bfloat16 would choose others."""
    vq, latents = quantizer(512, 12, entropy=1.0, temperature=0.01), randn(4, 100, 12, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vq(latents)
    exact = vq(latents)
    assert torch.equal(rounded.codes, exact.codes)
    assert torch.equal(rounded.losses["entropy"], exact.losses["entropy"])


@pytest.mark.parametrize("normalize", [False, True])
def test_vector_quantize_pytorch_gives_the_same(normalize: bool) -> None:
    theirs = pytest.importorskip("vector_quantize_pytorch")
    vq = quantizer(37, 6, normalize=normalize)
    other = theirs.VectorQuantize(6, 37, use_cosine_sim=normalize)
    other.codebook = vq.codebook.detach()
    latents = randn(4, 50, 6, seed=1)
    values, codes, _ = other.eval()(latents)
    result = vq.eval()(latents)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.latents, values)


@pytest.mark.parametrize(("normalize", "steps"), [(False, 5), (True, 1)])
def test_moving_means_are_those_of_vector_quantize_pytorch(normalize: bool, steps: int) -> None:
    """Its codes start with a count of one: an equal share, with as many latents as codes.

    Of unit codes it keeps the means before they were normalised, so that later steps weigh a little differently.
    """
    theirs = pytest.importorskip("vector_quantize_pytorch")
    vq = quantizer(32, 4, normalize=normalize, ema=0.9)
    other = theirs.VectorQuantize(4, 32, use_cosine_sim=normalize, decay=0.9)
    other.codebook = vq.codebook
    other._codebook.embed_avg.copy_(vq.codebook)
    for number in range(steps):
        latents = randn(2, 16, 4, seed=number)
        other(latents)
        step(vq, latents)
    assert vq(latents).codes.unique().numel() > 8
    torch.testing.assert_close(vq.codebook, other.codebook, atol=1e-4, rtol=1e-4)


# What is learned between steps


def test_a_code_follows_its_latents() -> None:
    vq = quantizer(2, 2, normalize=False, ema=0.9)
    assert "codebook" in dict(vq.named_buffers()) and not list(vq.parameters())
    vq.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    latents = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [2.0, 0.0]]])
    for _ in range(200):
        step(vq, latents)
    torch.testing.assert_close(vq.codebook, torch.tensor([[2.0, 2.0], [10.0, 10.0]]))
    assert list(vq(latents).losses) == ["commitment"]


def test_a_step_without_images_changes_nothing() -> None:
    vq = quantizer(ema=0.9, restart_dead=True)
    step(vq, randn(2, 8, 4))
    before = {name: value.clone() for name, value in vq.state_dict().items() if name != "steps"}
    step(vq)
    for name, value in before.items():
        torch.testing.assert_close(vq.state_dict()[name], value)


def test_nothing_is_learned_in_use() -> None:
    vq = quantizer(ema=0.9, restart_dead=True, kmeans_iterations=1)
    before = deepcopy(vq)
    with torch.no_grad():
        vq(randn(2, 8, 4))
    vq.eval()(randn(2, 8, 4))
    assert len(vq.candidates) == 0 and vq.usage.pending.sum() == 0 and vq.sums.abs().sum() == 0
    assert_equal_states(vq, before, 0)


@pytest.mark.parametrize("normalize", [False, True])
def test_ranks_and_micro_batches_learn_what_one_batch_teaches(normalize: bool) -> None:
    whole = quantizer(normalize=normalize, ema=0.9)
    parts, ranks = deepcopy(whole), [deepcopy(whole), deepcopy(whole)]
    for number in range(3):
        latents = randn(4, 30, 4, seed=number)
        step(whole, latents)
        step(parts, *latents.chunk(2))
        for rank, own in zip(ranks, latents.chunk(2), strict=True):
            rank(own)
        learn_together(ranks)
    assert not torch.equal(whole.codebook, quantizer(normalize=normalize).codebook)
    for other in (parts, *ranks):
        assert_equal_states(whole, other)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_ranks_place_and_restart_equally(ema: float | None) -> None:
    options: dict[str, Any] = {"ema": ema, "warmup_steps": 2, "kmeans_iterations": 2, "restart_dead": True}
    ranks, alone = [quantizer(40, **options), quantizer(40, **options)], quantizer(40, **options)
    direction = torch.tensor([3.0, 0, 0, 0])
    for number in range(110):
        batches = [direction * (number < 60) + randn(2, 30, 4, seed=2 * number + rank) for rank in (0, 1)]
        for rank, own in zip(ranks, batches, strict=True):
            rank(own)
        learn_together(ranks)
        step(alone, batches[0][:1], batches[0][1:])
        if number == 1:
            assert_equal_states(ranks[0], alone)  # placed on the main rank's latents, whatever its micro-batches
        assert_equal_states(ranks[0], ranks[1], 0)


def test_a_warm_up_lets_latents_pass() -> None:
    vq = quantizer(warmup_steps=2, kmeans_iterations=0, entropy=0.1)
    latents = randn(2, 8, 4, seed=1)
    for _ in range(2):
        result = vq(latents)
        torch.testing.assert_close(result.latents, F.normalize(latents, dim=-1))
        assert all((loss == 0).all() for loss in result.losses.values())
        assert torch.equal(vq.eval()(latents).latents, vq.codes_to_latents(result.codes))
        step(vq.train(), latents)
    assert vq.usage.steps == 0
    after = vq(latents)
    assert after.losses.keys() == result.losses.keys() and vq.usage.pending.sum() == 16
    # 16 codes stand on the 16 latents.
    assert after.codes.unique().numel() == 16
    torch.testing.assert_close(after.latents, F.normalize(latents, dim=-1))


def test_a_run_stopped_in_its_warm_up_goes_on() -> None:
    options: dict[str, Any] = {"warmup_steps": 3, "kmeans_iterations": 1, "ema": 0.9, "restart_dead": True}
    whole, stopped = quantizer(**options), quantizer(**options)
    for number in range(6):
        if number == 2:
            state, stopped = stopped.state_dict(), quantizer(**options)
            stopped.load_state_dict(state)
        step(whole, randn(2, 8, 4, seed=number))
        step(stopped, randn(2, 8, 4, seed=number))
    assert_equal_states(whole, stopped, 0)


def test_kmeans_finds_clusters() -> None:
    centres = 10 * torch.eye(6)
    latents = (centres.repeat(20, 1) + 0.1 * randn(120, 6))[None]
    # Six picks can share a cluster, twelve spread ones do not leave one out.
    vq = quantizer(12, 6, normalize=False, kmeans_iterations=10)
    step(vq, latents)
    assert vq(latents).metrics["quantization_error"].max() < 0.05
    mean = latents[0].unflatten(0, (20, 6)).mean(0)
    assert (torch.cdist(mean, vq.codebook).min(1).values < 0.2).all()


def test_fewer_latents_than_codes_place_as_many() -> None:
    vq = quantizer(16, 4, kmeans_iterations=0)
    start = vq.codebook.detach().clone()
    step(vq, randn(1, 5, 4, seed=1))
    moved = ((vq.codebook - start).abs() > 1e-6).any(1)
    assert moved.tolist() == [True] * 5 + [False] * 11
    placed = equal_rows(vq.codebook[:5], F.normalize(randn(5, 4, seed=1), dim=-1))
    assert placed.any(0).all() and placed.any(1).all()


def test_picks_are_spread_over_images_and_differ_from_step_to_step() -> None:
    vq = quantizer(8, 1, normalize=False)
    vq.candidates = torch.arange(64.0)[:, None]  # four images of sixteen tokens
    first = vq._picks()
    assert (first // 16).unique().numel() == 4 and first.unique().numel() == 8
    vq.steps += 1
    assert not torch.equal(vq._picks(), first)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_dead_codes_restart_on_latents_with_an_equal_share(ema: float | None) -> None:
    vq = quantizer(16, 4, normalize=False, ema=ema, restart_dead=True)
    near = torch.tensor([5.0, 5, 5, 5])
    with torch.no_grad():
        vq.codebook[0] = near
    others = vq.codebook[1:].clone()
    for number in range(100):
        assert torch.equal(vq.codebook[1:], others)
        step(vq, near + 0.1 * randn(2, 20, 4, seed=number))
    assert vq.usage.steps == 100 and vq.usage.dead.sum() == 15
    last = near + 0.1 * randn(2, 20, 4, seed=1000)
    step(vq, last)
    on = equal_rows(vq.codebook[1:], last.flatten(0, 1))
    assert on.any(1).all() and on.any(0).sum() == 15
    assert not vq.usage.dead.any()
    restarted = vq.codebook[1:].clone()
    for _ in range(50):  # without latents of their own they stay for a while
        step(vq, torch.full((1, 40, 4), 5.0))
    assert equal_rows(restarted, vq.codebook).any(1).sum() >= 14  # one of them may be nearest


def used(steps: int, **options: Any) -> float:
    """The share of codes that held-out latents use after training the codebook on latents in a narrow cone."""
    vq = quantizer(64, 6, **options)
    parameters = list(vq.parameters())
    optimizer = torch.optim.Adam(parameters, 3e-3) if parameters else None
    for number in range(steps + 1):
        latents = torch.tensor([3.0, 0, 0, 0, 0, 0]) + 0.5 * randn(4, 64, 6, seed=number)
        if number < steps:
            losses = vq(latents).losses
            if optimizer is not None:
                optimizer.zero_grad()
                losses["codebook"].mean().backward()
                optimizer.step()
            learn_between_steps(vq, Ranks())
    return vq.eval()(latents).codes.unique().numel() / 64


def test_what_fills_a_codebook() -> None:
    assert used(200) < 0.4
    assert used(200, restart_dead=True) > 0.8
    assert used(20, ema=0.97, warmup_steps=5, kmeans_iterations=5) > 0.8


def test_latents_that_are_not_finite_are_not_hidden() -> None:
    latents = randn(1, 3, 4)
    latents[0, 0] = torch.nan
    result = quantizer()(latents)
    assert result.latents[0, 0].isnan().all()
    assert result.losses["commitment"].isnan().tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"dim": 1}, "dim must be at least 1, and 2 where normalized, got 1"),
        ({"ema": 1.0}, "ema must be above 0 and below 1, or null to train the codebook by a loss, got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"kmeans_iterations": -1}, "kmeans_iterations must be at least 0, or null, got -1"),
        ({"commitment": -0.1}, "commitment must be at least 0, got -0.1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VectorQuantizer(**options)
