"""The YAML node ``evaluation:``, what evaluations measure beside the squared error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from framework.evaluation.distribution_features import DistributionFeatures
from framework.evaluation.image_metrics import THRESHOLDS
from framework.evaluation.reference_statistics import Reference, read_reference
from framework.losses.extractors.interface import Extractor
from framework.losses.perceptual import PerceptualLoss

Measures = TypeVar("Measures", bound="Evaluation")


class Evaluation:
    """What to measure; it may change while a run goes on, and after it.

    Args:
        distances: extractors of perceptual distances by the name that metrics have, such as
            ``{st_lpips: {name: STLPIPS}}``.
        lengths: kept tokens to measure a tokenizer at, increasing; a spread of them unless given.
        pca: whether principal components of the training images, at equal floats, stand beside a tokenizer.
        features: networks in whose features whole sets are compared: ``[{name: InceptionV3}]`` for rFID,
            ``[{name: EfficientNetLite0Features}]`` where its weights cannot be had.
        references: files of statistics to compare with in place of the very images that are rebuilt, by metric, such as
            ``{fid: VIRTUAL_imagenet256_labeled.npz}``.
        thresholds: squared errors at which the quality pass rate is reported.
        codec_images: of so many images JPEG and WebP are measured at the size of discrete tokens; 0 leaves them out.
        judge_images: a small classifier judges generated images, see ``digit_judge``, beside so many of training; 0
            leaves it out, as should be where images are large.

    Raises:
        ValueError: if two networks give the same metric, a reference is of none of them, or a number is out of range.
    """

    def __init__(
        self,
        distances: dict[str, Extractor] | None = None,
        lengths: tuple[int, ...] | None = None,
        pca: bool = True,
        features: list[DistributionFeatures] | None = None,
        references: dict[str, str] | None = None,
        thresholds: tuple[float, ...] = THRESHOLDS,
        codec_images: int = 128,
        judge_images: int = 10_000,
    ) -> None:
        self.lengths = lengths
        self.pca = pca
        self.distances = {name: PerceptualLoss(extractor) for name, extractor in (distances or {}).items()}
        self.features = {network.metric: network for network in features or ()}
        self.references = {metric: Path(path) for metric, path in (references or {}).items()}
        self.thresholds = thresholds
        self.codec_images = codec_images
        self.judge_images = judge_images
        if len(self.features) < len(features or ()):
            raise ValueError(f"two of evaluation.features give one metric; there are {', '.join(self.features)}")
        if others := self.references.keys() - self.features.keys():
            known = ", ".join(self.features) or "none: set evaluation.features"
            raise ValueError(f"evaluation.references has {min(others)!r}, and the metrics of features are {known}")
        if not thresholds or min(thresholds) <= 0 or min(codec_images, judge_images) < 0:
            raise ValueError(
                f"evaluation.thresholds are one or more squared errors above 0, and codec_images and judge_images are "
                f"not below 0; got {thresholds}, {codec_images} and {judge_images}"
            )

    def to(self: Measures, device: torch.device) -> Measures:
        """The same, with its networks on a device."""
        for network in (*self.distances.values(), *self.features.values()):
            network.to(device)
        return self

    def reference(self, features: DistributionFeatures) -> Reference | None:
        """What to compare with in these features; ``None`` for the images that are rebuilt.

        Raises:
            FileNotFoundError, ReferenceFileError: if its file is missing or cannot be used.
        """
        path = self.references.get(features.metric)
        return None if path is None else read_reference(path, features)


def named(distances: Sequence[str] | None, features: Sequence[str] | None) -> dict[str, object]:
    """Values of this node from the names of extractors and networks on a command line, where they are given."""
    chosen: dict[str, object] = {}
    if distances:
        chosen["distances"] = {name: {"name": name} for name in distances}
    if features:
        chosen["features"] = [{"name": name} for name in features]
    return chosen
