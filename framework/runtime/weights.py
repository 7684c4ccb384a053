"""Weights and parts by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

MARKS = ("training", "is_frozen", "is_unread", "is_untrained", "has_weights")
"""What modules are told of their place in a run, and says nothing of what they do."""


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, types, shapes and values of a module's ``state_dict()``, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def part_digest(part: nn.Module) -> str:
    """The SHA-256 of a part's weights and of what it and its parts were made with: classes, numbers, texts, lists."""
    return hashlib.sha256(
        (json.dumps(_settings(part), sort_keys=True) + weights_digest(part.state_dict())).encode()
    ).hexdigest()


def _settings(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _settings(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_settings(each) for each in value]
    held = getattr(value, "__dict__", {})
    own = {name: each for name, each in held.items() if name[0] != "_" and name not in MARKS}
    if isinstance(value, nn.Module):
        own |= dict(value.named_children()) | dict(value.named_buffers(recurse=False))
    return [getattr(value, "__qualname__", type(value).__qualname__), _settings(own)]
