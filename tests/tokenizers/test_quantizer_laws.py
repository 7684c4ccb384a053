"""The laws of quantizers, over every registered one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework.config import resolve
from framework.engine.experiment import Experiment
from framework.losses.kl import KLLoss
from framework.runs import experiment_from
from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer
from framework.tokenizers.quantizers.gaussian_bottleneck import GaussianBottleneck
from framework.tokenizers.quantizers.identity import Identity
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import tiny_config


@pytest.fixture(params=[name for name, _ in QUANTIZERS])
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    """Each registered quantizer with its defaults."""
    made: Quantizer = QUANTIZERS.get(request.param)()
    made.set_num_tokens(6)
    return made


def some_latents(quantizer: Quantizer, batch_size: int = 4) -> Tensor:
    return torch.randn(batch_size, 6, quantizer.input_dim, generator=torch.Generator().manual_seed(1))


def a_generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def tensors(result: Quantized) -> dict[str, Tensor]:
    codes = {} if result.codes is None else {"codes": result.codes}
    return {"latents": result.latents} | codes | result.losses | result.metrics


def equal(first: Quantized, second: Quantized) -> bool:
    one, two = tensors(first), tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_shapes(quantizer: Quantizer) -> None:
    for generator in (None, a_generator()):
        result = quantizer(some_latents(quantizer).requires_grad_(), generator)
        assert result.latents.shape == (4, 6, quantizer.dim) and result.latents.dtype == torch.float32
        assert all(value.shape == (4, 6) for value in (result.losses | result.metrics).values())
        assert not any(value.requires_grad for value in result.metrics.values())


def test_a_gradient_reaches_the_encoder(quantizer: Quantizer) -> None:
    for generator in (None, a_generator()):
        latents = some_latents(quantizer).requires_grad_()
        passed = quantizer(latents, generator).latents
        (passed * torch.randn_like(passed)).sum().backward()
        assert latents.grad is not None and (latents.grad.abs().sum(-1) > 0).all()
        for name, loss in quantizer(some_latents(quantizer).requires_grad_(), generator).losses.items():
            assert loss.requires_grad, name


def test_codes_and_latents_are_one_to_one(quantizer: Quantizer) -> None:
    result = quantizer(some_latents(quantizer))
    if quantizer.vocabulary is None:
        assert result.codes is None
        with pytest.raises(TypeError, match="has no codes"):
            quantizer.codes_to_latents(torch.zeros(4, 6, dtype=torch.int64))
    else:
        torch.testing.assert_close(quantizer.codes_to_latents(result.codes), result.latents)
        every_code = torch.arange(quantizer.vocabulary)[None]
        assert torch.equal(quantizer.latents_to_codes(quantizer.codes_to_latents(every_code)), every_code)


def test_every_code_is_reached(quantizer: Quantizer) -> None:
    if quantizer.vocabulary is None:
        return
    quantizer.eval()
    own = quantizer.codes_to_latents(torch.arange(quantizer.vocabulary)[None])[0]
    generator = torch.Generator().manual_seed(0)
    spread = [size * torch.randn(30_000, quantizer.input_dim, generator=generator) for size in (0.3, 1, 3)]
    latents = torch.cat([own, *spread])
    latents = latents[: len(latents) // 6 * 6].unflatten(0, (-1, 6))
    assert quantizer(latents).codes.unique().tolist() == list(range(quantizer.vocabulary))


def test_noise_comes_from_the_generator_alone(quantizer: Quantizer) -> None:
    latents = some_latents(quantizer)
    world = torch.get_rng_state()
    still = quantizer(latents)
    assert equal(still, quantizer(latents))
    generator = a_generator()
    noisy = quantizer(latents, generator)
    assert equal(noisy, quantizer(latents, a_generator()))
    assert torch.equal(world, torch.get_rng_state())
    # One that draws nothing has no noise, and one that draws has some.
    assert equal(still, noisy) == torch.equal(generator.get_state(), a_generator().get_state())


def test_float32_under_autocast(quantizer: Quantizer) -> None:
    latents = some_latents(quantizer, 256).bfloat16()  # so many that some lie between two codes
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quantizer(latents, a_generator())
    assert equal(rounded, quantizer(latents.float(), a_generator()))
    assert {name: value.dtype for name, value in tensors(rounded).items() if name != "codes"} == dict.fromkeys(
        tensors(rounded).keys() - {"codes"}, torch.float32
    )


@pytest.mark.parametrize("sign", [-1, 1, 0])
def test_extreme_latents_are_finite(quantizer: Quantizer, sign: int) -> None:
    latents = some_latents(quantizer)
    latents = torch.full_like(latents, sign * 1e4) if sign else latents.sign() * 1e4
    latents.requires_grad_()
    result = quantizer(latents, a_generator())
    assert all(value.isfinite().all() for value in tensors(result).values())
    (result.latents.sum() + sum(loss.sum() for loss in result.losses.values())).backward()
    assert latents.grad is not None and latents.grad.isfinite().all()


def test_identity_normalises_each_token() -> None:
    latents = torch.randn(2, 3, 16) * 5 + 2
    normalised = Identity(16)(latents).latents
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(-1, correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert torch.equal(Identity(16, normalize="none")(latents).latents, latents)
    assert Identity(16)(latents.bfloat16()).latents.dtype == torch.float32


def test_gaussian_samples_have_the_posterior_that_the_encoder_gave() -> None:
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    latents = torch.cat([mean, 2 * deviation.log()]).expand(1, 20_000, 4)
    quantizer = GaussianBottleneck(2)
    assert torch.equal(quantizer(latents).latents[0, 0], mean)
    samples = quantizer(latents, a_generator()).latents[0]
    torch.testing.assert_close(samples.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(samples.std(0), deviation, atol=0, rtol=0.02)


def test_what_a_gaussian_token_pays() -> None:
    latents = torch.tensor([[[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    result = GaussianBottleneck(2, KLLoss(weight=0.1))(latents)
    torch.testing.assert_close(result.losses["kl"], torch.tensor([[0.45, 0.0]]))  # 9 / 2 nats
    torch.testing.assert_close(result.metrics["kl_bits"], torch.tensor([[4.5 / 0.6931472, 0.0]]))


def test_a_gaussian_bottleneck_from_yaml(tmp_path: Path) -> None:
    quantizer = "tokenizer.quantizer={name: GaussianBottleneck, dim: 16, kl: {weight: 1e-3}}"
    config = tiny_config(tmp_path, quantizer)
    assert resolve(config, Experiment)["tokenizer"]["quantizer"]["kl"] == {"weight": 1e-3}
    tokenizer = experiment_from(config).task.model
    assert isinstance(tokenizer, Tokenizer) and isinstance(tokenizer.quantizer, GaussianBottleneck)
    assert tokenizer.quantizer.kl.weight == 1e-3 and tokenizer.token_dim == 16
    assert tokenizer.get_parameter("encoder.to_latents.weight").shape[0] == 32
