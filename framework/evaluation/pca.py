"""Principal components of training images: the linear baseline at equal floats.

L tokens of d floats compete with the first L * d principal components. Both describe an image by as many numbers, and
no linear code of that size has a lower squared error on the images that it was fitted to.

Shapes: b images, v = c * h * w values of an image, k components.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from framework.evaluation.image_metrics import squared_error

MAX_VALUES = 4096
"""Largest image that is fitted, in values: the covariance has v * v entries and its eigenvectors cost v ** 3."""


@dataclass(frozen=True)
class PrincipalComponents:
    """An orthonormal basis of images around their mean, in order of variance.

    Args:
        mean: ``(v,)``.
        basis: one component per column, ``(v, v)``, largest variance first.
        num_images: how many images it was fitted to; components past that number explain nothing.
    """

    mean: Tensor
    basis: Tensor
    num_images: int

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> PrincipalComponents:
        """Fit to batches of images ``(b, c, h, w)``, seen once; sums over batches and eigenvectors are float64.

        Raises:
            ValueError: if an image has more than ``MAX_VALUES`` values, or there are no images.
        """
        total, products, count = torch.zeros(()), torch.zeros(()), 0
        for images in batches:
            values = rearrange(images, "b c h w -> b (c h w)")
            if values.shape[1] > MAX_VALUES:
                raise ValueError(
                    f"principal components need images of at most {MAX_VALUES} values, got {values.shape[1]} "
                    f"({' x '.join(map(str, images.shape[1:]))})"
                )
            total = total + values.double().sum(0)
            products = products + (values.T @ values).double()
            count += len(values)
        if not count:
            raise ValueError("principal components need at least one image, got none")
        mean = total / count
        basis = torch.linalg.eigh(products / count - mean.outer(mean)).eigenvectors.flip(1)
        return cls(mean.float(), basis.float(), count)

    def reconstructions(self, images: Tensor, num_floats: Sequence[int]) -> Iterator[Tensor]:
        """Images ``(b, c, h, w)`` rebuilt from their first k components, for each k; clamped to [0, 1]."""
        scores = (rearrange(images, "b c h w -> b (c h w)") - self.mean) @ self.basis[:, : max(num_floats)]
        for k in num_floats:
            values = scores[:, :k] @ self.basis[:, :k].T + self.mean
            yield values.clamp(0, 1).reshape(images.shape)

    def errors(self, images: Tensor, num_floats: Sequence[int]) -> Tensor:
        """Squared error of each image at each number of floats: ``(b, c, h, w)`` -> ``(b, len(num_floats))``."""
        rebuilt = self.reconstructions(images, num_floats)
        return torch.stack([squared_error(images, reconstruction) for reconstruction in rebuilt], dim=1)
