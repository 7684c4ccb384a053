"""One torch thread a process: pytest's workers share the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import framework.components  # noqa: F401 - law tests run over every registered component

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Initial weights come from torch's global generator; tests start it equal."""
    torch.manual_seed(0)
