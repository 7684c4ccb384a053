from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from framework.data.transforms import (
    ADMCenterCrop,
    CenterCrop,
    RandomCrop,
    RandomResizedCrop,
    Transform,
    open_image,
    to_tensor,
)

RNG = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (333, 500), (16, 40), (9, 12)])
def test_center_crop_is_the_usual_evaluation(size: tuple[int, int]) -> None:
    """Resize of the shorter side (bicubic, antialiased) and a centre crop, as torchvision has them."""
    image = noise(*size)
    bicubic = v2.InterpolationMode.BICUBIC
    reference = v2.Compose([v2.Resize(16, interpolation=bicubic, antialias=True), v2.CenterCrop(16)])
    assert torch.equal(to_tensor(CenterCrop(image_size=16)(image, RNG)), to_tensor(reference(image)))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (501, 333), (257, 400), (1001, 751), (100, 67), (255, 999)])
def test_center_crop_at_the_usual_size(size: tuple[int, int]) -> None:
    """The same levels as torchvision's on photographs; its other path, over tensors, rounds in other places."""
    image, bicubic = noise(*size), v2.InterpolationMode.BICUBIC
    reference = v2.Compose([v2.Resize(256, interpolation=bicubic, antialias=True), v2.CenterCrop(256)])
    ours = to_tensor(CenterCrop(image_size=256)(image, RNG))
    assert torch.equal(ours, to_tensor(reference(image)))
    assert (ours.int() - reference(to_tensor(image)).int()).abs().max() <= 2


def test_adm_halves_by_averaging() -> None:
    image = noise(64, 64)
    pixels = np.asarray(image).astype(int)
    for _ in range(2):  # while at least twice 16, so down to 16 itself
        pixels = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
        pixels = (pixels[::2] + pixels[1::2] + 1) // 2
    crop = ADMCenterCrop(image_size=16)(image, RNG)
    assert np.array_equal(np.asarray(crop), pixels)
    assert not np.array_equal(np.asarray(crop), np.asarray(CenterCrop(image_size=16)(image, RNG)))


def test_adm_rounds_the_longer_side_and_cuts_more_on_the_right() -> None:
    image = noise(37, 22)  # 37 x 16 / 22 = 26.9
    resized = np.asarray(image.resize((27, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(ADMCenterCrop(image_size=16)(image, RNG)), resized[:, 5:21])
    tall = np.asarray(image.transpose(Image.Transpose.TRANSPOSE).resize((16, 27), Image.Resampling.BICUBIC))
    crop = ADMCenterCrop(image_size=16)(image.transpose(Image.Transpose.TRANSPOSE), RNG)
    assert np.array_equal(np.asarray(crop), tall[5:21])


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (256, 256), (100, 67)])
def test_adm_equals_the_center_crop_where_nothing_is_halved_and_sizes_agree(size: tuple[int, int]) -> None:
    image = noise(*size)
    adm, usual = (to_tensor(crop(image_size=256)(image, RNG)) for crop in (ADMCenterCrop, CenterCrop))
    assert torch.equal(adm, usual)


@pytest.mark.parametrize("transform", [RandomCrop(image_size=16), RandomResizedCrop(image_size=16)])
@pytest.mark.parametrize("size", [(40, 25), (25, 40), (16, 16), (5, 7)])
def test_random_crops_are_squares_drawn_from_the_generator(transform: Transform, size: tuple[int, int]) -> None:
    image = noise(*size)
    crop = to_tensor(transform(image, np.random.default_rng(1)))
    assert crop.shape == (3, 16, 16) and crop.dtype == torch.uint8
    assert torch.equal(crop, to_tensor(transform(image, np.random.default_rng(1))))
    if size[0] != size[1]:
        others = [to_tensor(transform(image, np.random.default_rng(seed))) for seed in range(8)]
        assert any(not torch.equal(crop, other) for other in others)


def test_random_crop_reaches_both_ends() -> None:
    ramp = Image.fromarray(np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    rng = np.random.default_rng(0)
    lefts = {int(to_tensor(RandomCrop(image_size=16)(ramp, rng))[0, 0, 0]) for _ in range(100)}
    assert lefts == {0, 1, 2, 3, 4}


def test_random_resized_crop_keeps_proportions_and_honours_scale() -> None:
    columns, rows = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=2).astype(np.uint8))
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(50):
        crop = to_tensor(RandomResizedCrop(scale=0.25, image_size=20)(image, rng)).float()
        across, down = crop[0, 0, -1] - crop[0, 0, 0], crop[1, -1, 0] - crop[1, 0, 0]
        assert abs(across - down) <= 2
        spans.append(float(across))
    assert 90 <= min(spans) < 125 and 175 < max(spans) <= 200
    with pytest.raises(ValueError, match=r"share of the area in \(0, 1\], got 0"):
        RandomResizedCrop(scale=0, image_size=20)


def pixel(path: Path) -> tuple[int, ...]:
    image = open_image(path)
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 25700, (100, 100, 100)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "image.png")
    assert pixel(tmp_path / "image.png") == expected


def test_palette_and_its_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert pixel(tmp_path / "opaque.png") == (10, 20, 30)
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = pixel(tmp_path / "red.jpg")
    assert red > 245 and green < 10 and blue < 10
