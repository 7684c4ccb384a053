"""What holds for every registered data set; a newcomer needs an entry in ``BUILD`` and is tested for free."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from framework.data.digits import Digits, DigitScenes
from framework.data.fashion_mnist import FashionMNIST
from framework.data.folder import ImageFolder
from framework.data.interface import DATA, Batch, ImageData, in_unit_range
from framework.data.photos import Photos
from framework.data.shard_index import Members
from framework.data.shards import Shards
from framework.data.stream import Stream
from tests.data.fashion_files import write_fashion
from tests.data.make_shards import written
from tests.data.pictures import picture


def image_folder(root: Path, training: bool, seed: int) -> ImageFolder:
    for number in range(12):
        path = root / f"class{number % 3}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        picture().rotate(25 * number, expand=True).save(path)
    (root / "class1/4.png").write_text("no image")
    return ImageFolder(str(root), max_broken=0.2, image_size=16, training=training, seed=seed)


def shards(root: Path, training: bool, seed: int) -> Shards:
    for number in range(12):
        path = root / f"images/class{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().rotate(25 * number, expand=True).save(path)
    written(root / "images", root / "shards", images_per_shard=5)
    shard = root / "shards/00001.tar"
    image = Members.parse((root / "shards/00001.members.json").read_bytes()).images[1]
    content = bytearray(shard.read_bytes())
    content[image.offset : image.offset + 9] = b"no image."
    shard.write_bytes(content)
    return Shards(str(root / "shards"), max_broken=0.2, image_size=16, training=training, seed=seed)


def fashion_mnist(root: Path, training: bool, seed: int) -> FashionMNIST:
    return FashionMNIST("train", str(write_fashion(root)), image_size=16, training=training, seed=seed)


BUILD: dict[str, Callable[[Path, bool, int], ImageData]] = {
    "DigitScenes": lambda root, training, seed: DigitScenes("test", 12, image_size=16, training=training, seed=seed),
    "Digits": lambda root, training, seed: Digits("test", 12, image_size=16, training=training, seed=seed),
    "FashionMNIST": fashion_mnist,
    "ImageFolder": image_folder,
    "Photos": lambda root, training, seed: Photos("validation", 12, image_size=16, training=training, seed=seed),
    "Shards": shards,
}
NAMES = [name for name, _ in DATA]
NOT_AUGMENTED = {"DigitScenes", "Digits"}  # their renderings are all the variation there is


def rows(batch: Batch) -> list[tuple[str, str, int | None, str | None, bytes]]:
    """Everything there is on each image."""
    labels = [None] * len(batch.keys) if batch.labels is None else batch.labels.tolist()
    kinds = [None] * len(batch.keys) if batch.kinds is None else batch.kinds
    pixels = [image.numpy().tobytes() for image in batch.images]
    return list(zip(batch.keys, batch.groups, labels, kinds, pixels, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_what_it_is_fetched_with(name: str, training: bool, tmp_path: Path) -> None:
    data = BUILD[name](tmp_path, training, 0)
    order = [7, 3, 3, 11, 0, 4, 9, 5]
    together = rows(data.fetch(order, epoch=2))
    assert together == [row for index in order for row in rows(data.fetch([index], epoch=2))]
    assert together == rows(data.fetch(order[:3], epoch=2)) + rows(data.fetch(order[3:], epoch=2))
    assert together == rows(pickle.loads(pickle.dumps(data)).fetch(order, epoch=2))
    later = rows(data.fetch(order, epoch=3))
    assert (later == together) != (training and name not in NOT_AUGMENTED)
    assert together == rows(in_unit_range(data.read(order, epoch=2)))


@pytest.mark.parametrize("name", NAMES)
def test_only_training_depends_on_the_seed(name: str, tmp_path: Path) -> None:
    for training in (True, False):
        one, other = (rows(BUILD[name](tmp_path, training, seed).fetch(range(12), epoch=1)) for seed in (0, 1))
        assert (one == other) != (training and name not in NOT_AUGMENTED)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_what_it_says(name: str, tmp_path: Path) -> None:
    data = BUILD[name](tmp_path, True, 0)
    assert len(data) == 12 and 0 <= data.max_broken < 1
    batch = data.fetch(range(12), epoch=0)
    count = 12 - len(batch.broken)
    assert batch.images.shape == (count, 3, data.image_size, data.image_size)
    assert batch.images.dtype == torch.float32 and 0 <= batch.images.min() and 0.5 < batch.images.max() <= 1
    assert len(batch.keys) == len(batch.groups) == count
    assert batch.labels is None or (batch.labels.shape == (count,) and batch.labels.dtype == torch.int64)
    names = [data.key(index) for index in range(12)]
    assert names == [ImageData.key(data, index) for index in range(12)] and len(set(names)) == 12
    assert batch.keys == [key for key in names if key not in batch.broken]
    assert len(batch.broken) <= data.max_broken * len(data)
    for group in batch.groups[:2]:
        whole = data.whole(group)
        assert whole.shape[0] == 3 and whole.dtype == torch.float32 and 0 <= whole.min() <= whole.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_workers_change_nothing(name: str, tmp_path: Path) -> None:
    data = BUILD[name](tmp_path, True, 0)
    here, there = (list(islice(Stream(data, 5, seed=3, num_workers=n), 6)) for n in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert rows(one) == rows(other) and one.broken == other.broken and len(one.images) == 5
        assert one.images.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_says_what_a_metric_needs(name: str, tmp_path: Path) -> None:
    protocol = BUILD[name](tmp_path, False, 0).protocol()
    assert {"source", "split", "count", "crop", "augmentation", "range"} <= set(protocol)
    assert json.loads(json.dumps(protocol)) == protocol and "bicubic" in str(protocol)
