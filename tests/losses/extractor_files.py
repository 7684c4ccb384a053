"""Which packages with weights are there, and photographs to look at."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from skimage import data
from torch import Tensor
from torch.nn.functional import interpolate


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def photographs(size: int, *names: str) -> Tensor:
    """Of scikit-image, scaled to squares, in [0, 1]."""
    whole = [torch.from_numpy(getattr(data, name)()[None, ..., :3]).permute(0, 3, 1, 2) / 255 for name in names]
    return torch.cat([interpolate(image, (size, size), mode="bicubic", antialias=True) for image in whole]).clamp(0, 1)


def noisy(images: Tensor, deviation: float) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def without_undeclared_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """stlpips_pytorch imports two packages that it does not declare, and calls neither."""
    for package, member in (("IPython", "embed"), ("torchsummary", "summary")):
        stand_in = ModuleType(package)
        setattr(stand_in, member, None)
        monkeypatch.setitem(sys.modules, package, stand_in)
