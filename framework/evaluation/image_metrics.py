"""Per-image reconstruction errors and what is derived from them.

Everything starts from one error per image, the mean squared error over pixels and channels in [0, 1]. The AdaTok paper
(section 5.3) calls it rMSE, "reconstruction MSE"; no root is taken. Its threshold of .02 is in the same unit: 17 dB.

Shapes: b images; errors may carry further dimensions, such as one per kept length.
"""

from __future__ import annotations

from einops import reduce
from torch import Tensor

THRESHOLDS = (0.005, 0.01, 0.02)
"""Errors at which the quality pass rate is reported; the last is AdaTok's."""


def squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each image: two ``(b, c, h, w)`` in [0, 1] -> ``(b,)``.

    Raises:
        ValueError: if the shapes differ, which broadcasting would hide.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)} cannot be compared with reconstructions of shape "
            f"{tuple(reconstructions.shape)}"
        )
    return reduce((images.float() - reconstructions.float()).square(), "b c h w -> b", "mean")


def psnr(errors: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each error, at a peak of 1; at most 100 dB, so that exact copies stay finite.

    The PSNR of a data set is the mean of its images' PSNR, not the PSNR of its mean error, which is lower.
    """
    return -10 * errors.clamp(min=1e-10).log10()


def rqpr(errors: Tensor, threshold: float) -> Tensor:
    """Reconstruction quality pass rate (AdaTok, section 5.3): errors ``(b, ...)`` -> share that passes ``(...)``.

    An image passes at or below the threshold, as in the paper's reward (equation 7); its section 5.3 says "lower than".
    """
    return (errors <= threshold).double().mean(0)
