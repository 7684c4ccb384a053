"""What each kind of image file becomes: compared pixel by pixel with what was put in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framework.data.listing import list_images
from framework.data.transforms import open_image
from tests.data.pictures import Pixels, gradient, picture, png

RGB = gradient()
GREY = RGB[..., 0]
ALPHA = np.tile(np.array([0, 51, 102, 255], np.uint8), (32, 12))


def over_white(pixels: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return (pixels * share + 255 * (1 - share)).round().astype(np.uint8)


def grey(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, axis=2)


def few_colours() -> Image.Image:
    return picture().quantize(16)


FEW = np.asarray(few_colours().convert("RGB"))


def with_alpha(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, ALPHA]))


def other() -> Image.Image:
    return Image.fromarray(255 - RGB)


def saved(image: Callable[[], Image.Image], **options: Any) -> Callable[[Path], object]:
    return lambda path: image().save(path, **options)


def written(content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content())


def colour_3_white() -> Pixels:
    clear = np.asarray(few_colours())[..., None] == 3
    assert 0 < clear.mean() < 0.5
    return np.where(clear, np.uint8(255), FEW)


JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}
# name -> how it is written, what it shows, the largest difference in levels
FILES: dict[str, tuple[Callable[[Path], object], Pixels, int]] = {
    "baseline.jpg": (saved(picture, **JPEG), RGB, 6),
    "progressive.JPEG": (saved(picture, progressive=True, **JPEG), RGB, 6),
    "grey.jpeg": (saved(lambda: Image.fromarray(GREY), quality=95), grey(GREY), 6),
    "cmyk.jpg": (saved(lambda: picture().convert("CMYK"), **JPEG), RGB, 8),
    "camera.jfif": (saved(picture, format="JPEG", **JPEG), RGB, 6),
    "two_pictures.jpg": (saved(picture, format="MPO", save_all=True, append_images=[other()], **JPEG), RGB, 6),
    "really_a_png.jpg": (saved(picture, format="PNG"), RGB, 0),
    "really_a_jpeg.png": (saved(picture, format="JPEG", **JPEG), RGB, 6),
    "colour.PNG": (saved(picture), RGB, 0),
    "grey.png": (saved(lambda: Image.fromarray(GREY)), grey(GREY), 0),
    "palette.png": (saved(few_colours), FEW, 0),
    "palette_transparent.png": (saved(few_colours, transparency=3), colour_3_white(), 0),
    "alpha.png": (saved(lambda: with_alpha(RGB)), over_white(RGB, ALPHA), 1),
    "grey_alpha.png": (saved(lambda: with_alpha(GREY)), over_white(grey(GREY), ALPHA), 1),
    "sixteen_bit_grey.png": (saved(lambda: Image.fromarray(GREY.astype(np.uint16) * 257)), grey(GREY), 0),
    "sixteen_bit_colour.png": (written(lambda: png(RGB.astype(np.uint16) * 256 + 77)), RGB, 0),
    "interlaced.png": (written(lambda: png(RGB, interlaced=True)), RGB, 0),
    "one_bit.png": (saved(lambda: Image.fromarray(GREY > 99)), grey(((GREY > 99) * 255).astype(np.uint8)), 0),
    "colour.webp": (saved(picture, lossless=True), RGB, 0),
    "alpha.webp": (saved(lambda: with_alpha(RGB), lossless=True, exact=True), over_white(RGB, ALPHA), 1),
    "animated.webp": (saved(picture, lossless=True, save_all=True, append_images=[other()]), RGB, 0),
    "animated.gif": (saved(few_colours, save_all=True, append_images=[other()]), FEW, 0),
    "colour.bmp": (saved(picture), RGB, 0),
    "colour.ppm": (saved(picture), RGB, 0),
    "grey.pgm": (saved(lambda: Image.fromarray(GREY)), grey(GREY), 0),
    "colour.tif": (saved(picture), RGB, 0),
    "sixteen_bit_grey.TIFF": (saved(lambda: Image.fromarray(GREY.astype(np.uint16) * 257)), grey(GREY), 0),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_becomes(name: str, tmp_path: Path) -> None:
    write, expected, tolerance = FILES[name]
    write(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB" and list_images(tmp_path).images == [name]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance


def test_the_files_are_what_they_are_called(tmp_path: Path) -> None:
    expected = {
        "progressive.JPEG": ("JPEG", "RGB"),
        "cmyk.jpg": ("JPEG", "CMYK"),
        "two_pictures.jpg": ("MPO", "RGB"),
        "palette_transparent.png": ("PNG", "P"),
        "one_bit.png": ("PNG", "1"),
        "sixteen_bit_grey.png": ("PNG", "I;16"),
        "animated.webp": ("WEBP", "RGB"),
    }
    for name, kind in expected.items():
        FILES[name][0](tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.mode) == kind
            assert getattr(image, "n_frames", 1) == (2 if name.startswith(("animated", "two")) else 1)
            assert not name.startswith("progressive") or image.info["progressive"]


# How an upright picture lies in the file for each value of the EXIF tag.
LYING: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize(("suffix", "tolerance"), [("jpg", 6), ("png", 0), ("webp", 0)])
@pytest.mark.parametrize("orientation", LYING)
def test_exif_orientation(orientation: int, suffix: str, tolerance: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else JPEG
    lying = Image.fromarray(np.ascontiguousarray(LYING[orientation](RGB)))
    lying.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    pixels = np.asarray(open_image(tmp_path / f"turned.{suffix}"))
    assert pixels.shape == RGB.shape and np.abs(pixels.astype(int) - RGB).max() <= tolerance


def test_damaged_exif_leaves_the_picture_as_it_lies(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    picture().save(tmp_path / "image.webp", lossless=True, exif=b"Exif\0\0XX\0*\0\0\0\x08")
    assert np.array_equal(np.asarray(open_image(tmp_path / "image.webp")), RGB)
    assert not recwarn.list
