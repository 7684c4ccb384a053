from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from framework.config import ConfigError
from framework.engine.frozen import train_mode
from framework.runs import experiment_from
from framework.tokenizers.autoencoders.autoencoder_kl import AutoencoderKL, Posterior
from framework.tokenizers.autoencoders.vqgan import CERTAIN, VQGAN, MaskGITVQGAN, TamingVQGAN
from framework.tokenizers.tokenizer import Tokenizer
from tests.stir import stirred
from tests.tiny_run import tiny_config

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SMALL = "{name: AutoencoderKL, width: 32, multipliers: [1, 2], num_res_blocks: 1, latent_channels: 4, "


def small(**changed: object) -> AutoencoderKL:
    given = {"multipliers": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "attention_resolutions": ()} | changed
    return stirred(AutoencoderKL(32, **given))  # type: ignore[arg-type]


def small_vqgan(kind: type[TamingVQGAN] | type[MaskGITVQGAN] = MaskGITVQGAN) -> VQGAN:
    attention = {"attention_resolutions": ()} if kind is TamingVQGAN else {}
    return stirred(kind(32, (1, 2), 1, num_codes=1024, dim=8, **attention))  # type: ignore[arg-type]


# AutoencoderKL


def test_a_posterior_is_a_gaussian() -> None:
    posterior = Posterior(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5))
    same = Normal(posterior.mean, posterior.std)
    latents = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(posterior.kl(), kl_divergence(same, Normal(0.0, 1.0)).sum((1, 2, 3)))
    torch.testing.assert_close(posterior.nll(latents), -same.log_prob(latents).sum((1, 2, 3)))
    wide = Posterior(torch.full((1, 1, 100, 100), 3.0), torch.full((1, 1, 100, 100), 4.0).log())
    world = torch.get_rng_state()
    sample = wide.sample(torch.Generator().manual_seed(0))
    assert torch.equal(sample, wide.sample(torch.Generator().manual_seed(0)))
    assert torch.equal(world, torch.get_rng_state())
    torch.testing.assert_close(torch.stack([sample.mean(), sample.std()]), torch.tensor([3.0, 2.0]), atol=0.05, rtol=0)


def test_log_variances_are_bounded() -> None:
    space = small()
    space.get_parameter("encoder.quant_conv.bias").data[4:] = torch.tensor([1e4, -1e4, 0.0, 0.0])
    log_variance = space.posterior(IMAGES).log_variance
    assert log_variance.amax() == 20 and log_variance.amin() == -30


@torch.no_grad()
def test_statistics_do_not_depend_on_batches_and_leave_the_images_as_they_were() -> None:
    space = small().eval()
    other = deepcopy(space)
    before = space.decode(space.encode(IMAGES))
    latents = space.encode(IMAGES)
    space.normalise_by([IMAGES])
    other.normalise_by(IMAGES.split([1, 3, 2]))
    for name in ("statistics.mean", "statistics.std"):
        torch.testing.assert_close(space.get_buffer(name), other.get_buffer(name))
    values = space.encode(IMAGES)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert latents.std((0, 2, 3), correction=0).sub(1).abs().amin() > 1e-3
    torch.testing.assert_close(space.decode(values), before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(space.statistics(space.posterior(IMAGES).mean), values)
    space.normalise_by([IMAGES])  # of the latents, not of what is already normalised
    torch.testing.assert_close(space.statistics.std, other.statistics.std)
    with pytest.raises(ValueError, match="no image"):
        space.normalise_by([])


@torch.no_grad()
def test_the_resolution_moves_attention_and_not_what_fits() -> None:
    def attending(**changed: object) -> list[str]:
        names = [name for name, _ in small(**changed).encoder.named_modules()]
        return [name for name in names if name.split(".")[-1] in ("attn_0", "attn_1")]

    assert attending() == ["mid.attn_1"]
    assert attending(attention_resolutions=(8,), resolution=16) == ["down.1.attn_0", "mid.attn_1"]
    assert attending(attention_resolutions=(16, 8), resolution=16)[0] == "down.0.attn_0"
    space = small(attention_resolutions=(8,), resolution=16).eval()
    assert space.decode(space.encode(torch.rand(1, 3, 24, 40))).shape == (1, 3, 24, 40)
    with pytest.raises(ValueError, match=r"\[16\]: at resolution 64 there are grids of the sides \[64, 32\]"):
        small(attention_resolutions=(16,), resolution=64)


def test_released_sizes() -> None:
    """Parameters of VA-VAE f16d32, of SD-VAE f8, and of the decoder and the codes of MaskGIT's VQGAN in TiTok."""
    with torch.device("meta"):
        va, sd = AutoencoderKL(), AutoencoderKL(128, (1, 2, 4, 4), 2, (), 4)
        maskgit = MaskGITVQGAN(encodes=False)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert (va.channels, va.downsampling, sd.channels, sd.downsampling) == (32, 16, 4, 8)
    assert (round(count(va.encoder) / 1e4), round(count(va.decoder) / 1e4)) == (2842, 4142)
    assert count(sd) == 83_653_863
    assert round(count(maskgit.decoder) / 1e4) == 3048 and count(maskgit.quantizer) == 1024 * 256


def test_an_autoencoder_can_be_trained() -> None:
    space = small()
    optimizer = torch.optim.Adam(space.parameters(), 3e-3)
    errors = []
    for step in range(30):
        posterior = space.posterior(IMAGES)
        values = space.statistics(posterior.sample(torch.Generator().manual_seed(step)))
        error = (space.decode(values) - IMAGES).square().mean()
        optimizer.zero_grad()
        (error + 1e-6 * posterior.kl().mean()).backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert all(parameter.grad is not None and parameter.grad.any() for _, parameter in trained(space))
    assert errors[-1] < errors[0] / 3


def trained(space: AutoencoderKL) -> list[tuple[str, torch.nn.Parameter]]:
    """What moves the output; to a softmax, the keys' bias is one constant."""
    return [(name, value) for name, value in space.named_parameters() if not name.endswith("key.bias")]


def test_a_frozen_space_in_a_tokenizer_passes_gradients_and_learns_nothing(tmp_path: Path) -> None:
    node = SMALL + "attention_resolutions: [8], resolution: 16, frozen: true}"
    task = experiment_from(
        tiny_config(tmp_path, f"tokenizer.input_space={node}", "tokenizer.encoder.patch_size=2")
    ).task
    train_mode(task)
    tokenizer = task.model
    assert isinstance(tokenizer, Tokenizer) and tokenizer.input_space is tokenizer.output_space
    assert tokenizer.encoder.positions == (4, 4)
    tokenizer(IMAGES, torch.full((6,), tokenizer.num_tokens)).images.square().mean().backward()
    gradient = tokenizer.get_parameter("decoder.head.to_patch.weight").grad
    assert gradient is not None and gradient.any()
    assert all(parameter.grad is None for parameter in tokenizer.input_space.parameters())
    assert not tokenizer.input_space.training


def test_what_does_not_fit_is_told_with_its_place(tmp_path: Path) -> None:
    for wrong, reason in (
        ("attention_resolutions: []}", "image_size 15 is not a multiple of 2"),
        ("attention_resolutions: [16], resolution: 100}", "AutoencoderKL refuses its arguments: attention_resolutions"),
    ):
        node = f"tokenizer.input_space={SMALL + wrong}"
        with pytest.raises(ConfigError, match=reason):
            experiment_from(tiny_config(tmp_path, node, "data.image_size=15"), device="meta")


# VQGANs


@torch.no_grad()
@pytest.mark.parametrize("kind", [TamingVQGAN, MaskGITVQGAN])
def test_sure_scores_decode_as_their_codes(kind: type[TamingVQGAN] | type[MaskGITVQGAN]) -> None:
    space = small_vqgan(kind).eval()
    codes = space.codes(IMAGES)
    assert codes.shape == (6, 8, 8) and codes.dtype == torch.int64 and len(codes.unique()) > 10
    scores = space.encode(IMAGES)
    assert scores.shape == (6, 1024, 8, 8) and torch.equal(scores.argmax(1), codes)
    assert scores.square().mean() == CERTAIN**2 / 1024 == 1
    torch.testing.assert_close(space.decode(scores), space.decode_codes(codes), atol=1e-5, rtol=1e-5)


def test_unsure_scores_mix_codes_and_pass_gradients() -> None:
    space = small_vqgan().eval()
    scores = torch.full((1, 1024, 8, 8), -1e4)
    scores[:, [3, 5]] = 0.0
    scores.requires_grad_()
    mixed = space.decode(scores)
    mean = space.quantizer.codes_to_latents(torch.tensor([[3, 5]])).mean(1)[..., None, None].expand(1, 8, 8, 8)
    torch.testing.assert_close(mixed, space.decode_latents(mean), atol=1e-5, rtol=1e-5)
    mixed.square().sum().backward()
    assert scores.grad is not None and scores.grad[:, 3].any() and space.quantizer.codebook.grad is not None


def test_without_an_encoder_it_only_decodes() -> None:
    space = MaskGITVQGAN(32, (1, 2), 1, 16, 8, encodes=False)
    assert not [name for name, _ in space.named_parameters() if name.startswith("encoder.")]
    assert space.decode_codes(torch.zeros(1, 4, 4, dtype=torch.int64)).shape == (1, 3, 8, 8)
    with pytest.raises(TypeError, match="only decodes: it needs encodes: true"):
        space.encode(IMAGES)


@torch.no_grad()
def test_a_tokenizer_whose_output_is_codes(tmp_path: Path) -> None:
    """TiTok's two stages: scores for the teacher's codes, which are decoded to pixels."""
    vqgan = "{name: MaskGITVQGAN, width: 32, multipliers: [1, 1, 2], num_res_blocks: 1, num_codes: 64, frozen: true}"
    head = "tokenizer.decoder.head={name: ProxyCodeHead}"
    config = tiny_config(tmp_path, f"tokenizer.output_space={vqgan}", head, "tokenizer.encoder.patch_size=4")
    tokenizer = experiment_from(config).task.model.eval()
    assert isinstance(tokenizer, Tokenizer) and isinstance(tokenizer.output_space, VQGAN)
    tokens = tokenizer.encode(IMAGES, 4)
    scores: Tensor = tokenizer.decoder(tokens)
    assert scores.shape[1:] == (64, *tokenizer.output_space.codes(IMAGES).shape[1:])
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.output_space.decode(scores).clamp(0, 1))
