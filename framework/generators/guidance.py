"""Classifier-free guidance: how far, and when, a prediction is pushed away from that without a class (Ho and Salimans
2021)."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Predictions become ``u + s (c - u)``, of c with the class and u without.

    Progress goes from 0 to 1: of autoregressive generators it is the number of tokens that are there over the longest
    length (never over the sample's own, which is not known), of diffusion the time. At a scale of 1, and outside the
    interval, nothing is predicted without a class.

    Args:
        scale: s, at least 0; where a schedule rises, its last. Papers whose scale counts from 0 have one less.
        interval: first and last progress at which there is guidance (Kynkaanniemi et al. 2024).
        schedule: ``constant``; ``linear``, from 1 at the start (MAR, Semanticist); ``power_cosine``, from 1 along
            ``(1 - cos(pi progress^power)) / 2`` (RAR, MaskBit).
        power: of ``power_cosine``; above 1 guidance comes later.

    Raises:
        ValueError: if a number is out of its range.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    schedule: Literal["constant", "linear", "power_cosine"] = "constant"
    power: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"the scale of guidance is a number from 0, where 1 is none; got {self.scale}")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance has an interval of progress from 0 to 1, got {self.interval}")
        if self.schedule not in ("constant", "linear", "power_cosine"):
            raise ValueError(f"a schedule of guidance is constant, linear or power_cosine; got '{self.schedule}'")
        if not (isfinite(self.power) and self.power > 0):
            raise ValueError(f"the power of a schedule is above 0, got {self.power}")

    def scale_at(self, progress: float) -> float:
        """The scale at a progress in [0, 1]; exactly 1 where nothing need be predicted without a class."""
        if not self.interval[0] <= progress <= self.interval[1]:
            return 1.0
        rise = {"constant": 1.0, "linear": progress, "power_cosine": (1 - cos(pi * progress**self.power)) / 2}
        return 1 + (self.scale - 1) * rise[self.schedule]


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """``u + s (c - u)``; ``scale`` is one number, or a tensor that broadcasts."""
    return unconditional + scale * (conditional - unconditional)
