"""Weights away from their start, where residual branches add nothing."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def stirred(module: M) -> M:
    """The module with noise on every parameter; equal names and shapes get equal noise."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        parameter += torch.randn(parameter.shape, generator=generator) * 0.3 / max(1, parameter.shape[-1]) ** 0.5
    return module
