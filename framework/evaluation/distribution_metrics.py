"""How far one set of images lies from another in a network's features: Frechet distance, precision, recall; and scores.

Shapes: i images of a set, b of a batch, d features, k classes.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framework.evaluation.distribution_features import DistributionFeatures
from framework.runtime.ranks import Ranks

DEFINITIONS = {
    "fid, fd_*": "Frechet distance of Gaussians fitted to the features of all images of both sets (Heusel et al. "
    "2017), with covariances over n - 1; fid where the features are InceptionV3's, and no other number is called so. "
    "It falls as sets grow: compare equal numbers of images only",
    "precision, recall": "share of images in at least one of the balls that reach from each image of the other set to "
    "its third nearest neighbour there (Kynkaanniemi et al. 2019): of these images in the reference's balls, and of "
    "the reference in theirs. Over neighbours_of images: of the reference, and of these. Null where they are too few "
    "or were not kept",
    "inception_score": "Salimans et al. 2016: mean over ten splits, of images shuffled as torch-fidelity does; _std "
    "over the splits. It rises as sets grow",
    "notes": "what makes a number above less than it seems",
}
NEIGHBOURS = 3
MAX_KEPT = 10_000
NEGATIVE_TOLD, NEGATIVE_REFUSED = 1e-6, 1e-3


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features in float64; those of parts merge into those of the whole, to rounding.

    Deviations are summed from the part's own mean (Chan, Golub and LeVeque 1979), so that none is lost to large means.

    Args:
        mean: ``(d,)``.
        covariance: over n - 1, ``(d, d)``.
        count: n; ``None`` where a file does not tell.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @staticmethod
    def of(features: Tensor) -> FeatureStatistics:
        """Of features ``(b, d)``; b may be 0, for a rank that has no images."""
        features = features.double()
        mean = features.sum(0) / max(len(features), 1)
        centred = features - mean
        return FeatureStatistics(mean, centred.T @ centred / max(len(features) - 1, 1), len(features))

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """Of both sets of images together."""
        assert self.count is not None and other.count is not None, "what files hold is not merged"
        count = self.count + other.count
        offset = other.mean - self.mean
        between = torch.outer(offset, offset) * (self.count * other.count / max(count, 1))
        mean = self.mean + offset * (other.count / max(count, 1))
        return FeatureStatistics(mean, (self._scatter + other._scatter + between) / max(count - 1, 1), count)

    def over_ranks(self, ranks: Ranks) -> FeatureStatistics:
        """Of the images of all ranks together, on every rank; all must call it."""
        assert self.count is not None
        counts = self.mean.new_tensor([self.count])
        mean = self.count * self.mean
        ranks.average([counts, mean])
        total = round(counts.item() * ranks.size)
        mean = mean * ranks.size / max(total, 1)
        offset = self.mean - mean
        scatter = self._scatter + self.count * torch.outer(offset, offset)
        ranks.average([scatter])
        return FeatureStatistics(mean, scatter * (ranks.size / max(total - 1, 1)), total)

    def cpu(self) -> FeatureStatistics:
        """The same, on the CPU."""
        return replace(self, mean=self.mean.cpu(), covariance=self.covariance.cpu())

    @cached_property
    def root(self) -> tuple[Tensor, float]:
        """The symmetric square root of the covariance, and the size of the negative eigenvalues set to 0 for it.

        Their size is the ratio of their sum to that of the others.

        Raises:
            ArithmeticError: if the eigenvalues and eigenvectors do not give the covariance back.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        _refuse_wrong((vectors * values) @ vectors.T - self.covariance, self.covariance)
        kept = values.clamp(min=0)
        negative = (kept - values).sum() / kept.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return (vectors * kept.sqrt()) @ vectors.T, negative.item()

    @property
    def _scatter(self) -> Tensor:
        assert self.count is not None
        return self.covariance * max(self.count - 1, 0)


class FrechetDistance(NamedTuple):
    """The squared distance, as FID is reported, and what makes it less than it seems, in words."""

    distance: float
    notes: list[str]


def frechet_distance(reference: FeatureStatistics, sample: FeatureStatistics) -> FrechetDistance:
    """``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` (Heusel et al. 2017, equation 6).

    The trace of the root is the sum of the singular values of ``C^(1/2) C'^(1/2)``, so that no imaginary part has to be
    dropped. Every decomposition is checked, since linear algebra libraries have had errors that moved FID by tens.

    Raises:
        ValueError: if dimensions differ, a set has fewer than two images, a number is not finite, or a covariance has
            negative eigenvalues that are more than rounding.
        ArithmeticError: if a decomposition is wrong.
    """
    if reference.mean.shape != sample.mean.shape:
        raise ValueError(f"features of {len(sample.mean)} numbers cannot be compared with {len(reference.mean)}")
    notes = []
    for name, statistics in {"reference": reference, "sample": sample}.items():
        count, dim = statistics.count, len(statistics.mean)
        if count is not None and count < 2:
            raise ValueError(f"a covariance needs at least two images, and the {name} has {count}")
        if not (statistics.mean.isfinite().all() and statistics.covariance.isfinite().all()):
            raise ValueError(f"features of the {name} are not finite")
        negative = statistics.root[1]
        told = f"the {name}'s covariance has negative eigenvalues, whose sum is {negative:.1g} of the others'"
        if negative > NEGATIVE_REFUSED:
            raise ValueError(f"{told}: it is no covariance")
        if negative > NEGATIVE_TOLD:
            notes.append(f"{told}; they were set to 0")
        if count is not None and count <= dim:
            notes.append(
                f"the {name} has {count:,} images, not more than the {dim:,} features: its covariance is singular, and "
                "the distance larger than of many images"
            )
    product = reference.root[0] @ sample.root[0]
    values = torch.linalg.svdvals(product)
    _refuse_wrong(values.norm() - product.norm(), product)
    traces = reference.covariance.trace() + sample.covariance.trace() - 2 * values.sum()
    distance = (reference.mean - sample.mean).square().sum() + traces
    return FrechetDistance(max(distance.item(), 0.0), notes)


def _refuse_wrong(error: Tensor, matrix: Tensor) -> None:
    if error.norm() > 1e-8 * matrix.norm():
        raise ArithmeticError(
            f"a matrix was decomposed with a relative error of {error.norm() / matrix.norm():.1g}: the linear algebra "
            "library of this PyTorch is broken. Try another version, or one thread"
        )


def precision_recall(reference: Tensor, sample: Tensor, max_distances: int = 1 << 24) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features ``(i, d)``, with 3 nearest neighbours.

    All pairs are compared, in float64; distances that differ by less than rounding are equal.

    Args:
        max_distances: held in memory at a time, 128 MB of them.

    Raises:
        ValueError: if a set has no more images than neighbours.
    """
    if min(len(reference), len(sample)) <= NEIGHBOURS:
        raise ValueError(
            f"{NEIGHBOURS} neighbours need more images than {len(reference)} of the reference and {len(sample)}"
        )
    reference, sample = reference.double(), sample.double()
    rounding = 1e-12 * max(features.square().sum(1).max() for features in (reference, sample))

    def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
        """Of points ``(p, d)`` to centres ``(i, d)``: ``(p, i)``."""
        return points.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * points @ centres.T

    def covered(points: Tensor, centres: Tensor) -> float:
        rows = max(1, max_distances // len(centres))
        nearest = [squared_distances(part, centres).kthvalue(NEIGHBOURS + 1).values for part in centres.split(rows)]
        radii = torch.cat(nearest) + rounding  # each centre is its own nearest
        inside = [(squared_distances(part, centres) <= radii).any(1) for part in points.split(rows)]
        return torch.cat(inside).double().mean().item()

    return covered(sample, reference), covered(reference, sample)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of the inception score (Salimans et al. 2016), as torch-fidelity has it.

    Images are shuffled, always alike: splits of images in the order of their classes would score far less.

    Args:
        logits: ``(i, k)``.

    Raises:
        ValueError: if there are fewer images than splits.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < splits:
        raise ValueError(f"an inception score over {splits} splits needs as many images, and there are {len(logits)}")
    found = isc_features_to_metric(logits.cpu(), splits)
    return found["inception_score_mean"], found["inception_score_std"]


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What is kept of a set of images, on the CPU.

    Args:
        statistics: of all.
        kept: features of some, ``(i, d)`` float32; i may be 0.
        logits: of all, ``(i, k)`` float32, where the features come with them.
    """

    statistics: FeatureStatistics
    kept: Tensor
    logits: Tensor | None = None

    def over_ranks(self, ranks: Ranks) -> FeatureSet:
        """Of the images of all ranks, on every rank, each of which holds those that follow the last rank's.

        In that order the scores, which shuffle images, are those of one process. All ranks must call it.
        """
        logits = [part for part in ranks.gather(self.logits) if part is not None]
        kept = torch.cat(ranks.gather(self.kept))
        return FeatureSet(self.statistics.over_ranks(ranks), kept, torch.cat(logits) if logits else None)


class FeatureCollector:
    """Takes in the images of a set, batch by batch; how they are batched changes nothing but rounding.

    Args:
        features: the network.
        kept: numbers, from 0, of the images whose features are kept for precision and recall.
        first: number of the first image, where another rank has those before it.
    """

    def __init__(
        self, features: DistributionFeatures, kept: Container[int] = range(MAX_KEPT), first: int = 0
    ) -> None:
        self.features = features
        self._wanted = kept
        self._statistics: FeatureStatistics | None = None
        self._seen = first
        self._kept: list[Tensor] = [torch.empty(0, features.dim)]
        self._logits: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Images ``(b, 3, h, w)`` uint8, on any device.

        Raises:
            ValueError: if they are something else, or have features that are not finite.
        """
        found = self.features(images)
        if not found.features.isfinite().all():
            raise ValueError(f"{type(self.features).__name__} gives features that are not finite")
        statistics = FeatureStatistics.of(found.features)
        self._statistics = self._statistics.merged(statistics) if self._statistics else statistics
        rows = [row for row in range(len(images)) if self._seen + row in self._wanted]
        self._kept.append(found.features[rows].float().cpu())
        if found.logits is not None:
            self._logits.append(found.logits.float().cpu())
        self._seen += len(images)

    def collected(self) -> FeatureSet:
        """What there is of the images so far."""
        statistics = self._statistics or FeatureStatistics.of(torch.empty(0, self.features.dim))
        return FeatureSet(statistics.cpu(), torch.cat(self._kept), torch.cat(self._logits) if self._logits else None)


def distances(features: DistributionFeatures, reference: FeatureSet, sample: FeatureSet) -> dict[str, Any]:
    """Every number of ``DEFINITIONS`` by the name that these features give it; plain JSON types only.

    Raises:
        ValueError, ArithmeticError: see ``frechet_distance``.
    """
    distance, notes = frechet_distance(reference.statistics, sample.statistics)
    numbers: dict[str, Any] = {features.metric: distance, "images": sample.statistics.count}
    precision, recall = None, None
    if enough := min(len(reference.kept), len(sample.kept)) > NEIGHBOURS:
        precision, recall = precision_recall(reference.kept, sample.kept)
    numbers |= {f"precision{features.suffix}": precision, f"recall{features.suffix}": recall}
    numbers["neighbours_of"] = [len(reference.kept), len(sample.kept)] if enough else None
    return numbers | scores(sample) | {"notes": notes}


def scores(sample: FeatureSet, splits: int = 10) -> dict[str, float]:
    """The inception score and its deviation, where there are logits of enough images."""
    if sample.logits is None or len(sample.logits) < splits:
        return {}
    return dict(zip(("inception_score", "inception_score_std"), inception_score(sample.logits, splits), strict=True))
