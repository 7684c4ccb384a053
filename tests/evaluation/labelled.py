"""Labelled images for evaluations that need classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from framework.data.interface import Batch
from tests.evaluation.fakes import FixedImages


class LabelledImages(FixedImages):
    """Given images in groups of two, with labels, and names of classes if there are some."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> None:
        super().__init__(images, [f"pair {row // 2}" for row in range(len(images))])
        self.labels, self.classes = labels, list(classes)

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        return replace(super().fetch(indices, epoch), labels=self.labels[list(indices)])


def blobs(count: int, size: int, seed: int, noise: float = 0.25, num_classes: int = 3) -> LabelledImages:
    """Noisy images around one pattern for each class; classes overlap, so that no probe is always right."""
    patterns = torch.rand(num_classes, 3, size, size, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    images = 0.5 + 0.25 * (patterns[labels] - 0.5) + noise * torch.randn(count, 3, size, size, generator=generator)
    return LabelledImages(images.clamp(0, 1), labels)
