"""Per-image reconstruction errors and what is derived from them, structural similarity, and images as bytes.

Most starts from one error per image, the mean squared error over pixels and channels in [0, 1]. The AdaTok paper
(section 5.3) calls it rMSE, "reconstruction MSE"; no root is taken. Its threshold of .02 is in the same unit: 17 dB.

Shapes: b images; errors may carry further dimensions, such as one per kept length.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import conv2d

THRESHOLDS = (0.005, 0.01, 0.02)
"""Errors at which the quality pass rate is reported; the last is AdaTok's."""

UINT8_RULE = "255 x, rounded to the nearest (halves to even), after clamping x to [0, 1]"
SSIM_WINDOW = 11
SSIM_PROTOCOL = (
    "Wang et al. 2004: Gaussian window of 11x11, sigma 1.5, population covariances, K1 .01, K2 .03, data range 1; the "
    "mean over windows that lie wholly inside the image, and over red, green and blue"
)


def squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each image: two ``(b, c, h, w)`` in [0, 1] -> ``(b,)``.

    Raises:
        ValueError: if the shapes differ, which broadcasting would hide.
    """
    _refuse_unlike(images, reconstructions)
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


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image: two ``(b, c, h, w)`` in [0, 1] -> ``(b,)`` float64.

    1 for equal images; see ``SSIM_PROTOCOL``. Windows do not reach over the border, so nothing is padded. It is
    computed in float64: variances are differences of squares, which in float32 lose the digits that flat regions need.

    Raises:
        ValueError: if the shapes differ, images are not float, or a side is shorter than the window.
    """
    _refuse_unlike(images, reconstructions)
    if not (images.is_floating_point() and reconstructions.is_floating_point()):
        raise ValueError(f"images must be float in [0, 1], got {images.dtype} and {reconstructions.dtype}")
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM has a window of 11x11 pixels, and images are {images.shape[2]}x{images.shape[3]}")
    x, y = images.double(), reconstructions.double()
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    window = (-0.5 * (offsets / 1.5).square()).exp()
    window = window / window.sum()
    maps = rearrange(torch.stack([x, y, x * x, y * y, x * y]), "m b c h w -> (m b c) 1 h w")
    maps = conv2d(conv2d(maps, rearrange(window, "h -> 1 1 h 1")), rearrange(window, "w -> 1 1 1 w"))
    mean_x, mean_y, xx, yy, xy = rearrange(maps, "(m b c) 1 h w -> m b c h w", m=5, b=len(x))
    means = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    variances = xx - mean_x.square() + yy - mean_y.square()
    return reduce(means * (2 * (xy - mean_x * mean_y) + 0.03**2) / (variances + 0.03**2), "b c h w -> b", "mean")


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, by ``UINT8_RULE``; what codecs and feature extractors read.

    Raises:
        ValueError: if images are not float, or a value is not finite, which would become any number.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be float in [0, 1], got {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("images with values that are not finite cannot be written as bytes")
    return (255 * images.float().clamp(0, 1)).round().to(torch.uint8)


def _refuse_unlike(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)} cannot be compared with reconstructions of shape "
            f"{tuple(reconstructions.shape)}"
        )
