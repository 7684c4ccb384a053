"""Files of inputs, intermediate values and outputs of official models with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The official state, and everything else under names such as ``out/image``."""
    held = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}
    state = {key.removeprefix("state_dict/"): value for key, value in held.items() if key.startswith("state_dict/")}
    return state, {key: value for key, value in held.items() if not key.startswith("state_dict/")}


def assert_near(ours: Tensor, official: Tensor, tolerance: float = 1e-5) -> None:
    """The largest error is small beside the largest value."""
    assert ours.shape == official.shape
    assert (ours - official).abs().max() <= tolerance * official.abs().max()
