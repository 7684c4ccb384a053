from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.engine.between_steps import learn_between_steps
from framework.runtime.ranks import Ranks
from framework.tokenizers.quantizers.finite_scalar_quantizer import (
    BOUNDS,
    FiniteScalarQuantizer,
    RunningStandardisation,
)
from tests.tokenizers.build import small_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer_of(levels: tuple[int, ...], bound: Any = "erf", num_tokens: int = 6) -> FiniteScalarQuantizer:
    made = FiniteScalarQuantizer(levels, bound)
    made.set_num_tokens(num_tokens)
    return made


def running(quantizer: FiniteScalarQuantizer) -> RunningStandardisation:
    assert isinstance(quantizer.standardise, RunningStandardisation)
    return quantizer.standardise


def perplexity(codes: Tensor, vocabulary: int) -> float:
    share = codes.flatten().bincount(minlength=vocabulary) / codes.numel()
    return float(torch.special.entr(share).sum().exp())


@pytest.mark.parametrize("name, bound", [("even", "atanh"), ("odd", "atanh"), ("symmetric", "symmetric")])
def test_golden(name: str, bound: str) -> None:
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"fsq_{name}.npz").items()}
    levels = json.loads((GOLDEN / f"fsq_{name}.json").read_text())["config"]["levels"]
    quantizer = quantizer_of(tuple(levels), bound)

    def project(side: str, values: Tensor) -> Tensor:
        weight = golden.get(f"state_dict/project_{side}.weight")
        return values if weight is None else F.linear(values, weight, golden[f"state_dict/project_{side}.bias"])

    given = golden["in/z"].requires_grad_()
    result = quantizer(project("in", given))
    quantized = project("out", result.latents)
    torch.testing.assert_close(quantized, golden["out/quantized"])
    assert torch.equal(result.codes, golden["mid/indices"].long())
    level_indices = result.codes[..., None] // quantizer.basis % quantizer.levels
    assert torch.equal(level_indices, golden["mid/level_indices"].long())
    (gradient,) = torch.autograd.grad(quantized.square().mean(), given)
    torch.testing.assert_close(gradient, golden["grad/z"])
    decoded = project("out", quantizer.codes_to_latents(result.codes))
    torch.testing.assert_close(decoded, golden["out/indices_to_codes"])
    head = golden["mid/implicit_codebook_head"]
    torch.testing.assert_close(quantizer.codes_to_latents(torch.arange(len(head))[None])[0], head)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bound", ["atanh", "symmetric"])
def test_against_vector_quantize_pytorch(bound: str, seed: int) -> None:
    peer_of = pytest.importorskip("vector_quantize_pytorch").FSQ
    levels = tuple(np.random.default_rng(seed).integers(3, 12, size=2 + seed % 3).tolist())
    peer = peer_of(list(levels), preserve_symmetry=bound == "symmetric")
    quantizer = quantizer_of(levels, bound)
    given = (3 * latents(8, 50, len(levels), seed=seed)).requires_grad_()
    (theirs, their_codes), ours = peer(given), quantizer(given)
    assert torch.equal(ours.codes, their_codes.long())
    torch.testing.assert_close(ours.latents, theirs)
    upstream = latents(*theirs.shape, seed=9)
    torch.testing.assert_close(*(torch.autograd.grad(out, given, upstream)[0] for out in (ours.latents, theirs)))
    every = torch.arange(quantizer.vocabulary)
    torch.testing.assert_close(quantizer.codes_to_latents(every[None])[0], peer.indices_to_codes(every))


def test_tan_is_the_formula_of_the_paper_and_elastictok() -> None:
    levels = (8, 8, 8, 5, 5, 5)
    given = 3 * latents(4, 6, 6)
    result = quantizer_of(levels, "tan")(given)
    codes = np.zeros((4, 6), dtype=np.int64)
    for channel, count in enumerate(levels):
        half = (count - 1) * 0.999 / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        moved = given[..., channel].double().numpy() + np.tan(offset / half)
        rounded = np.rint(np.tanh(moved) * half - offset)
        np.testing.assert_allclose(result.latents[..., channel].numpy(), rounded / (count // 2), atol=1e-6)
        codes += (rounded + count // 2).astype(np.int64) * int(np.prod(levels[:channel]))
    assert np.array_equal(result.codes.numpy(), codes)


def test_erf_has_the_middles_of_equally_likely_bins() -> None:
    quantizer = quantizer_of((4, 5)).eval()
    given = latents(3, 6, 2).requires_grad_()
    result = quantizer(given)
    likely = torch.distributions.Normal(0.0, 1.0).cdf(given)
    counts = torch.tensor([4, 5])
    middles = ((likely * counts).floor() + 0.5) / counts * 2 - 1
    torch.testing.assert_close(result.latents, middles.detach())
    upstream = latents(3, 6, 2, seed=1)
    straight_through = torch.autograd.grad(2 * likely - 1, given, upstream)[0]
    torch.testing.assert_close(torch.autograd.grad(result.latents, given, upstream)[0], straight_through)


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_holds_for_every_bound(bound: str) -> None:
    quantizer = quantizer_of((2, 3, 6, 9), bound).eval()
    near_and_far = 5 * latents(20_000, 6, 4, seed=7) * latents(20_000, 6, 4, seed=8)
    wide = torch.cat([near_and_far, 1e4 * latents(20, 6, 4)]).requires_grad_()
    result = quantizer(wide)
    assert result.codes.unique().tolist() == list(range(324))
    assert torch.equal(quantizer.codes_to_latents(result.codes), result.latents)
    assert torch.equal(quantizer.latents_to_codes(result.latents), result.codes)
    assert result.latents.abs().max() <= 1
    (gradient,) = torch.autograd.grad(result.latents.sum(), wide)
    assert gradient.isfinite().all() and (gradient >= 0).all()
    coarse = wide.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = quantizer(coarse)
    assert torch.equal(under_autocast.latents, quantizer(coarse.float()).latents)


def test_the_names_of_bounds_are_those_that_yaml_may_give() -> None:
    assert set(get_args(get_type_hints(FiniteScalarQuantizer.__init__)["bound"])) == BOUNDS.keys()


@pytest.mark.parametrize("shift, scale", [(0, 1), (-3, 0.02), (200, 5), (0.5, 300)])
def test_gaussian_latents_fill_all_codes_of_erf(shift: float, scale: float) -> None:
    quantizer = quantizer_of((8, 6, 5))
    # Each position and channel has its own distribution.
    scales, shifts = scale * (1 + torch.arange(18.0).view(6, 3)), shift * torch.arange(18.0).view(6, 3)
    for step in range(20):
        training = quantizer(latents(3000, 6, 3, seed=step) * scales + shifts)
        learn_between_steps(quantizer, Ranks())
    assert perplexity(training.codes, 240) > 0.95 * 240
    used = quantizer.eval()(latents(3000, 6, 3, seed=50) * scales + shifts).codes
    for codes in used.T:
        assert perplexity(codes, 240) > 0.95 * 240
    torch.testing.assert_close(running(quantizer).mean, shifts, atol=0.02 * float(scales.max()), rtol=0)
    torch.testing.assert_close(running(quantizer).variance.sqrt(), scales, atol=0, rtol=0.02)
    assert quantizer.usage.metrics()["perplexity"] > 0.95 * 240


def test_gradients_pass_through_the_batch_statistics() -> None:
    given = (5 + 3 * latents(8, 6, 2)).double().requires_grad_()
    standardise = quantizer_of((5, 5)).double().standardise
    standardise.get_buffer("mean").fill_(2)  # which makes no difference
    assert torch.autograd.gradcheck(standardise, (given,))
    normalised = F.batch_norm(given.flatten(1), None, None, training=True, eps=1e-6).view_as(given)
    torch.testing.assert_close(standardise(given), normalised)


def test_two_ranks_and_micro_batches_learn_what_one_batch_teaches() -> None:
    whole, parts, *ranks = (quantizer_of((8, 5)) for _ in range(4))
    for step in range(3):
        given = 2 + latents(12, 6, 2, seed=step)
        whole(given)
        for part in given.split(5):
            parts(part)
        for rank, half in zip(ranks, given.chunk(2), strict=True):
            rank(half)
        for tensors in zip(*(running(rank).averaged() for rank in ranks), strict=True):
            mean = torch.stack(tensors).mean(0)
            for tensor in tensors:
                tensor.copy_(mean)
        for quantizer in (whole, parts, *ranks):
            running(quantizer).learn()
    for other in (parts, *ranks):
        for name, value in running(whole).state_dict().items():
            torch.testing.assert_close(running(other).state_dict()[name], value)


def test_running_statistics_change_only_between_training_steps() -> None:
    quantizer = quantizer_of((8, 5))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(latents(4, 6, 2))
    learn_between_steps(quantizer, Ranks())
    quantizer.eval()(latents(4, 6, 2))
    learn_between_steps(quantizer, Ranks())
    quantizer.train()(latents(4, 6, 2))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    learn_between_steps(quantizer, Ranks())
    assert not torch.equal(running(quantizer).mean, before["standardise.mean"])
    assert (running(quantizer).steps == 1).all() and quantizer.usage.steps == 1


def test_running_statistics_are_a_plain_mean_that_turns_into_a_moving_one() -> None:
    standardise = running(quantizer_of((8,), num_tokens=1))
    for values in ([0.0, 2.0], [4.0, 8.0]):
        standardise(torch.tensor(values).view(2, 1, 1))
        standardise.learn()
    assert standardise.mean.item() == 3.5 and standardise.variance.item() == 2.5
    for _ in range(500):
        standardise(torch.tensor([9.0, 13.0]).view(2, 1, 1))
        standardise.learn()
    assert abs(standardise.mean.item() - 11) < 0.1 and abs(standardise.variance.item() - 4) < 0.1


def test_in_use_an_image_does_not_depend_on_its_batch() -> None:
    quantizer = quantizer_of((8, 5, 5))
    given = latents(8, 6, 3)
    quantizer(given)
    learn_between_steps(quantizer, Ranks())
    quantizer.eval()
    assert torch.equal(quantizer(given).codes[2:3], quantizer(given[2:3]).codes)


def test_a_batch_of_one_trains_on_running_statistics() -> None:
    quantizer = quantizer_of((8, 5, 5))
    for seed in range(30):
        alone = 7 + latents(1, 6, 3, seed=seed)
        training = quantizer(alone)
        assert torch.equal(training.latents, quantizer.eval()(alone).latents)
        quantizer.train()
        learn_between_steps(quantizer, Ranks())
    assert (running(quantizer).mean - 7).abs().max() < 1


def test_fewer_tokens_are_the_first_positions() -> None:
    quantizer = quantizer_of((8, 5))
    for length in (4, 6):
        quantizer(3 + latents(8, length, 2))
        running(quantizer).learn()
    assert running(quantizer).steps.flatten().tolist() == [2, 2, 2, 2, 1, 1]
    assert (running(quantizer).mean > 2).all()
    quantizer.eval()
    given = 3 + latents(8, 6, 2)
    assert torch.equal(quantizer(given[:, :4]).codes, quantizer(given).codes[:, :4])


def test_statistics_need_to_know_how_many_tokens_there_are() -> None:
    with pytest.raises(ValueError, match=r"for 0 token positions and the latents have 6: .*set_num_tokens\(6\)"):
        FiniteScalarQuantizer((8, 5))(latents(2, 6, 2))
    with pytest.raises(ValueError, match="for 4 token positions and the latents have 6"):
        quantizer_of((8, 5), num_tokens=4)(latents(2, 6, 2))
    assert FiniteScalarQuantizer((8, 5), "atanh")(latents(2, 6, 2)).codes.shape == (2, 6)


def test_state_survives_a_state_dict() -> None:
    quantizer, fresh = quantizer_of((8, 5)), quantizer_of((8, 5))
    quantizer(5 + 2 * latents(8, 6, 2))
    learn_between_steps(quantizer, Ranks())
    state = quantizer.state_dict()
    assert {name for name in state if "usage" not in name} == {
        "standardise.mean",
        "standardise.variance",
        "standardise.steps",
    }
    fresh.load_state_dict(state)
    given = 5 + 2 * latents(8, 6, 2, seed=4)
    assert torch.equal(fresh.eval()(given).codes, quantizer.eval()(given).codes)
    assert not any("usage" not in name for name in quantizer_of((8, 5), "atanh").state_dict())


def test_what_is_not_a_number_is_no_code_and_stays_visible() -> None:
    for bound in BOUNDS:
        given = latents(4, 6, 2)
        given[0, 0, 0] = torch.nan
        result = quantizer_of((8, 5), bound)(given)
        assert result.codes.amin() >= 0 and result.codes.amax() < 40
        assert result.latents[0, 0, 0].isnan() and result.latents[:, 1:].isfinite().all()


def test_a_tokenizer_tells_how_many_tokens_it_makes() -> None:
    tokenizer = small_tokenizer(quantizer=FiniteScalarQuantizer((8, 5, 5)))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokenizer(images, torch.tensor([1, 3, 6, 6])).images.sum().backward()
    weight = tokenizer.get_parameter("encoder.to_latents.weight")
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    learn_between_steps(tokenizer, Ranks())
    tokens = tokenizer.eval().encode(images, 3)
    assert tokens.codes is not None
    again = tokenizer.codes_to_tokens(tokens.codes, tokens.lengths)
    assert torch.equal(tokenizer.decode(again), tokenizer.decode(tokens))


@pytest.mark.parametrize("levels", [(), (8, 1), (-3,)])
def test_levels_are_at_least_two(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels are whole numbers of at least 2.*got \["):
        FiniteScalarQuantizer(levels)
