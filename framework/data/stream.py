"""An endless stream of training batches whose position is one number."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from framework.data.interface import Batch, ImageData, TooManyBroken, in_unit_range
from framework.runtime.hashing import uniforms
from framework.tokens import Tokens


class Stream(Iterator[Batch]):
    """Every image once per epoch, in an order drawn anew for each, for ever.

    Sample i of the stream is place ``i % n`` of ``data.order`` of epoch ``i // n``, which depends on (seed, epoch)
    alone. A batch may therefore reach over an epoch's end, and a data set may be smaller than a batch. Of each global
    batch of ``batch_size * world_size`` samples, rank r takes rows ``r::world_size``.

    In place of a broken image comes another, drawn uniformly by hash from (seed, epoch, index of the broken one), so
    that no neighbour is favoured and a sample does not depend on its batch or on workers. ``broken`` collects what
    came: key and reason.

    Args:
        data: the images; n is their number.
        batch_size: samples that one rank gets at a time.
        seed: of the order.
        rank: which of the ``world_size`` processes this is.
        world_size: how many processes share the stream.
        num_workers: processes that fetch ahead; 0 fetches in this one. Batches are the same bit for bit.

    Raises:
        ValueError: if ``data`` is empty.
        TooManyBroken: on drawing a batch, if more than the share ``data.max_broken`` of the images is broken so far.
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
        self.broken: dict[str, str] = {}
        self.samples_seen = 0  # of all ranks, in batches handed out; what workers fetched ahead does not count
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = in_unit_range(next(self._batches))
        self.broken |= batch.broken
        refuse_too_many(self.data, self.broken, len(self.data))
        self.samples_seen += self.batch_size * self.world_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, the number of images that gives it its meaning, and the broken images met so far."""
        return {"samples_seen": self.samples_seen, "num_images": len(self.data), "broken": dict(self.broken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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
        self.broken = dict(state.get("broken", {}))
        self._batches = None

    def _start(self) -> Iterator[Batch]:
        fetcher = _Fetcher(self.data, self.seed)
        step = self.batch_size * self.world_size
        plan = _plan(self.data, self.seed, self.samples_seen, step, self.rank, self.world_size)
        if self.num_workers == 0:
            return map(fetcher.__getitems__, plan)
        loader = DataLoader(
            fetcher,
            batch_sampler=plan,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=ignore_signals,
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


class Sequential(Iterator[Batch]):
    """The images of ``subset`` once, in order, for evaluation; batches are smaller at the end and by broken images.

    Nothing comes in place of a broken image: ``broken`` collects key and reason of those left out so far. A batch of
    broken images only is not handed out.

    Raises:
        TooManyBroken: if more than the share ``data.max_broken`` of the images asked for is broken.
    """

    def __init__(self, data: ImageData, batch_size: int, limit: int | None = None) -> None:
        self.broken: dict[str, str] = {}
        self._data = data
        self._indices = subset(len(data), limit)
        self._starts = iter(range(0, len(self._indices), batch_size))
        self._batch_size = batch_size

    def __next__(self) -> Batch:
        while True:
            start = next(self._starts)
            batch = self._data.fetch(self._indices[start : start + self._batch_size], epoch=0)
            self.broken |= batch.broken
            refuse_too_many(self._data, self.broken, len(self._indices))
            if batch.keys:
                return batch

    def record(self) -> dict[str, object]:
        """For a protocol: how many images were left out so far, and the first of them with the reasons."""
        return {"broken": len(self.broken), "first_broken": dict(islice(self.broken.items(), 20))}


def refuse_too_many(data: ImageData, broken: Mapping[str, str], total: int) -> None:
    """Raise a ``TooManyBroken`` if more images of ``total`` are broken than the share that a data set may leave out."""
    if len(broken) <= data.max_broken * total:
        return
    first = "".join(f"\n  {key}: {reason}" for key, reason in islice(broken.items(), 5))
    raise TooManyBroken(
        f"{len(broken)} of {total} images cannot be read, {len(broken) / total:.2%}, and max_broken allows "
        f"{data.max_broken:.2%}. The first:{first}\n"
        "Repair, replace or remove them, or set max_broken of this data set higher; "
        "python tools/info.py data DIR finds all of them"
    )


def _plan(
    data: ImageData, seed: int, start: int, step: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """One rank's batches from global sample ``start`` on, as (epoch, index) pairs.

    A function, not a method: a generator that held its stream would be a cycle, and workers that are left to the
    cycle collector do not hear that they should stop.
    """
    num_images = len(data)
    order_epoch, order = -1, np.empty(0, dtype=np.int64)
    while True:
        batch = []
        for sample in range(start + rank, start + step, world_size):
            epoch, place = divmod(sample, num_images)
            if epoch != order_epoch:
                order_epoch = epoch
                order = data.order(seed, epoch)
            batch.append((epoch, int(order[place])))
        yield batch
        start += step


class _Fetcher(Dataset[Batch]):
    """Fetches a batch of (epoch, index) pairs at once, in this process or in a worker."""

    def __init__(self, data: ImageData, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.broken: dict[int, tuple[str, str]] = {}  # key and reason by index, so that none is tried twice here

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Batch:
        return _concatenate(
            [self._fetch(epoch, [index for _, index in part]) for epoch, part in groupby(pairs, itemgetter(0))]
        )

    def _fetch(self, epoch: int, indices: list[int]) -> Batch:
        """The images of one epoch at ``indices``, with others in place of broken ones; fewer if too many are broken."""
        parts: list[Batch] = []
        rows: list[int] = []  # of the whole batch, in the order in which the parts bring them
        missing = list(range(len(indices)))
        broken: dict[str, str] = {}
        for attempt in count():
            tried = {row: self._candidate(epoch, indices[row], attempt) for row in missing}
            parts.append(self._fetch_unless_known(epoch, list(tried.values())))
            rows += [row for row in missing if tried[row] not in self.broken]
            missing = [row for row in missing if tried[row] in self.broken]
            broken |= dict(self.broken[tried[row]] for row in missing)
            if not missing or len(self.broken) > self.data.max_broken * len(self.data):
                break
        batch = _concatenate(parts)
        return replace(batch.select(np.argsort(rows).tolist()), broken=broken) if broken else batch

    def _fetch_unless_known(self, epoch: int, indices: list[int]) -> Batch:
        """Those of the images that are not known to be broken; takes note of the ones that now turn out to be."""
        batch = self.data.read([index for index in indices if index not in self.broken], epoch)
        if batch.broken:
            keys = {index: self.data.key(index) for index in indices}
            self.broken |= {index: (key, batch.broken[key]) for index, key in keys.items() if key in batch.broken}
        return batch

    def _candidate(self, epoch: int, index: int, attempt: int) -> int:
        if attempt == 0:
            return index
        return int(uniforms(self.seed, f"substitute {attempt}", epoch, [index])[0] * len(self.data))


def _concatenate(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    targets = [part.target for part in parts if part.target is not None]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return Batch(
        torch.cat([part.images for part in parts]),
        [key for part in parts for key in part.keys],
        [group for part in parts for group in part.groups],
        torch.cat(labels) if labels else None,
        {key: reason for part in parts for key, reason in part.broken.items()},
        [kind for part in parts for kind in part.kinds or ()] or None,
        torch.cat(targets) if targets else None,
        Tokens.join(tokens) if tokens else None,
    )


def _unchanged(batch: Any) -> Any:
    return batch


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SLURM signal every process there is; the main one decides what it means, and may end its workers."""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
