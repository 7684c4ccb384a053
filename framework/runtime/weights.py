"""Weights by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, types, shapes and values of a module's ``state_dict()``, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()
