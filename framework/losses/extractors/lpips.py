"""LPIPS and its shift-tolerant variant: weighted distances of normalised activations, calibrated on people's judgement.

Shapes: b batch, c channels of a layer, h and w its grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from framework.losses.blur_pool import BlurPool
from framework.losses.extractors.interface import EXTRACTORS, Extractor, unit_channels
from framework.losses.extractors.published import package_weights, torchvision_weights

Network = Literal["vgg", "alex"]
TITLES = {"vgg": "VGG16", "alex": "AlexNet"}
TORCHVISION = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


@EXTRACTORS.register()
class LPIPS(Extractor):
    """LPIPS, version 0.1 (Zhang et al. 2018, arXiv:1801.03924).

    The weights of the channels come with the package ``lpips``, the network's own with torchvision, which publishes
    them as a file of its own. Nothing is downloaded.

    Args:
        network: ``vgg``, as in training losses, or ``alex``, the authors' choice for metrics.
        backbone: torchvision's file of that network, ``vgg16-397923af.pth`` or ``alexnet-owt-7be5be79.pth``; where
            torchvision would put it, unless given.
        min_side: smaller images are enlarged; the authors calibrated on patches of 64 pixels.

    Raises:
        ValueError: if the package is not installed, or the file is damaged.
        FileNotFoundError: if the file is not there; says where to fetch it and where to put it.
    """

    def __init__(self, network: Network = "vgg", backbone: Path | None = None, min_side: int = 64) -> None:
        super().__init__(min_side)
        self.title = f"LPIPS ({TITLES[network]})"
        self.network = _CalibratedNetwork(network, shift_tolerant=False)

        def read() -> dict[str, Tensor]:
            layers = torchvision_weights(TORCHVISION[network], backbone)
            heads = package_weights("lpips", f"weights/v0.1/{network}.pth", "lpips")
            return _renamed({n: v for n, v in layers.items() if n.startswith("features.")}) | _renamed(heads)

        self.load(self.network, read)

    def features(self, images: Tensor) -> list[Tensor]:
        return self.network(images)


@EXTRACTORS.register()
class STLPIPS(Extractor):
    """Shift-tolerant LPIPS (Ghildyal and Liu 2022, arXiv:2207.13686): LPIPS with blurred pooling, calibrated anew.

    The package ``stlpips-pytorch`` holds all its weights (BSD-2-Clause), so it works without a network. Its numbers are
    not LPIPS's.

    Args:
        network: ``alex``, the authors' choice, or ``vgg``.
        min_side: smaller images are enlarged; the authors calibrated on patches of 64 pixels.

    Raises:
        ValueError: if the package is not installed.
    """

    def __init__(self, network: Network = "alex", min_side: int = 64) -> None:
        super().__init__(min_side)
        self.title = f"ST-LPIPS ({TITLES[network]})"
        self.network = _CalibratedNetwork(network, shift_tolerant=True)
        file = f"weights/vST0.0/{network}_shift_tolerant.pth"
        self.load(self.network, lambda: _renamed(package_weights("stlpips_pytorch", file, "stlpips-pytorch")))

    def features(self, images: Tensor) -> list[Tensor]:
        return self.network(images)


class _CalibratedNetwork(nn.Module):
    """Five activations, each position's channels normalised and weighted by the roots of learned weights."""

    def __init__(self, network: Network, shift_tolerant: bool) -> None:
        super().__init__()
        layers, self.taps = (_vgg if network == "vgg" else _alexnet)(shift_tolerant)
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ParameterList([torch.ones(channels, 1, 1) for channels in CHANNELS[network]])

    def forward(self, values: Tensor) -> list[Tensor]:
        activations = []
        for index, layer in enumerate(self.layers):
            values = layer(values)
            if index in self.taps:
                activations.append(values)
        return [unit_channels(a) * head for a, head in zip(activations, self.heads, strict=True)]


def _vgg(shift_tolerant: bool) -> tuple[list[nn.Module], list[int]]:
    """The layers of VGG16, numbered as in torchvision, and the last of each block."""
    layers: list[nn.Module] = []
    taps: list[int] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers += [nn.MaxPool2d(2, 1), _blur()] if shift_tolerant else [nn.MaxPool2d(2)]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        taps.append(len(layers) - 1)
    return layers, taps


def _alexnet(shift_tolerant: bool) -> tuple[list[nn.Module], list[int]]:
    """The convolutions of AlexNet, numbered as in torchvision, and the activations."""

    def pool() -> list[nn.Module]:
        return [nn.MaxPool2d(3, 1), _blur()] if shift_tolerant else [nn.MaxPool2d(3, 2)]

    first: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=1 if shift_tolerant else 4, padding=2)]
    layers = [*first, *([_blur()] if shift_tolerant else []), nn.ReLU(inplace=True), *pool()]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), *pool()]
    for channels, width in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
    return layers, [index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]


def _blur() -> BlurPool:
    return BlurPool((1, 2, 1), padding=2, mode="reflect")


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under this module's names; the blurs and the scaling of inputs, which are constants here, are left out."""
    renamed = {}
    for name, value in weights.items():
        if head := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            renamed[f"heads.{head[1]}"] = value[0].sqrt()
        elif layer := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))", name):
            renamed[f"layers.{layer[1]}"] = value
    return renamed
