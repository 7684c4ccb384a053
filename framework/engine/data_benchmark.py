"""What loading costs: our stream against a loop that only decodes, and against torchvision's loader or WebDataset's.

All sides read the same images with the same transform, and take turns; see ``framework/engine/benchmark.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import datasets, transforms

from framework.data.encoded import EncodedImages
from framework.data.folder import ImageFolder
from framework.data.shard_index import INDEX
from framework.data.shards import Shards
from framework.data.stream import Stream
from framework.data.transforms import EXTENSIONS, ImageError
from framework.engine.benchmark import Clock, Time, Times, machine

CPU = torch.device("cpu")
STEPS = 4
"""Batches of a round."""


class _Decoding(Dataset[int]):
    """Reads, decodes and cuts down to bytes, which it drops."""

    def __init__(self, data: EncodedImages) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        with suppress(ImageError):  # the stream reads another; a share this small does not change the times
            np.asarray(self.data.square(index, np.random.default_rng(index)))
        return index


def loading_lines(root: str, image_size: int, batch_size: int, workers: Sequence[int], rounds: int) -> Iterator[str]:
    """A table for each number of worker processes."""
    for num_workers in workers:
        times = time_loading(root, image_size, batch_size, num_workers, rounds)
        yield f"{num_workers} workers, {image_size}x{image_size}, {machine(CPU)}; CPU times are the main process's"
        yield times.table(STEPS * batch_size)


def time_loading(root: str, image_size: int, batch_size: int, num_workers: int, rounds: int) -> Times:
    """Time ``STEPS`` random batches of a folder of images or shards, resized, randomly cropped and flipped.

    Workers are started anew for each round. The clock runs from when the first batches are through, with all workers
    busy, to the last batch. torchvision wants class folders, and is left out where the folder is flat.
    """
    kind: type[ImageFolder | Shards] = Shards if (Path(root).expanduser() / INDEX).is_file() else ImageFolder
    data = kind(root, image_size=image_size, training=True, seed=0)
    cases: dict[str, Callable[[], Iterator[object]]] = {
        "decode only": partial(_endless, _Decoding(data), batch_size, num_workers),
        "Stream": partial(Stream, data, batch_size, seed=0, num_workers=num_workers),
    }
    resize = transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC)
    crop, flip = transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip()
    usual = transforms.Compose([resize, crop, flip, transforms.ToTensor()])
    if isinstance(data, Shards):
        cases["webdataset"] = partial(_webdataset, data, usual, batch_size, num_workers)
    elif data.classes:
        cases["torchvision"] = partial(_endless, datasets.ImageFolder(str(data.root), usual), batch_size, num_workers)
    times: dict[str, list[Time]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, start in cases.items():
            batches = start()
            for _ in islice(batches, 1 + 2 * num_workers):  # what workers fetch ahead, and one
                pass
            clock = Clock(CPU)
            for _ in islice(batches, STEPS):
                pass
            times[name].append(clock.lap())
            del batches  # its workers end before those of the next start
    return Times(times)


def _endless(dataset: Dataset[Any], batch_size: int, num_workers: int) -> Iterator[object]:
    sampler = RandomSampler(dataset, num_samples=1 << 40, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return iter(DataLoader(dataset, batch_size, sampler=sampler, num_workers=num_workers))


def _webdataset(data: Shards, transform: Callable[..., object], batch_size: int, num_workers: int) -> Iterator[object]:
    """Random shards for ever, their samples shuffled in a buffer, each as one image."""
    shards = [str(data.files.path(shard.name, shard.sha256)) for shard in data.shards]
    samples = webdataset.WebDataset(shards, shardshuffle=False, resampled=True, seed=0).shuffle(1000).decode("pilrgb")
    images = samples.to_tuple(";".join(extension[1:] for extension in EXTENSIONS)).map_tuple(transform)
    return iter(DataLoader(images, batch_size, num_workers=num_workers))
