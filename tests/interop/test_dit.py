"""DiT's numbers from DiT's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.generators.diffusion_objectives import DDPM
from framework.generators.dit import DiT
from framework.generators.guidance import Guidance
from framework.generators.samplers import DDIM, Ancestral, Sampler
from framework.interop.dit import import_dit, latents_of, patches_of
from framework.interop.official import OfficialError
from tests.interop.golden import assert_near, read


def generator_of() -> tuple[DiT, dict[str, Tensor]]:
    state, golden = read("dit")
    generator = import_dit(state, num_heads=4).build().eval()
    assert isinstance(generator, DiT)
    return generator, golden


def lengths_of(golden: dict[str, Tensor]) -> Tensor:
    return torch.full_like(golden["in/y"], 16)


def images_of(outputs: Tensor) -> Tensor:
    """Both halves of outputs ``(b, n, 2 d)`` as official DiT stacks them."""
    return torch.cat([latents_of(half) for half in outputs.chunk(2, dim=-1)], dim=1)


@torch.no_grad()
def test_golden_forward() -> None:
    generator, golden = generator_of()
    x, times, labels = patches_of(golden["in/x"]), golden["in/t"], golden["in/y"]
    assert torch.equal(latents_of(x), golden["in/x"])
    assert generator.positions is not None
    assert_near(generator.time(times), golden["mid/t_emb"])
    assert_near(generator.embed(x) + generator.positions, golden["mid/x_emb"])
    assert_near(images_of(generator(x, times, labels, lengths_of(golden))), golden["out/forward"])


@torch.no_grad()
def test_golden_guidance() -> None:
    """Official code takes two rows with and two without class, and hands both halves on."""
    generator, golden = generator_of()
    assert golden["in/y"][2:].eq(generator.space.num_classes).all()
    x, times = patches_of(golden["in/x"])[:2], golden["in/t"][:2]
    arguments = golden["in/y"][:2], lengths_of(golden)[:2], Guidance(4.0), x
    outputs = torch.cat([generator._predict(*(a[i : i + 1] if isinstance(a, Tensor) else a for a in arguments),
                                            times[i : i + 1], 0.0) for i in range(2)])  # fmt: skip
    assert_near(images_of(outputs), golden["out/forward_cfg4"][:2])
    assert_near(images_of(outputs)[:, :3], golden["out/forward_cfg4"][2:, :3])


@pytest.mark.parametrize("sampler", [DDIM(10), Ancestral(10)])
def test_golden_times(sampler: DDIM | Ancestral) -> None:
    _, golden = read("dit")
    name = "ddim10" if isinstance(sampler, DDIM) else "10"
    schedule = DDPM().schedule.respaced(sampler.kept(1000))
    assert torch.equal(schedule.times, golden[f"mid/timestep_map_{name}"])
    torch.testing.assert_close(schedule.betas, golden[f"mid/betas_{name}"], atol=0, rtol=1e-12)


@pytest.mark.parametrize(("sampler", "name"), [(DDIM(10), "ddim10_eta0"), (Ancestral(10), "ddpm10")])
@torch.no_grad()
def test_golden_samples(sampler: Sampler, name: str) -> None:
    """With guidance; official code carries rows without class along, which are thrown away at the end."""
    generator, golden = generator_of()
    labels, lengths = golden["in/y"][:2], lengths_of(golden)[:2]

    def noise(step: int) -> Tensor:
        return patches_of(golden["in_noise/ddpm10_eps"][step - 1] if step else golden["in/x"])[:2]

    def predict(x: Tensor, time: Tensor, progress: float) -> Tensor:
        return generator._predict(labels, lengths, Guidance(4.0), x, time, progress)

    assert_near(latents_of(sampler.sample(predict, noise, generator.objective)), golden[f"out/{name}"][:2])


@torch.no_grad()
def test_golden_training_losses() -> None:
    generator, golden = generator_of()
    clean, noise, times = patches_of(golden["in/x"]), patches_of(golden["in/noise"]), golden["in/t"]
    x = generator.objective.noised(clean, noise, times)
    assert_near(latents_of(x), golden["mid/q_sample"])
    output = generator(x, times, golden["in/y"], lengths_of(golden))
    losses = generator.objective.losses(output, x, clean, noise, times)
    assert_near(losses["noise"].mean(1), golden["out/train_mse"])
    assert_near(losses["bound"].mean(1), golden["out/train_vb"])
    assert_near((losses["noise"] + losses["bound"]).mean(1), golden["out/train_loss"])


def test_checkpoints_of_something_else() -> None:
    state, _ = read("dit")
    with pytest.raises(OfficialError, match=r"nothing for 'embed\.weight'"):
        import_dit({"encoder.weight": torch.zeros(2)})
    with pytest.raises(OfficialError, match="width 32, and the number of heads is known of 384, 768"):
        import_dit(state)
    with pytest.raises(OfficialError, match="extra"):
        import_dit(state | {"extra": torch.zeros(2)}, num_heads=4).build()
    with pytest.raises(OfficialError, match="time"):
        import_dit({name: value for name, value in state.items() if "t_embedder" not in name}, num_heads=4).build()
