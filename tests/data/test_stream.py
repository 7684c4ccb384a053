from __future__ import annotations

import multiprocessing
import traceback
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from framework.data.folder import ImageFolder
from framework.data.interface import Batch, ImageData
from framework.data.photos import Photos
from framework.data.stream import Sequential, Stream, subset

from .conftest import MakeImages


class Numbered(ImageData):
    """Image i in epoch e is constant i / n in channel 0 and e / 100 in channel 1."""

    image_size = 2

    def __init__(self, count: int, labelled: bool = False) -> None:
        self.count = count
        self.labelled = labelled

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        images = torch.zeros(len(indices), 3, 2, 2)
        images[:, 0] = torch.tensor(indices)[:, None, None] / self.count
        images[:, 1] = epoch / 100
        names = [str(index) for index in indices]
        return Batch(images, names, names, torch.tensor(indices) if self.labelled else None)

    def whole(self, group: str) -> Tensor:
        raise NotImplementedError

    def protocol(self) -> dict[str, object]:
        return {}


def take(stream: Stream, count: int) -> list[Batch]:
    return list(islice(stream, count))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images) and one.keys == other.keys and one.groups == other.groups
        assert (one.labels is None) == (other.labels is None)
        if one.labels is not None and other.labels is not None:
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (3, 8)])
def test_every_image_once_per_epoch(count: int, batch_size: int) -> None:
    batches = take(Stream(Numbered(count, labelled=True), batch_size, seed=0), 3 * count)
    assert all(len(batch.images) == len(batch.keys) == batch_size for batch in batches)
    keys = [key for batch in batches for key in batch.keys]
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    orders = set()
    for epoch in range(len(keys) // count):
        rows = slice(epoch * count, (epoch + 1) * count)
        assert Counter(keys[rows]) == Counter(str(index) for index in range(count))
        assert torch.allclose(images[rows, 1], torch.tensor(epoch / 100))
        orders.add(tuple(keys[rows]))
    assert [int(key) for key in keys] == labels.tolist()
    assert torch.allclose(images[:, 0, 0, 0], labels / count)
    assert len(orders) > 1


def test_the_seed_sets_the_order() -> None:
    first, again, other = (take(Stream(Numbered(20), 10, seed), 2) for seed in (0, 0, 1))
    assert_equal(first, again)
    assert first[0].keys != other[0].keys


def test_ranks_share_the_global_batch() -> None:
    whole = take(Stream(Numbered(10), batch_size=6, seed=0), 5)
    ranks = [take(Stream(Numbered(10), 2, 0, rank=rank, world_size=3), 5) for rank in range(3)]
    for step, batch in enumerate(whole):
        for rank in range(3):
            assert ranks[rank][step].keys == batch.keys[rank::3]
            assert torch.equal(ranks[rank][step].images, batch.images[rank::3])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_within_an_epoch_and_over_its_end(num_workers: int) -> None:
    data = Photos("validation", 20, image_size=8, training=True, seed=0)
    uninterrupted = take(Stream(data, 6, seed=0), 14)
    stream = Stream(data, 6, seed=0, num_workers=num_workers)
    assert_equal(take(stream, 2), uninterrupted[:2])
    middle = stream.state_dict()
    assert middle == {"samples_seen": 12, "num_images": 20, "broken": {}}  # not what the workers fetched ahead
    assert_equal(take(stream, 4), uninterrupted[2:6])
    late = stream.state_dict()

    resumed = Stream(data, 6, seed=0, num_workers=num_workers)
    resumed.load_state_dict(middle)
    assert_equal(take(resumed, 8), uninterrupted[2:10])
    resumed.load_state_dict(late)  # a stream that already runs can be moved, too
    assert_equal(take(resumed, 8), uninterrupted[6:14])


def test_workers_fetch_the_same_files_and_labels(make_images: MakeImages) -> None:
    root = make_images("cat/a.png", "cat/b.png", "dog/c.png")
    data = ImageFolder(str(root), image_size=8, training=True, seed=0)
    state = torch.random.get_rng_state()
    assert_equal(take(Stream(data, 4, seed=0, num_workers=2), 3), take(Stream(data, 4, seed=0), 3))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator was left alone


def test_dropping_the_stream_ends_its_workers_at_once() -> None:
    before = set(multiprocessing.active_children())
    stream = Stream(Numbered(10), 4, seed=0, num_workers=2)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    del stream  # without waiting for the cycle collector
    assert not workers & set(multiprocessing.active_children())
    assert all(worker.exitcode == 0 for worker in workers)  # asked to stop, not killed


class Failing(Numbered):
    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        raise LookupError("something else than a broken image")


def test_an_error_in_a_worker_keeps_its_kind_and_words() -> None:
    with pytest.raises(LookupError, match="something else than a broken image") as caught:
        next(Stream(Failing(4), 2, seed=0, num_workers=1))
    traceback.clear_frames(caught.tb)  # or the traceback keeps the worker until a later test


def test_another_size_of_data_is_refused_on_resume() -> None:
    state = Stream(Numbered(10), 4, seed=0).state_dict()
    with pytest.raises(ValueError) as caught:
        Stream(Numbered(11), 4, seed=0).load_state_dict(state)
    assert str(caught.value) == (
        "the position was saved with 10 images, but the data set now has 11. "
        "Restore the data as it was, or start a new run"
    )


def test_empty_data_is_refused() -> None:
    with pytest.raises(ValueError, match="Stream: the data set is empty"):
        Stream(Numbered(0), 4, seed=0)


@pytest.mark.parametrize(("limit", "sizes"), [(None, [4, 4, 2]), (6, [4, 2]), (99, [4, 4, 2])])
def test_sequential_is_a_subset_in_order(limit: int | None, sizes: list[int]) -> None:
    batches = list(Sequential(Numbered(10), 4, limit))
    assert [len(batch.images) for batch in batches] == sizes
    assert [int(key) for batch in batches for key in batch.keys] == subset(10, limit)


def test_a_subset_is_spread_over_everything_and_always_the_same() -> None:
    assert subset(10, None) == subset(10, 10) == list(range(10))
    chosen = subset(10_000, 1_000)
    assert chosen == sorted(set(chosen)) and len(chosen) == 1_000 and chosen == subset(10_000, 1_000)
    assert set(subset(10_000, 100)) < set(chosen)
    for part in range(3):  # of every class of a sorted folder, of every photograph of interleaved crops
        assert 250 < sum(index // 3_334 == part for index in chosen) < 420
        assert 250 < sum(index % 3 == part for index in chosen) < 420
