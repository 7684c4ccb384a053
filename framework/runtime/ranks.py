"""Processes that train one model together: who this one is, and what all of them must agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 << 20


class PeerError(RuntimeError):
    """Another of the processes that train together has ended, or cannot be reached; why is for that one to say."""


@contextmanager
def _telling() -> Iterator[None]:
    """What the backend raises when a process is gone, in words."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            "another of the processes that train together has ended or cannot be reached; what it said is the reason "
            f"({str(error).splitlines()[0]})"
        ) from error


class Ranks:
    """One process alone, which agrees with itself.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of floats, equal in shape and order on every rank, by their means over ranks."""

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, equal in shape and order on every rank, by those of the main process."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; plain containers and tensors on the CPU."""
        return [value]

    def wait(self) -> None:
        """Until all ranks have come here."""


class ProcessRanks(Ranks):
    """Over torch's default process group, which must have a backend for the CPU beside that of the device."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @_telling()
    def average(self, tensors: Sequence[Tensor]) -> None:
        buckets = [(bucket, torch.cat([tensor.reshape(-1) for tensor in bucket])) for bucket in _buckets(tensors)]
        pending = [dist.all_reduce(flat, async_op=True) for _, flat in buckets]
        for (bucket, flat), work in zip(buckets, pending, strict=True):
            assert work is not None
            work.wait()
            _unpack(flat.div_(self.size), bucket)

    @_telling()
    def spread(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, src=0)
            _unpack(flat, bucket)

    @_telling()
    def any(self, flag: bool) -> bool:
        raised = torch.tensor(float(flag))
        dist.all_reduce(raised)
        return raised.item() > 0

    @_telling()
    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        self.any(False)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many of one type as fit; a few large messages are faster than many small ones."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _unpack(flat: Tensor, bucket: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in bucket])
    torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])
