"""The YAML node ``evaluation:``, what evaluations measure beside the squared error."""

from __future__ import annotations

from framework.losses.extractors.interface import Extractor
from framework.losses.perceptual import PerceptualLoss


class Evaluation:
    """What to measure; it may change while a run goes on, and after it.

    Args:
        distances: extractors of perceptual distances by the name that metrics have, such as
            ``{st_lpips: {name: STLPIPS}}``.
        lengths: kept tokens to measure a tokenizer at, increasing; a spread of them unless given.
        pca: whether principal components of the training images, at equal floats, stand beside a tokenizer.
    """

    def __init__(
        self,
        distances: dict[str, Extractor] | None = None,
        lengths: tuple[int, ...] | None = None,
        pca: bool = True,
    ) -> None:
        self.lengths = lengths
        self.pca = pca
        self.distances = {name: PerceptualLoss(extractor) for name, extractor in (distances or {}).items()}
