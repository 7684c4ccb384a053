from __future__ import annotations

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from framework.evaluation.image_metrics import ssim, to_uint8
from tests.losses.extractor_files import noisy, photographs


def by_skimage(image: Tensor, other: Tensor) -> float:
    found: float = structural_similarity(
        image.double().permute(1, 2, 0).numpy(),
        other.double().permute(1, 2, 0).numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
        data_range=1,
    )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deviation", [1e-3, 0.1, 0.5])
def test_it_is_scikit_images(dtype: torch.dtype, deviation: float) -> None:
    images = photographs(64, "astronaut", "chelsea", "coffee").to(dtype)[..., :48]
    others = noisy(images, deviation).clamp(0, 1)
    others[2] = images[2].flip(-1)
    expected = [by_skimage(image, other) for image, other in zip(images, others, strict=True)]
    assert ssim(images, others).tolist() == pytest.approx(expected, abs=1e-9)


def test_flat_regions_keep_their_digits() -> None:
    """In float32 the variance of a bright wall is rounding, as large as what divides it is small."""
    wall = torch.full((1, 3, 16, 16), 0.9)
    speck = wall.clone()
    speck[0, :, 8, 8] += 1e-3
    assert ssim(wall, speck).item() == pytest.approx(by_skimage(wall[0], speck[0]), abs=1e-9)
    assert ssim(wall, wall).item() == 1


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = photographs(32, "astronaut", "chelsea", "coffee", "rocket")
    together = ssim(images, noisy(images, 0.1))
    alone = [ssim(images[i : i + 1], noisy(images, 0.1)[i : i + 1]).item() for i in range(4)]
    assert together.tolist() == pytest.approx(alone, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) cannot be compared .* \(1, 3, 16, 16\)"):
        ssim(images, images[:1])
    with pytest.raises(ValueError, match="window of 11x11 pixels, and images are 16x10"):
        ssim(images[..., :10], images[..., :10])
    with pytest.raises(ValueError, match=r"float in \[0, 1\], got torch.uint8"):
        ssim(to_uint8(images), to_uint8(images))


def test_bytes_are_the_nearest_and_come_back() -> None:
    levels = torch.arange(256)
    assert to_uint8(levels / 255).tolist() == levels.tolist()
    assert to_uint8(torch.tensor([-0.1, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.2])).tolist() == [0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).item() == 128
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.tensor([0.5, torch.nan]))
    with pytest.raises(ValueError, match="got torch.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
