from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from framework.evaluation.distribution_metrics import (
    FeatureCollector,
    FeatureSet,
    FeatureStatistics,
    distances,
    frechet_distance,
    inception_score,
    precision_recall,
)
from framework.runtime.ranks import Ranks
from tests.evaluation.toy_features import ToyFeatures


def features(count: int, dim: int, seed: int, spread: float = 1.0, offset: float = 0.0) -> Tensor:
    """Correlated, on a scale like that of pooled activations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)) / dim**0.5
    return (torch.randn(count, dim, generator=generator) * spread) @ mixing + 0.5 + offset


def assert_alike(one: FeatureStatistics, other: FeatureStatistics) -> None:
    assert one.count == other.count
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-11, atol=1e-13)


class ThreadRanks(Ranks):
    """Ranks that are threads of one process; ``shared`` has a place for each."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.shared, self.barrier = rank, len(shared), shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait()
        values = list(self.shared)
        self.barrier.wait()
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        self.shared[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait()
        for column, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([others[column] for others in self.shared]).mean(0))
        self.barrier.wait()


Part = TypeVar("Part", FeatureStatistics, FeatureSet)


def over_threads(parts: Sequence[Part]) -> list[Part]:
    shared: list[Any] = [[] for _ in parts]
    barrier = threading.Barrier(len(parts), timeout=30)
    with ThreadPoolExecutor(len(parts)) as pool:
        ranks = [ThreadRanks(rank, shared, barrier) for rank in range(len(parts))]
        return list(pool.map(lambda part, rank: part.over_ranks(rank), parts, ranks))


def test_statistics_are_numpys() -> None:
    values = features(200, 16, seed=0)
    found = FeatureStatistics.of(values)
    np.testing.assert_allclose(found.mean, values.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-11)
    assert found.count == 200


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [64, 64, 64, 8], [199, 1], [0, 200], [3, 0, 197]])
def test_statistics_do_not_depend_on_batches(sizes: list[int]) -> None:
    values = features(200, 16, seed=0)
    merged = reduce(FeatureStatistics.merged, map(FeatureStatistics.of, values.split(sizes)))
    assert_alike(merged, FeatureStatistics.of(values))


@pytest.mark.parametrize("sizes", [[200], [50, 60, 90], [1, 199], [0, 150, 50]])
def test_statistics_do_not_depend_on_ranks(sizes: list[int]) -> None:
    values = features(200, 16, seed=0)
    for found in over_threads([FeatureStatistics.of(part) for part in values.split(sizes)]):
        assert_alike(found, FeatureStatistics.of(values))
    assert_alike(FeatureStatistics.of(values).over_ranks(Ranks()), FeatureStatistics.of(values))


def test_large_means_cost_no_digits() -> None:
    small = features(300, 8, seed=0).double()
    far = reduce(FeatureStatistics.merged, map(FeatureStatistics.of, (small + 1e6).split(7)))
    torch.testing.assert_close(far.covariance, FeatureStatistics.of(small).covariance, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("count, dim", [(500, 32), (20, 64), (300, 256)])
@pytest.mark.parametrize("spread, offset", [(1.0, 0.0), (0.7, 0.3)])
def test_frechet_distance_is_torch_fidelitys_and_scipys(count: int, dim: int, spread: float, offset: float) -> None:
    sets = features(count, dim, seed=0).double(), features(count + 9, dim, 1, spread, offset).double()
    one, other = map(FeatureStatistics.of, sets)
    found = frechet_distance(one, other).distance
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert found == pytest.approx(frechet_distance(other, one).distance, rel=1e-6)
    if count > dim:  # scipy's root is not to be trusted of singular products
        root = scipy.linalg.sqrtm((one.covariance @ other.covariance).numpy())
        traces = one.covariance.trace() + other.covariance.trace() - 2 * np.trace(root).real
        assert found == pytest.approx(((one.mean - other.mean).square().sum() + traces).item(), rel=1e-8)


def test_of_gaussians_along_axes_it_is_worked_out_by_hand() -> None:
    one = FeatureStatistics(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()), 100)
    other = FeatureStatistics(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()), None)
    assert frechet_distance(one, other) == (pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2), [])


def test_equal_sets_have_no_distance() -> None:
    for count in (10, 500):
        statistics = FeatureStatistics.of(features(count, 64, seed=0))
        assert 0 <= frechet_distance(statistics, statistics).distance < 1e-9
    constant = FeatureStatistics.of(torch.ones(5, 3))
    assert frechet_distance(constant, constant).distance == 0


def test_few_images_are_told() -> None:
    few, many = FeatureStatistics.of(features(64, 64, seed=0)), FeatureStatistics.of(features(65, 64, seed=1))
    (note,) = frechet_distance(many, few).notes
    assert note.startswith("the sample has 64 images, not more than the 64 features: its covariance is singular")
    assert len(frechet_distance(few, few).notes) == 2 and not frechet_distance(many, many).notes


def test_what_is_no_covariance_is_refused_or_told() -> None:
    good = FeatureStatistics.of(features(100, 4, seed=0))

    def with_negative(share: float) -> FeatureStatistics:
        values, vectors = torch.linalg.eigh(good.covariance)
        values[0] = -share * values[1:].sum()
        return FeatureStatistics(good.mean, (vectors * values) @ vectors.T, 100)

    for bad in (with_negative(0.1), FeatureStatistics(good.mean, -good.covariance, 100)):
        with pytest.raises(ValueError, match="the reference's covariance has negative eigenvalues.*is no covariance"):
            frechet_distance(bad, good)
        with pytest.raises(ValueError, match="the sample's covariance has negative eigenvalues.*is no covariance"):
            frechet_distance(good, bad)
    assert "sum is 0.0001 of the others'; they were set to 0" in frechet_distance(with_negative(1e-4), good).notes[0]
    assert frechet_distance(with_negative(1e-12), good).notes == []
    with pytest.raises(ValueError, match="features of the sample are not finite"):
        frechet_distance(good, FeatureStatistics(good.mean, good.covariance * torch.nan, 100))
    with pytest.raises(ValueError, match="at least two images, and the reference has 1"):
        frechet_distance(FeatureStatistics.of(features(1, 4, seed=0)), good)
    with pytest.raises(ValueError, match="features of 4 numbers cannot be compared with 5"):
        frechet_distance(FeatureStatistics.of(features(9, 5, seed=0)), good)


@pytest.mark.parametrize("function", ["eigh", "svdvals"])
def test_broken_linear_algebra_is_noticed(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = FeatureStatistics.of(features(100, 4, seed=0)), FeatureStatistics.of(features(100, 4, seed=1))
    right = getattr(torch.linalg, function)

    def wrong(matrix: Tensor) -> Any:
        found = right(matrix)
        return 1.01 * found if isinstance(found, Tensor) else (found[0] * 1.01, found[1])

    monkeypatch.setattr(torch.linalg, function, wrong)
    with pytest.raises(ArithmeticError, match="relative error of 0.01: the linear algebra library"):
        frechet_distance(one, other)


@pytest.mark.parametrize("max_distances", [1, 100, 1 << 24])
def test_precision_and_recall_are_torch_fidelitys_and_scipys(max_distances: int) -> None:
    real, made = features(90, 8, seed=0).double(), features(70, 8, 1, spread=0.6, offset=0.8).double()
    found = precision_recall(real, made, max_distances)
    options = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(made, real, **options)
    assert found == (pytest.approx(theirs["precision"]), pytest.approx(theirs["recall"]))
    expected = []
    for points, centres in ((made, real), (real, made)):
        radii = np.sort(cdist(centres, centres), axis=1)[:, 3]
        expected.append((cdist(points, centres) <= radii).any(1).mean())
    assert found == tuple(map(pytest.approx, expected)) and 0 < min(found) and max(found) < 1 and found[0] != found[1]


def test_equal_images_lie_in_balls_without_radius() -> None:
    """Of blank images, whose third neighbour is as near as themselves, rounding must not make one fall outside."""
    blank = features(1, 512, seed=0).expand(40, -1)
    moved = blank + 0.01
    assert precision_recall(blank, blank, max_distances=7) == (1, 1)
    assert precision_recall(blank, moved) == (0, 0)
    with pytest.raises(ValueError, match="3 neighbours need more images than 40 of the reference and 3"):
        precision_recall(blank, moved[:3])


def test_inception_score_is_its_definition() -> None:
    logits = 3 * torch.randn(203, 7, generator=torch.Generator().manual_seed(0))
    chances = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(203)]
    scores = []
    for split in range(10):
        part = chances[split * 203 // 10 : (split + 1) * 203 // 10]
        scores.append(np.exp(np.mean([entropy(row, part.mean(0)) for row in part])))
    assert inception_score(logits) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    assert isc_features_to_metric(logits)["inception_score_mean"] == inception_score(logits)[0]
    with pytest.raises(ValueError, match="as many images, and there are 9"):
        inception_score(logits[:9])


def collected(images: Tensor, batch_size: int, **kept: range) -> FeatureCollector:
    collector = FeatureCollector(ToyFeatures(), **kept)
    for batch in images.split(batch_size):
        collector.add(batch)
    return collector


def test_all_numbers_come_by_the_names_of_the_features_and_do_not_depend_on_batches() -> None:
    images = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    others = (images.float() * 0.8).byte()
    found = [
        distances(ToyFeatures(), collected(images, size).collected(), collected(others, size).collected())
        for size in (1, 17, 60)
    ]
    names = ["fd_toy", "images", "precision_toy", "recall_toy", "neighbours_of"]
    assert list(found[0]) == [*names, "inception_score", "inception_score_std", "notes"]
    assert found[0]["images"] == 60 and found[0]["neighbours_of"] == [60, 60] and found[0]["notes"] == []
    for other in found[1:]:
        assert other.pop("notes") == []
        assert other == {name: pytest.approx(value, rel=1e-6) for name, value in found[0].items() if name != "notes"}
    sets = [ToyFeatures()(each).features for each in (images, others)]
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(each.double()) for each in sets), verbose=False)
    assert found[0]["fd_toy"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("sizes", [[60], [20, 25, 15], [0, 59, 1]])
def test_every_number_is_the_same_over_ranks(sizes: list[int]) -> None:
    images = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    others = (images.float() * 0.8).byte()
    wanted = set(range(0, 60, 2))

    def over(images: Tensor) -> list[FeatureSet]:
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        collectors = [FeatureCollector(ToyFeatures(), wanted, start) for start in starts]
        for collector, part in zip(collectors, images.split(sizes), strict=True):
            for batch in part.split(7):
                if len(batch):
                    collector.add(batch)
        return over_threads([collector.collected() for collector in collectors])

    alone = [FeatureCollector(ToyFeatures(), wanted) for _ in range(2)]
    for collector, part in zip(alone, (images, others), strict=True):
        collector.add(part)
    expected = distances(ToyFeatures(), *(collector.collected() for collector in alone))
    for reference, sample in zip(over(images), over(others), strict=True):
        found = distances(ToyFeatures(), reference, sample)
        exact = {key: value for key, value in found.items() if key != "fd_toy"}
        assert exact == {key: value for key, value in expected.items() if key != "fd_toy"}
        assert found["fd_toy"] == pytest.approx(expected["fd_toy"], rel=1e-9)


def test_only_some_features_are_kept() -> None:
    images = torch.randint(256, (20, 3, 8, 8)).byte()
    some = collected(images, 7, kept=range(5, 12)).collected()
    torch.testing.assert_close(some.kept, ToyFeatures()(images[5:12]).features)
    assert some.statistics.count == 20 and some.logits is not None and len(some.logits) == 20
    few = collected(images, 7, kept=range(3)).collected()
    numbers = distances(ToyFeatures(), few, some)
    assert numbers["precision_toy"] is numbers["recall_toy"] is numbers["neighbours_of"] is None
    empty = FeatureCollector(ToyFeatures()).collected()
    with pytest.raises(ValueError, match="at least two images, and the sample has 0"):
        distances(ToyFeatures(), some, empty)


def test_features_that_are_not_finite_are_refused() -> None:
    collector = FeatureCollector(ToyFeatures(gain=float("inf")))
    with pytest.raises(ValueError, match="ToyFeatures gives features that are not finite"):
        collector.add(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
