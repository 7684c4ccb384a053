from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from framework.data.transforms import (
    CenterCrop,
    ImageError,
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


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), upright)


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


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.webp").touch()
    reasons = {"cut.jpg": "truncated", "text.png": "cannot identify", "empty.webp": "cannot identify"}
    for name, reason in reasons.items():
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot be read as an image (")
        assert reason in str(caught.value)
    with pytest.raises(ImageError, match="No such file"):
        open_image(tmp_path / "gone.png")
