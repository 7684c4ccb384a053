"""Handwritten digits that ship inside scikit-learn, rendered crisp at any size: labelled data with no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad

from framework.data.in_memory import GreyImages
from framework.data.interface import DATA
from framework.runtime.hashing import uniforms

Split = Literal["train", "validation", "test"]

NUM_CLASSES = 10
RENDER_SEED = 0
HELD_OUT = 0.1  # share of each class, once for validation and once for test
RANGES = {"rotation": np.deg2rad(10), "scale": 0.10, "shear": 0.15, "x": 0.10, "y": 0.06}  # to either side
RENDERING = (
    "bicubic x8; random fixed rotation 10 degrees, scale 10%, shear .15, shift .10 and .06 of half a side; "
    "sampled at twice the size, sigmoid(10.4 (x - .40)), pooled by 2"
)


def _load() -> tuple[Tensor, NDArray[np.int64]]:
    """All digits, ``(1797, 8, 8)`` in [0, 1], and their classes."""
    from sklearn.datasets import load_digits  # takes a second to import, so only when asked for

    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, digits.target


def instances_of(split: Split) -> list[NDArray[np.int64]]:
    """The numbers of the digits of a split, by class: 80% of each class for training, 10% for each of the others.

    The order within a class is a hash, not the file's, which runs through the writers.
    """
    _, labels = _load()
    shuffled = np.argsort(uniforms(RENDER_SEED, "digits", 0, range(len(labels))), kind="stable")
    by_class = []
    for digit in range(NUM_CLASSES):
        instances = shuffled[labels[shuffled] == digit]
        held_out = round(HELD_OUT * len(instances))
        validation, test, train = np.split(instances, [held_out, 2 * held_out])
        by_class.append({"validation": validation, "test": test, "train": train}[split])
    return by_class


def render(instances: NDArray[np.int64], address: str, numbers: NDArray[np.int64], size: int) -> Tensor:
    """Digits as crisp strokes of grey on black, each under its own small affine map.

    Args:
        instances: ``(n,)`` which digit of the 1797.
        address: the map is a function of (address, number) alone.
        numbers: ``(n,)`` non-negative.
        size: side in pixels.

    Returns:
        ``(n, size, size)`` uint8.
    """
    used, origins = np.unique(instances, return_inverse=True)
    digits = interpolate(pad(_load()[0][used], (2, 2, 2, 2))[:, None], scale_factor=8, mode="bicubic")
    draws = {
        purpose: (2 * uniforms(RENDER_SEED, f"{address} {purpose}", 0, numbers) - 1) * largest
        for purpose, largest in RANGES.items()
    }
    cos, sin, scale = np.cos(draws["rotation"]), np.sin(draws["rotation"]), 1 + draws["scale"]
    affine = (  # rotation times shear, scaled
        (scale * cos, scale * (draws["shear"] * cos - sin), draws["x"]),
        (scale * sin, scale * (draws["shear"] * sin + cos), draws["y"]),
    )
    maps = torch.from_numpy(np.array(affine)).float()[..., None, None]  # (2, 3, n, 1, 1)
    across = (torch.arange(2 * size) + 0.5) / size - 1
    down = across[:, None]
    darkest, brightest = torch.sigmoid(10.4 * (torch.tensor([0.0, 1.0]) - 0.40))
    rendered = torch.empty(len(instances), size, size, dtype=torch.uint8)
    for start in range(0, len(instances), 256):
        chunk = slice(start, start + 256)
        grid = torch.stack([ax * across + ay * down + shift for ax, ay, shift in maps[:, :, chunk]], dim=-1)
        sampled = grid_sample(digits[torch.from_numpy(origins[chunk])], grid, align_corners=False)
        strokes = (torch.sigmoid(10.4 * (sampled - 0.40)) - darkest) / (brightest - darkest)
        rendered[chunk] = (avg_pool2d(strokes.clamp(0, 1), 2)[:, 0] * 255).round().to(torch.uint8)
    return rendered


def _checked(name: str, num_images: int, image_size: int) -> int:
    if num_images < 1:
        raise ValueError(f"{name}: num_images must be at least 1, got {num_images}")
    if image_size < 16 or image_size % 2:
        raise ValueError(f"{name}: image_size must be even and at least 16, got {image_size}")
    return num_images


def _protocol(split: Split, instances: NDArray[np.int64], crop: str) -> dict[str, object]:
    return {
        "source": "load_digits of scikit-learn: 1797 digits of 8x8; writers are shared across splits",
        "split": split,
        "instances": len(np.unique(instances)),
        "crop": crop,
        "rendering": RENDERING,
        "augmentation": "none",
    }


@DATA.register()
class Digits(GreyImages):
    """One digit per image; the label is its class.

    The digits are split once, stratified by class; no digit is in two splits, but writers are. Image i has class i
    modulo 10 and takes the digits of that class in turn, each time rendered anew. The rendering depends on (split, i)
    alone, so all runs see equal images, and asking for more extends the list. It is all the variation there is:
    nothing is augmented in training, and neither ``training`` nor ``seed`` changes anything.

    Args:
        split: which digits: about 1,440 for training, 180 for validation, 180 for the test.
        num_images: how many renderings.
        image_size: side in pixels, even and at least 16, given by ``Data``.
        training: given by ``Data``, without effect.
        seed: given by ``Data``, without effect.

    Raises:
        ValueError: if ``num_images`` or ``image_size`` is out of range.
    """

    def __init__(self, split: Split, num_images: int = 28_000, *, image_size: int, training: bool, seed: int) -> None:
        numbers = np.arange(_checked("Digits", num_images, image_size))
        by_class = instances_of(split)
        turns, labels = np.divmod(numbers, NUM_CLASSES)
        sizes = np.array([len(instances) for instances in by_class])[labels]
        instances = np.array([by_class[c][t] for c, t in zip(labels, turns % sizes, strict=True)])
        super().__init__(
            render(instances, f"digits {split}", numbers, image_size),
            torch.from_numpy(labels),
            keys=[f"{split} {n:04} #{turn}" for n, turn in zip(instances, turns // sizes, strict=True)],
            groups=[f"digit {n:04}" for n in instances],
            kinds=[f"a {label}" for label in labels],
            protocol=_protocol(split, instances, "one digit, whole"),
        )


@DATA.register()
class DigitScenes(GreyImages):
    """One to four different digits of one class at half the side, in random quadrants; the label is the class.

    How much there is to describe varies with the number of digits, which ``kinds`` names. Image i has class i modulo
    10, and i // 10 modulo 4 more digits than one: every 40 images hold each combination once. Its first digit is the
    next of its class, the others and the quadrants are drawn. All depends on (split, i) alone, as in ``Digits``.

    Groups are named by the first digit. The others of a scene come from the same few digits of the split, so scenes
    of two groups may share some: intervals that resample groups take that for independent, and are a little narrow.

    Args:
        split: which digits, as in ``Digits``.
        num_images: how many scenes.
        image_size: side in pixels, even and at least 16, given by ``Data``.
        training: given by ``Data``, without effect.
        seed: given by ``Data``, without effect.

    Raises:
        ValueError: if ``num_images`` or ``image_size`` is out of range.
    """

    def __init__(self, split: Split, num_images: int = 28_000, *, image_size: int, training: bool, seed: int) -> None:
        numbers = np.arange(_checked("DigitScenes", num_images, image_size))
        by_class = instances_of(split)
        turns, labels = np.divmod(numbers, NUM_CLASSES)
        counts = turns % 4 + 1
        address = f"digit scenes {split}"
        drawn, place = (
            rearrange(uniforms(RENDER_SEED, f"{address} {purpose}", 0, range(4 * num_images)), "(n k) -> n k", k=4)
            for purpose in ("instance", "quadrant")
        )
        sizes = np.array([len(instances) for instances in by_class])[labels, None]
        steps = 1 + (drawn * (sizes // 4)).astype(np.int64)  # three of them stay below the size: all four differ
        steps[:, 0] = turns // 4
        chosen = np.cumsum(steps, axis=1) % sizes
        instances = np.array([by_class[label][row] for label, row in zip(labels, chosen, strict=True)])
        pieces = np.argwhere(np.arange(4) < counts[:, None])  # (p, 2): scene and place in it
        scene, k = pieces.T
        half = image_size // 2
        quadrants = torch.zeros(num_images, 4, half, half, dtype=torch.uint8)
        quadrants[scene, np.argsort(place, axis=1)[scene, k]] = render(
            instances[scene, k], address, 4 * scene + k, half
        )
        super().__init__(
            rearrange(quadrants, "n (y x) h w -> n (y h) (x w)", y=2),
            torch.from_numpy(labels),
            keys=[f"{split} {c}x{label} #{i}" for i, (c, label) in enumerate(zip(counts, labels, strict=True))],
            groups=[f"digit {n:04}" for n in instances[:, 0]],
            kinds=[f"{c} digit{'s' if c > 1 else ''}" for c in counts],
            protocol=_protocol(split, instances[scene, k], "1 to 4 digits of a class in random quadrants"),
        )
