"""Shards hold the pictures of the folder they came from, by number; what is damaged is named."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.data.folder import ImageFolder
from framework.data.interface import TooManyBroken
from framework.data.shard_index import Index, Members
from framework.data.shards import Shards
from framework.data.stream import Sequential, Stream

from .conftest import MakeImages
from .make_shards import shards, written

NAMES = [f"{'cat' if number % 2 else 'dog'}/{number}.{'png' if number % 3 else 'jpg'}" for number in range(14)]


@pytest.fixture
def images(make_images: MakeImages) -> Path:
    return make_images(*(f"images/{name}" for name in NAMES)) / "images"


@pytest.fixture
def root(images: Path, tmp_path: Path) -> Path:
    written(images, tmp_path / "shards")
    return tmp_path / "shards"


def members(root: Path, shard: str) -> Members:
    return Members.parse((root / f"{shard}.members.json").read_bytes())


# The same images as from the folder


@pytest.mark.parametrize("training", [True, False])
def test_images_are_those_of_the_folder_in_the_same_order(
    images: Path, root: Path, tmp_path: Path, training: bool
) -> None:
    data = shards(root, training)
    assert len(data) == 14 and data.classes == ["cat", "dog"]
    paths = {path.rpartition(".")[0]: path for path in NAMES}
    ordered = [paths[data.key(index).partition("/")[2]] for index in range(14)]
    lines = (f"{path} {int(path.startswith('dog'))}\n" for path in ordered)
    (tmp_path / "list").write_text("".join(lines))
    folder = ImageFolder(
        str(images), files=str(tmp_path / "list"), image_size=16, training=training, seed=0
    )  # since what is random depends on an image's number
    for epoch in (0, 3):
        for way in ("read", "fetch"):
            ours, theirs = (getattr(each, way)(range(14), epoch) for each in (data, folder))
            assert ours.images.dtype == theirs.images.dtype and torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels) and not ours.broken
    assert ours.images.dtype == torch.float32 and theirs.keys == ordered


def test_keys_are_the_shard_and_the_name_without_reading_images(root: Path) -> None:
    data = shards(root)
    keys = [data.key(index) for index in range(14)]
    assert sorted(key.partition("/")[2] for key in keys) == sorted(name.rpartition(".")[0] for name in NAMES)
    assert [key.partition("/")[0] for key in keys] == ["00000"] * 4 + ["00001"] * 4 + ["00002"] * 4 + ["00003"] * 2
    assert data.fetch(range(14), 0).keys == data.fetch(range(14), 0).groups == keys
    assert [data.index_of(key) for key in keys] == list(range(14))
    assert data.whole(keys[5]).shape == (3, 20, 24)
    for tar in root.glob("*.tar"):
        tar.write_bytes(b"")
    assert [data.key(index) for index in range(14)] == keys


def test_the_protocol_names_the_index_and_the_changes(images: Path, root: Path, tmp_path: Path) -> None:
    protocol = shards(root).protocol()
    assert protocol["source"] == str(root) and protocol["split"] == "shards" and protocol["count"] == 14
    assert protocol["images"] == "original files" and json.loads(json.dumps(protocol)) == protocol
    written(images, tmp_path / "small", resize=18)
    small = shards(tmp_path / "small").protocol()
    assert small["index"] != protocol["index"] and "shorter side to at most 18" in str(small["images"])


def test_a_flat_folder_has_no_labels(make_images: MakeImages, tmp_path: Path) -> None:
    written(make_images("flat/a.png", "flat/b.png") / "flat", tmp_path / "shards")
    batch = shards(tmp_path / "shards").fetch([0, 1], 0)
    assert batch.labels is None and sorted(batch.keys) == ["00000/a", "00000/b"]


# Order, ranks, workers, resuming


def many(counts: list[int], window: int) -> Shards:
    """Only the numbers of a set, for its order."""
    data = Shards.__new__(Shards)
    data.shards = list(Index.parse(_index(counts), "here").shards)
    data._ends, data.window = np.cumsum(counts), window
    return data


def _index(counts: list[int]) -> bytes:
    fields = {"bytes": 1, "sha256": "", "members_sha256": ""}
    lines = [{"name": f"{number}.tar", "samples": count, **fields} for number, count in enumerate(counts)]
    return json.dumps({"version": 1, "shards": lines, "classes": None, "images": "", "left_out": {}}).encode()


@pytest.mark.parametrize(("counts", "window"), [([7], 16), ([3, 1, 5], 16), ([50] * 40, 8), ([90, 1, 40, 200], 2)])
def test_every_image_once_an_epoch_in_an_order_of_seed_and_epoch(counts: list[int], window: int) -> None:
    data = many(counts, window)
    orders = {(seed, epoch): data.order(seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(sum(counts))) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == 4
    assert many(counts, window).order(1, 1).tolist() == orders[1, 1]


def test_few_shards_are_in_use_at_a_time_and_each_is_mixed_with_others() -> None:
    data = many([50] * 40, window=8)
    shard = data.order(0, 0) // 50
    used = [len(set(shard[start : start + 50])) for start in range(0, 2000, 50)]
    assert max(used) <= 9 and min(used) >= 6  # at the beginning and end of an epoch, too
    opened = [set(shard[start : start + 50]) for start in range(0, 2000, 50)]
    comes = sum(len(later - earlier) for earlier, later in zip(opened, opened[1:], strict=False))
    assert comes < 80  # and not 8 for each 50 images, as in a plain shuffle
    one_by_one = [many([50] * 40, window=1).order(0, epoch)[::50] // 50 for epoch in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in one_by_one)
    assert not np.array_equal(one_by_one[0], one_by_one[1])


def test_an_order_over_all_shards_is_a_plain_shuffle() -> None:
    data = many([10] * 10, window=10)
    places = np.array([np.argsort(data.order(0, epoch)) for epoch in range(400)])
    assert abs(places.mean(axis=0) - 49.5).max() < 7  # 4.8 standard deviations
    neighbours = np.array([abs(np.diff(data.order(0, epoch) // 10)) for epoch in range(400)])
    assert abs((neighbours == 0).mean() - 9 / 99) < 0.008  # of the same shard


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_shard_serves_three_ranks(images: Path, tmp_path: Path, num_workers: int) -> None:
    written(images, tmp_path / "one", images_per_shard=99)
    data = shards(tmp_path / "one", training=True)
    assert len(data.shards) == 1
    ranks = [Stream(data, 2, seed=0, rank=rank, world_size=3, num_workers=num_workers) for rank in range(3)]
    batches = [list(islice(rank, 14)) for rank in ranks]  # 84 samples: six epochs
    keys = [batches[n % 3][n // 6].keys[n // 3 % 2] for n in range(84)]
    for epoch in range(6):
        assert Counter(keys[14 * epoch : 14 * epoch + 14]) == Counter(data.key(index) for index in range(14))
    whole = [key for batch in islice(Stream(data, 6, seed=0), 14) for key in batch.keys]
    assert keys == whole


def test_resuming_continues_the_order(root: Path) -> None:
    data = shards(root, training=True, window=2)
    uninterrupted = list(islice(Stream(data, 4, seed=1), 10))
    keys = [key for batch in uninterrupted for key in batch.keys]
    assert keys[:28] == [data.key(index) for epoch in (0, 1) for index in data.order(1, epoch)]
    stream = Stream(data, 4, seed=1)
    head = list(islice(stream, 4))
    resumed = Stream(shards(root, training=True, window=2), 4, seed=1, num_workers=2)
    resumed.load_state_dict(stream.state_dict())
    for one, other in zip(uninterrupted, head + list(islice(resumed, 6)), strict=True):
        assert one.keys == other.keys and torch.equal(one.images, other.images)


def test_lists_of_members_are_kept_for_the_shards_in_use_only(images: Path, tmp_path: Path) -> None:
    written(images, tmp_path / "single", images_per_shard=1)
    data = shards(tmp_path / "single", window=2)
    keys = data.fetch(range(14), 0).keys
    assert len(data.shards) == 14 and len(data._known) == 5
    assert data.fetch(range(14), 0).keys == keys


def test_processes_share_no_position_in_a_file(root: Path) -> None:
    data = shards(root)
    expected = data.fetch(range(14), 0).images
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [pool.apply_async(data.fetch, ([index % 14], 0)) for index in range(56)]
        for index, job in enumerate(jobs):
            assert torch.equal(job.get().images[0], expected[index % 14])
    assert torch.equal(pickle.loads(pickle.dumps(data)).fetch(range(14), 0).images, expected)


# Damage


def test_a_shard_that_is_cut_off_loses_what_is_behind_the_cut(root: Path) -> None:
    third = members(root, "00001").images[2]
    content = (root / "00001.tar").read_bytes()
    (root / "00001.tar").write_bytes(content[: third.offset + third.size - 1])
    data = shards(root, max_broken=0.2)
    batch = data.fetch(range(14), 0)
    lost = [data.key(6), data.key(7)]
    assert list(batch.broken) == lost and len(batch.keys) == 12
    size = third.offset + third.size - 1
    assert set(batch.broken.values()) == {f"00001.tar is cut off at byte {size}, before the image's end"}
    stream = Stream(data, 7, seed=0, num_workers=2)
    came = [key for each in islice(stream, 4) for key in each.keys]
    assert len(came) == 28 and set(stream.broken) == set(lost) and not set(came) & set(lost)
    with pytest.raises(TooManyBroken, match="1 of 14 images cannot be read, 7.14%, and max_broken allows 1.00%"):
        list(Sequential(shards(root), 1))


def test_a_member_that_is_no_image_and_one_that_is_not_there(root: Path) -> None:
    first, second, third, *_ = members(root, "00002").images
    content = bytearray((root / "00002.tar").read_bytes())
    content[first.offset : first.offset + first.size] = bytes(first.size)
    content[second.offset - 512 : second.offset] = bytes(512)
    other = tarfile.TarInfo("other.png")
    other.size = third.size + 1
    content[third.offset - 512 : third.offset] = other.tobuf(tarfile.USTAR_FORMAT)
    (root / "00002.tar").write_bytes(content)
    data = shards(root)
    broken = data.fetch(range(14), 0).broken
    assert list(broken) == [data.key(8), data.key(9), data.key(10)]
    assert broken[data.key(8)].startswith("no image in a format that is read: JPEG, PNG")
    for index, member in ((9, second), (10, third)):
        assert broken[data.key(index)] == (
            "00002.tar is damaged or not the shard of the index: "
            f"no image of {member.size} bytes at byte {member.offset}"
        )


def test_shards_that_do_not_fit_the_index_are_named(root: Path) -> None:
    (root / "00001.tar").unlink()
    (root / "00003.tar").write_bytes((root / "00003.tar").read_bytes() + bytes(512))
    size = (root / "00003.tar").stat().st_size
    with pytest.raises(ValueError) as caught:
        shards(root)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"Shards: 2 of 4 shards do not fit {root}/index.json, first:"
    assert lines[1:3] == ["  00001.tar is missing", f"  00003.tar has {size} bytes instead of {size - 512}"]
    assert "--index DIR" in lines[3]


def test_a_shard_that_vanishes_later_is_named(root: Path) -> None:
    data = shards(root)
    (root / "00003.tar").unlink()
    assert data.fetch([12], 0).broken == {data.key(12): "00003.tar: No such file or directory"}


def test_a_list_of_members_of_another_index_is_refused(root: Path) -> None:
    (root / "00000.members.json").write_bytes((root / "00001.members.json").read_bytes())
    with pytest.raises(ValueError, match=r"00000.members.json is not what the index was made with"):
        shards(root).fetch([0], 0)


def test_what_is_no_set_of_shards(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"there is no index.json in {tmp_path}/nowhere. python tools/make_sh"):
        shards(tmp_path / "nowhere")
    index = json.loads((root / "index.json").read_text())
    for content, words in {
        "": "no index of shards (JSONDecodeError",
        "[]": "no index of shards (TypeError",
        json.dumps({"version": 1}): "no index of shards (KeyError: 'shards')",
        json.dumps({**index, "version": 2}): "has version 2, and this code reads 1: make it anew",
        json.dumps({**index, "shards": []}): f"there are no images in {root}",
    }.items():
        (root / "index.json").write_text(content)
        with pytest.raises(ValueError) as caught:
            shards(root)
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="window is a number of shards, at least 1; got 0"):
        shards(root, window=0)
