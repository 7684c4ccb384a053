from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from framework.evaluation.codecs import (
    CODECS,
    JPEG,
    JPEG_SCAN,
    WEBP,
    WEBP_FRAME,
    Codec,
    at_equal_size,
    codec_rate_distortion,
    compress,
)
from framework.evaluation.image_metrics import psnr, squared_error
from tests.evaluation.fakes import FixedImages
from tests.losses.extractor_files import photographs

each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.title)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return photographs(32, "astronaut", "chelsea", "coffee", "rocket")


def files_of(image: Tensor, codec: Codec) -> list[bytes]:
    """At every quality, the lowest first."""
    pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    files = []
    for quality in range(codec.qualities[0], 101):
        file = BytesIO()
        pixels.save(file, codec.format, quality=quality, **codec.options)
        files.append(file.getvalue())
    return files


def decoded(file: bytes) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(BytesIO(file)).convert("RGB")) / 255).permute(2, 0, 1).float()


@each_codec
@pytest.mark.parametrize("max_bytes", [130, 420, 900])
def test_the_largest_file_that_fits_is_decoded(codec: Codec, max_bytes: int, images: Tensor) -> None:
    found = compress(images, codec, max_bytes)
    for row, image in enumerate(images):
        files = files_of(image, codec)
        fitting = [file for file in files if codec.num_bytes(file) <= max_bytes]
        largest = max(map(codec.num_bytes, fitting), default=codec.num_bytes(files[0]))
        assert found.fits[row] == bool(fitting)
        # Where sizes fall from one quality to the next, the search may stop a little below.
        assert 0.95 * largest <= found.num_bytes[row] <= largest
        same_size = [file for file in files if codec.num_bytes(file) == found.num_bytes[row]]
        assert any(torch.equal(decoded(file), found.reconstructions[row]) for file in same_size)


@pytest.mark.parametrize("codec, least", [(JPEG, 290), (JPEG_SCAN, 20), (WEBP, 70), (WEBP_FRAME, 45)])
def test_what_cannot_fit_is_said_and_coded_at_the_lowest_quality(codec: Codec, least: int, images: Tensor) -> None:
    found = compress(images, codec, 8)
    assert not found.fits.any() and (found.num_bytes > least).all()
    lowest = [files_of(image, codec)[0] for image in images]
    assert found.num_bytes.tolist() == list(map(codec.num_bytes, lowest))
    torch.testing.assert_close(found.reconstructions, torch.stack(list(map(decoded, lowest))))
    with pytest.raises(ValueError, match="at least one byte"):
        compress(images, codec, 0)


def test_the_scan_is_what_stands_behind_all_segments(images: Tensor) -> None:
    first = files_of(images[0], JPEG_SCAN)[::11]
    for image in images:
        for file, other in zip(files_of(image, JPEG_SCAN)[::11], first, strict=True):
            at = 2
            while file[at : at + 2] != b"\xff\xda":
                assert file[at] == 0xFF
                at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
            at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
            assert file.endswith(b"\xff\xd9")
            assert JPEG_SCAN.num_bytes(file) == len(file[at:-2]) + 1
            assert other[:at] == file[:at]  # of any image at this quality, so a decoder can have it beforehand


def test_of_webp_files_only_the_frame_counts(images: Tensor) -> None:
    for file in files_of(images[0], WEBP_FRAME)[::11]:
        riff, chunk = (int.from_bytes(file[at : at + 4], "little") for at in (4, 16))
        assert len(file) == riff + 8 == 20 + chunk + chunk % 2
        assert file[23:26] == b"\x9d\x01\x2a"  # the start code, behind the three bytes of the frame's tag
        assert WEBP_FRAME.num_bytes(file) == chunk - 7


def test_more_bytes_bring_better_images(images: Tensor) -> None:
    for codec in CODECS:
        curve = codec_rate_distortion(codec, FixedImages(images, list("abcd")), [400, 800, 1600], batch_size=3)
        errors = curve.errors.mean(0)
        assert errors[0] > errors[1] > errors[2]
        assert (curve.distances["bytes"] <= torch.tensor([400, 800, 1600])).all()
        assert curve.distances["fitting"].all()
        assert curve.protocol["codec"] == codec.title and curve.protocol["counted"] == codec.counted


@each_codec
def test_numbers_do_not_depend_on_batches(codec: Codec, images: Tensor) -> None:
    data = FixedImages(images, list("abcd"))
    one, three = (codec_rate_distortion(codec, data, [200], batch_size=size) for size in (1, 3))
    assert torch.equal(one.errors, three.errors)


def test_a_tokenizers_bits_become_whole_bytes_and_misfits_are_told(images: Tensor) -> None:
    data = FixedImages(images, list("abcd"))
    found = at_equal_size(data, {1: 12.0, 2: 16.0, 400: 4792.5}, codecs=[JPEG], limit=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    first, second, last = found["JPEG"]["per_length"]
    assert [row["length"] for row in (first, second, last)] == [1, 2, 400]
    assert [row["max_bytes"] for row in (first, second, last)] == [2, 2, 600]
    assert [row["bits"] for row in (first, second, last)] == [12.0, 16.0, 4792.5]
    assert found["JPEG"]["protocol"]["images"] == 3
    assert first["fitting"] == 0 and first["bytes"] > 200 and "100% of the images take more bytes" in first["note"]
    assert last["fitting"] == 1 and 500 < last["bytes"] <= 600 and last["note"] is None
    kept = [int(key.rpartition("@")[2].partition(",")[0]) for key in curve_keys(data)]
    expected = compress(images[kept], JPEG, 600)
    errors = squared_error(images[kept], expected.reconstructions).double()
    assert last["mse"] == pytest.approx(errors.mean().item())
    assert last["psnr"] == pytest.approx(psnr(errors).mean().item())


def curve_keys(data: FixedImages) -> tuple[str, ...]:
    return codec_rate_distortion(JPEG, data, [600], limit=3).keys
