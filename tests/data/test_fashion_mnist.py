from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framework.data import fashion_mnist
from framework.data.fashion_mnist import CLASSES, FILES, FashionMNIST, read_idx
from tests.data.fashion_files import pictures, write_fashion, write_idx

IMAGES, LABELS = FILES[2:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fashion(tmp_path_factory.mktemp("fashion"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the two files of the test split, to be damaged."""
    write_idx(tmp_path / IMAGES, pictures(15, 1))
    write_idx(tmp_path / LABELS, (np.arange(15) % 10).astype(np.uint8))
    return tmp_path


def clothes(root: Path, split: Any = "test", **given: Any) -> FashionMNIST:
    return FashionMNIST(split, str(root), **{"image_size": 28, "training": False, "seed": 0, **given})


def test_the_splits_are_the_first_the_last_5000_and_the_other_file(root: Path) -> None:
    train, validation, test = (clothes(root, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (12, 5000, 15)
    assert np.array_equal(train.images, pictures(12, 0)) and np.array_equal(test.images, pictures(15, 1))
    assert np.array_equal(validation.images[:8], pictures(20, 0)[12:])
    assert validation.labels[0] == 2  # the thirteenth
    assert clothes(root, "test", num_images=4).keys == test.keys[:4]


def test_labels_kinds_and_names(root: Path) -> None:
    batch = clothes(root).fetch([1, 14], epoch=0)
    assert batch.labels is not None and batch.labels.tolist() == [1, 4]
    assert batch.kinds == ["Trouser", "Coat"] == [CLASSES[1], CLASSES[4]]
    assert batch.keys == batch.groups == ["test 00001", "test 00014"]
    assert np.allclose(batch.images[0, 2], pictures(15, 1)[1] / 255)


def test_32_pads_and_other_sizes_resize_as_pillow_does(root: Path) -> None:
    padded, plain = clothes(root, image_size=32).images, pictures(15, 1)
    assert np.array_equal(padded[:, 2:-2, 2:-2], plain) and padded.sum() == plain.sum()
    for size in (16, 64):
        resized = clothes(root, image_size=size).images.numpy().astype(int)
        for image, got in zip(plain, resized, strict=True):
            expected = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
            assert np.abs(got - np.asarray(expected)).max() <= 2  # torch and Pillow round between the two passes


def test_flips_only_in_training(root: Path) -> None:
    plain = clothes(root, flip=1.0).fetch(range(15), epoch=0).images
    assert torch.equal(clothes(root, training=True, flip=1.0).fetch(range(15), epoch=0).images, plain.flip(-1))
    half = clothes(root, training=True).fetch([0] * 5 + list(range(15)), epoch=0).images[5:]
    assert 3 <= (half == plain).flatten(1).all(1).sum() <= 12


def test_a_sheet_begins_with_the_image_of_the_group(root: Path) -> None:
    data = clothes(root, image_size=32)
    sheet = data.whole("test 00007")
    assert sheet.shape == (3, 256, 256)
    assert torch.equal(sheet[:, :32, :32], data.fetch([7], epoch=0).images[0])
    assert torch.equal(sheet[:, 32:64, :32], data.fetch([0], epoch=0).images[0])  # the 16th, of 15 in a circle


def test_missing_files_are_named_with_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        clothes(tmp_path)
    assert str(caught.value) == (
        f"FashionMNIST: there is no file {tmp_path / IMAGES}. Install Debian's package (apt install "
        "dataset-fashion-mnist) and leave root null, or name with root a folder that holds train-images-idx3-ubyte.gz, "
        "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
    )
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match="there is no file .*debian/train-images"):
        FashionMNIST("train", image_size=28, training=False, seed=0)


def test_the_package_of_debian_is_read_without_a_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", root)
    assert len(FashionMNIST("test", image_size=28, training=False, seed=0)) == 15


@pytest.mark.parametrize("keep", [0, 1, 5, 12, 300, -1, -8])
def test_a_file_cut_anywhere_is_named(keep: int, small: Path) -> None:
    path = small / IMAGES
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{IMAGES}: (a damaged gzip|not an idx) file"):
        clothes(small)


@pytest.mark.parametrize("where", [0, 2, 10, 5000, -6])
def test_changed_bytes_are_noticed(where: int, small: Path) -> None:
    path = small / IMAGES
    content = bytearray(path.read_bytes())
    content[where] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{IMAGES}: a damaged gzip file"):
        clothes(small)


def test_a_file_of_something_else_is_refused(small: Path) -> None:
    (small / IMAGES).write_bytes((small / LABELS).read_bytes())
    with pytest.raises(ValueError, match="3 dimensions: it begins with 00 00 08 01, which should be 00 00 08 03"):
        clothes(small)
    (small / IMAGES).write_bytes(gzip.compress(bytes((0, 0, 8, 3, 0, 0))))
    with pytest.raises(ValueError, match="not an idx file"):
        clothes(small)


@pytest.mark.parametrize("sides", [(16, 28, 28), (14, 28, 28), (2**32 - 1,) * 3])
def test_a_header_that_promises_another_number_is_refused(sides: tuple[int, ...], tmp_path: Path) -> None:
    header = bytes((0, 0, 8, 3)) + np.array(sides, dtype=">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + bytes(15 * 28 * 28)))
    with pytest.raises(ValueError, match=f"11760 bytes follow a header that promises {sides[0]}x"):
        read_idx(tmp_path / "x.gz", 3)


@pytest.mark.parametrize(
    ("name", "content", "got"),
    [
        (LABELS, np.zeros(14, np.uint8), "15 images of 28x28, 14 labels up to 0"),
        (LABELS, np.full(15, 10, np.uint8), "15 labels up to 10"),
        (IMAGES, np.zeros((15, 32, 28), np.uint8), "15 images of 32x28"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    name: str, content: np.ndarray[Any, np.dtype[np.uint8]], got: str, small: Path
) -> None:
    write_idx(small / name, content)
    with pytest.raises(ValueError, match=got):
        clothes(small)


@pytest.mark.parametrize("num_images", [0, 16])
def test_more_images_than_there_are_and_none_are_refused(num_images: int, root: Path) -> None:
    with pytest.raises(ValueError, match=f"num_images must be from 1 to the 15 of test, got {num_images}"):
        clothes(root, num_images=num_images)
