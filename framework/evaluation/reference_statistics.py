"""Files of statistics that sets of images are compared with: this framework's, and ADM's published ones.

An ``.npz`` file holds ``mu (d,)`` and ``sigma (d, d)`` of features, or images ``arr_0 (i, h, w, 3)`` uint8, or both.
This framework's also hold ``count`` and ``protocol``, a JSON text. Headers are read before memory is taken for an
array, and images a batch at a time. Nothing in a file can run.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from framework.evaluation.distribution_features import DistributionFeatures
from framework.evaluation.distribution_metrics import MAX_KEPT, FeatureCollector, FeatureSet, FeatureStatistics
from framework.runtime.files import digest, write_bytes

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
MAX_TEXT = 1 << 20


class ReferenceFileError(ValueError):
    """A file of statistics that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be the reference: {reason}")


@dataclass(frozen=True, eq=False)
class Reference:
    """What reconstructions or samples are compared with, and what a table must say of it."""

    images: FeatureSet
    protocol: Mapping[str, Any]


def write_reference(path: Path, reference: Reference, features: DistributionFeatures) -> None:
    """Write the statistics of all images, with their protocol and that of the features; kept features are left out.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    statistics = reference.images.statistics
    protocol = {**reference.protocol, "features": features.protocol()}
    content = BytesIO()
    np.savez(
        content,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        count=np.array(statistics.count),
        protocol=np.array(json.dumps(protocol)),
    )
    write_bytes(path, content.getvalue())


def read_reference(
    path: Path, features: DistributionFeatures, max_kept: int = MAX_KEPT, batch_size: int = 64
) -> Reference:
    """The statistics in a file, or those of the images in it.

    ADM's files hold both: statistics of the whole training set, and images for precision and recall, whose features are
    computed here. A file that does not say whose features it holds is taken to be of InceptionV3's.

    Args:
        features: what the other side of the comparison is measured in.
        max_kept: images for precision and recall; 0 leaves images unread where there are statistics.
        batch_size: images at a time.

    Raises:
        FileNotFoundError: if there is no such file.
        ReferenceFileError: if it is damaged, holds something else, or statistics of other features.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}. ADM's statistics of ImageNet are {ADM}VIRTUAL_imagenet256_labeled.npz; "
            "write_reference makes one of any data set"
        )
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        _check_names(path, names)
        statistics = _statistics(path, archive, names, features) if {"mu", "sigma"} <= names else None
        protocol = _protocol(path, archive, features) if "protocol" in names else None
    if statistics is not None and protocol is None and features.metric != "fid":
        raise ReferenceFileError(
            path, f"it does not say whose features it holds, which are InceptionV3's as a rule, not {features.title}"
        )
    collector = FeatureCollector(features, range(max_kept))
    if "arr_0" in names and (statistics is None or max_kept):
        for images in _images(path, batch_size, None if statistics is None else max_kept):
            collector.add(images)
    found = collector.collected()
    told = protocol or {"statistics": "of arr_0" if statistics is None else "mu and sigma, taken to be InceptionV3's"}
    count = (statistics or found.statistics).count
    record = {**told, "file": path.name, "sha256": digest(path), "images": count}
    return Reference(FeatureSet(statistics or found.statistics, found.kept), record)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file, in words."""
    try:
        yield
    except (ReferenceFileError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise ReferenceFileError(path, f"it is damaged or no .npz file ({type(error).__name__}: {error})") from error


def _check_names(path: Path, names: set[str]) -> None:
    with open(path, "rb") as file:
        file.seek(-12, os.SEEK_END)  # in the last record of the archive
        if (promised := int.from_bytes(file.read(2), "little")) != len(names):
            raise ReferenceFileError(path, f"it lists {len(names)} of {promised} arrays: the file is damaged")
    for one, other in (("mu", "sigma"), ("count", "protocol")):
        if (one in names) != (other in names):  # else images would stand in for statistics that are damaged
            raise ReferenceFileError(path, f"of {one} and {other} it holds one alone: the file is damaged")
    if not names & {"mu", "arr_0"}:
        held = ", ".join(sorted(names)) or "nothing"
        raise ReferenceFileError(path, f"it holds neither mu and sigma nor arr_0, but {held}")


def _statistics(
    path: Path, archive: zipfile.ZipFile, names: set[str], features: DistributionFeatures
) -> FeatureStatistics:
    mean, covariance = _array(archive, "mu", (features.dim,)), _array(archive, "sigma", (features.dim, features.dim))
    count = int(_array(archive, "count", ())) if "count" in names else None
    for name, array in {"mu": mean, "sigma": covariance}.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ReferenceFileError(path, f"{name} is not all finite floats")
    covariance = covariance.astype(np.float64)
    if (covariance.diagonal() < 0).any() or np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ReferenceFileError(path, "sigma is no covariance: it is not symmetric, or has negative variances")
    if count is not None and count < 2:
        raise ReferenceFileError(path, f"it says to be of {count} images, and a covariance needs two")
    return FeatureStatistics(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance), count)


def _protocol(path: Path, archive: zipfile.ZipFile, features: DistributionFeatures) -> dict[str, Any]:
    protocol = json.loads(str(_array(archive, "protocol", ())))
    theirs, ours = protocol["features"], features.protocol()
    if other := [f"{key} {theirs.get(key)}, not {ours[key]}" for key in ours if theirs.get(key) != ours[key]]:
        raise ReferenceFileError(path, f"it holds other features: {'; '.join(other)}")
    return dict(protocol)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type; the member then stands at the first value."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns_first, dtype = readers[np.lib.format.read_magic(member)](member)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not read")
    return shape, columns_first, dtype


def _array(archive: zipfile.ZipFile, name: str, expected: tuple[int, ...]) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        shape, _, dtype = _header(member)
    if shape != expected or dtype.itemsize > MAX_TEXT:
        raise ValueError(f"{name} has shape {shape}, {dtype}, instead of {expected}")
    with archive.open(f"{name}.npy") as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # also checks the checksum
            raise ValueError(f"{name} goes on behind its end")
    return array


def _images(path: Path, batch_size: int, limit: int | None) -> Iterator[Tensor]:
    """The first ``limit`` images of ``arr_0``, all unless given, in batches ``(b, 3, h, w)`` uint8."""
    with _reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        shape, columns_first, dtype = _header(member)
        size = archive.getinfo("arr_0.npy").file_size - member.tell()
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or columns_first or min(shape) < 1:
            raise ReferenceFileError(path, f"arr_0 must be images (i, h, w, 3) uint8, row by row, got {shape} {dtype}")
        if size != math.prod(shape):
            raise ReferenceFileError(path, f"arr_0 should be {shape} and has {size:,} bytes: the file is damaged")
        number = shape[0] if limit is None else min(limit, shape[0])
        for first in range(0, number, batch_size):
            count = min(batch_size, number - first)
            content = member.read(count * math.prod(shape[1:]))
            images = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(count, *shape[1:]).copy())
            yield rearrange(images, "b h w c -> b c h w")
