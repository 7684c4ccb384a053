from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from framework.losses.blur_pool import BlurPool
from framework.losses.discriminators import DISCRIMINATORS, BlurPatchDiscriminator, Discriminator, PatchDiscriminator

GOLDEN = Path(__file__).parents[1] / "golden/taming_vqgan.npz"
PREFIX = "state_dict/loss.discriminator."
SMALL = {"PatchDiscriminator": {"width": 8}, "BlurPatchDiscriminator": {"width": 32}}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_golden_taming() -> None:
    with np.load(GOLDEN) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if "disc" in name}
    discriminator = PatchDiscriminator(width=8, depth=3)
    discriminator.load_state_dict({n.removeprefix(PREFIX): v for n, v in golden.items() if n.startswith(PREFIX)})
    seen: dict[str, Tensor] = {}
    for index in (0, 2, 5):
        layer = discriminator.main[index]
        layer.register_forward_hook(lambda _, inputs, made, name=f"mid/disc_main_{index}": seen.update({name: made}))
    images = golden["in/image_disc"].requires_grad_()  # theirs are in [-1, 1], ours in [0, 1]

    discriminator.eval()
    with torch.no_grad():
        assert relative(discriminator((images + 1) / 2), golden["out/disc_logits_real"]) < 1e-5
    for name, output in seen.items():
        assert relative(output, golden[name]) < 1e-5, name
    assert len(seen) == 3

    discriminator.train()
    logits = discriminator((images + 1) / 2)
    assert relative(logits.detach(), golden["out/disc_logits_train_mode"]) < 1e-5
    norm = discriminator.main[3]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    assert relative(norm.running_mean, golden["mid/disc_running_mean_after"]) < 1e-5
    assert relative(norm.running_var, golden["mid/disc_running_var_after"]) < 1e-5
    logits.mean().backward()
    assert images.grad is not None and relative(images.grad, golden["grad/disc_input"]) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_every_discriminator_judges_patches(name: str) -> None:
    assert set(SMALL) == {known for known, _ in DISCRIMINATORS}
    discriminator: Discriminator = DISCRIMINATORS.get(name)(**SMALL[name])
    for size in (32, 64):
        images = torch.rand(2, 3, size, size, requires_grad=True)
        logits = discriminator(images)
        assert logits.shape[:2] == (2, 1) and logits.shape[2] > 1
        logits[0].sum().backward()
        assert images.grad is not None and images.grad[0].any()


def test_the_field_of_view_is_70_pixels() -> None:
    discriminator = PatchDiscriminator(width=8).eval()
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    discriminator(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("size, grid", [(32, 4), (64, 8), (128, 16), (256, 16)])
def test_titoks_grid_is_16_where_the_image_is_large_enough(size: int, grid: int) -> None:
    assert BlurPatchDiscriminator(width=32)(torch.rand(1, 3, size, size)).shape == (1, 1, grid, grid)


def test_titoks_size() -> None:
    # Their layers, counted by hand: 5x5 from 3 to 128; 3x3 to 128, 256, 512 with norms; 1x1; 5x5 to 1.
    sizes = [(25 * 3 + 1) * 128, (9 * 128 + 3) * 128, (9 * 128 + 3) * 256, (9 * 256 + 3) * 512]
    sizes += [(512 + 1) * 512, 25 * 512 + 1]
    assert sum(p.numel() for p in BlurPatchDiscriminator().parameters()) == sum(sizes)
    with pytest.raises(ValueError, match="a multiple of 32, got 48"):
        BlurPatchDiscriminator(width=48)


def test_blurred_halving() -> None:
    values = torch.rand(1, 2, 6, 6)
    blur = BlurPool((1, 3, 3, 1), padding=1, mode="constant")
    kernel = torch.tensor([1.0, 3, 3, 1]) / 8
    window = values[0, 1, 1:5, 3:7]  # the second row and the third column of the result, one column beyond the border
    expected = (kernel[:, None] * kernel[None])[:, :3] * window
    assert blur(values).shape == (1, 2, 3, 3)
    torch.testing.assert_close(blur(values)[0, 1, 1, 2], expected.sum())
    assert not list(blur.state_dict())
