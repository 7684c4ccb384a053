"""An endless stream of training batches whose position is one number."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from framework.data.interface import Batch, ImageData
from framework.runtime.hashing import uniforms


class Stream(Iterator[Batch]):
    """Every image once per epoch, in an order drawn anew for each, for ever.

    Sample i of the stream is place ``i % n`` of the order of epoch ``i // n``, and the order depends on (seed, epoch)
    alone. A batch may therefore reach over an epoch's end, and a data set may be smaller than a batch. Of each global
    batch of ``batch_size * world_size`` samples, rank r takes rows ``r::world_size``.

    Args:
        data: the images; n is their number.
        batch_size: samples that one rank gets at a time.
        seed: of the order.
        rank: which of the ``world_size`` processes this is.
        world_size: how many processes share the stream.
        num_workers: processes that fetch ahead; 0 fetches in this one. Batches are the same bit for bit.

    Raises:
        ValueError: if ``data`` is empty.
    """

    def __init__(
        self, data: ImageData, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> None:
        if len(data) == 0:
            raise ValueError("Stream: the data set is empty")
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.samples_seen = 0  # of all ranks, in batches handed out; what workers fetched ahead does not count
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self.samples_seen += self.batch_size * self.world_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position, and the number of images that gives it its meaning."""
        return {"samples_seen": self.samples_seen, "num_images": len(self.data)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a saved position; workers start afresh.

        Raises:
            ValueError: if the data set has another number of images than when the position was saved.
        """
        if state["num_images"] != len(self.data):
            raise ValueError(
                f"the position was saved with {state['num_images']} images, but the data set now has {len(self.data)}. "
                "Restore the data as it was, or start a new run"
            )
        self.samples_seen = state["samples_seen"]
        self._batches = None

    def _start(self) -> Iterator[Batch]:
        fetcher = _Fetcher(self.data)
        step = self.batch_size * self.world_size
        plan = _plan(len(self.data), self.seed, self.samples_seen, step, self.rank, self.world_size)
        if self.num_workers == 0:
            return map(fetcher.__getitems__, plan)
        loader = DataLoader(
            fetcher,
            batch_sampler=plan,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # or the loader would draw its workers' seed from the global generator
        )
        return iter(loader)


def subset(num_images: int, limit: int | None) -> list[int]:
    """Which images an evaluation of at most ``limit`` reads, in order: always the same random ones.

    The first images of a folder may all be of one class, and evenly spaced ones may all be of one photograph.
    """
    if limit is None or limit >= num_images:
        return list(range(num_images))
    return sorted(np.argsort(uniforms(0, "subset", 0, range(num_images)), kind="stable")[:limit].tolist())


def sequential(data: ImageData, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The images of ``subset`` once, in order, for evaluation; the last batch may be smaller."""
    indices = subset(len(data), limit)
    for start in range(0, len(indices), batch_size):
        yield data.fetch(indices[start : start + batch_size], epoch=0)


def _plan(
    num_images: int, seed: int, start: int, step: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """One rank's batches from global sample ``start`` on, as (epoch, index) pairs.

    A function, not a method: a generator that held its stream would be a cycle, and workers that are left to the
    cycle collector do not hear that they should stop.
    """
    order_epoch, order = -1, np.empty(0, dtype=np.int64)
    while True:
        batch = []
        for sample in range(start + rank, start + step, world_size):
            epoch, place = divmod(sample, num_images)
            if epoch != order_epoch:
                order_epoch = epoch
                order = np.argsort(uniforms(seed, "order", epoch, range(num_images)), kind="stable")
            batch.append((epoch, int(order[place])))
        yield batch
        start += step


class _Fetcher(Dataset[Batch]):
    """Fetches a batch of (epoch, index) pairs at once, in this process or in a worker."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Batch:
        parts = [
            self.data.fetch([index for _, index in part], epoch) for epoch, part in groupby(pairs, itemgetter(0))
        ]
        return parts[0] if len(parts) == 1 else _concatenate(parts)


def _concatenate(parts: list[Batch]) -> Batch:
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(
        torch.cat([part.images for part in parts]),
        [key for part in parts for key in part.keys],
        [group for part in parts for group in part.groups],
        torch.cat(labels) if labels else None,
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
