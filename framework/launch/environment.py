"""Which of several processes this one is, as torchrun's environment variables say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# The functions of this module have the default process group as a default argument, the one at the time of import. The
# optimizers import it late: the group would outlive joined(), and its threads may then abort the interpreter's exit.
import torch.distributed.nn

from framework.runtime.ranks import ProcessRanks, Ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)
"""Others may wait so long for one, as while it measures a whole data set."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among its ranks, or alone where the environment names no others.

    Raises:
        ValueError: if some of the variables are missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} missing: use torchrun")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield ProcessRanks()
    finally:
        dist.destroy_process_group()
