from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.evaluation.distribution_features import DistributionFeatures
from framework.evaluation.distribution_metrics import FeatureCollector, FeatureSet, FeatureStatistics, distances
from framework.evaluation.reference_statistics import Reference, ReferenceFileError, read_reference, write_reference
from framework.runtime.files import digest
from tests.evaluation.toy_features import LikeInception, ToyFeatures


def images(count: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(seed)).byte()


def statistics_of(pictures: Tensor, features: DistributionFeatures) -> FeatureStatistics:
    return FeatureStatistics.of(features(pictures).features)


def pixels(pictures: Tensor) -> NDArray[np.uint8]:
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()


def ours(path: Path, features: DistributionFeatures | None = None) -> FeatureStatistics:
    features = features or ToyFeatures()
    collector = FeatureCollector(features)
    collector.add(images())
    write_reference(path, Reference(collector.collected(), {"data": {"source": "made up"}, "images": 30}), features)
    return collector.collected().statistics


def adm(path: Path, **arrays: Any) -> Path:
    """As ADM's published files are: statistics of the whole set, spatial ones too, and some images."""
    found = statistics_of(images(), LikeInception())
    given = {
        "arr_0": pixels(images(8, seed=1)),
        "mu": found.mean.numpy(),
        "sigma": found.covariance.numpy(),
        "mu_s": np.zeros(5),
        "sigma_s": np.zeros((5, 5)),
    }
    np.savez(path, **{name: array for name, array in (given | arrays).items() if array is not None})
    return path


def assert_same(found: FeatureStatistics, expected: FeatureStatistics) -> None:
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.covariance, expected.covariance)


def test_what_is_written_comes_back_with_its_protocol(tmp_path: Path) -> None:
    written = ours(tmp_path / "folder/reference.npz")
    found = read_reference(tmp_path / "folder/reference.npz", ToyFeatures())
    assert_same(found.images.statistics, written)
    assert found.images.statistics.count == 30 and found.images.kept.shape == (0, 12)
    assert found.protocol == {
        "file": "reference.npz",
        "sha256": digest(tmp_path / "folder/reference.npz"),
        "images": 30,
        "data": {"source": "made up"},
        "features": ToyFeatures().protocol(),
    }


def test_statistics_of_other_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    ours(path)
    with pytest.raises(ReferenceFileError, match="other features: weights_sha256 [0-9a-f]{64}, not [0-9a-f]{64}"):
        read_reference(path, ToyFeatures(gain=2.0))
    with pytest.raises(ReferenceFileError, match="does not say whose features it holds, which are InceptionV3's"):
        read_reference(adm(path), ToyFeatures())


def test_adms_files_give_statistics_of_all_and_features_of_the_images(tmp_path: Path) -> None:
    path = adm(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    found = read_reference(path, LikeInception(), batch_size=3)
    assert_same(found.images.statistics, statistics_of(images(), LikeInception()))
    assert found.images.statistics.count is None and found.protocol["images"] is None
    torch.testing.assert_close(found.images.kept, LikeInception()(images(8, seed=1)).features)
    assert found.protocol["statistics"] == "mu and sigma, taken to be InceptionV3's"
    assert read_reference(path, LikeInception(), max_kept=5).images.kept.shape == (5, 12)
    collector = FeatureCollector(LikeInception())
    collector.add(images(40, seed=2))
    numbers = distances(LikeInception(), found.images, collector.collected())
    assert numbers["fid"] > 0 and numbers["neighbours_of"] == [8, 40] and numbers["notes"] == []


def test_statistics_alone_and_images_alone_will_do(tmp_path: Path) -> None:
    alone = read_reference(adm(tmp_path / "adm_in256_stats.npz", arr_0=None, mu_s=None, sigma_s=None), LikeInception())
    assert_same(alone.images.statistics, statistics_of(images(), LikeInception()))
    for name, save in {"plain": np.savez, "compressed": np.savez_compressed}.items():
        path = tmp_path / f"{name}.npz"
        save(path, arr_0=pixels(images()), arr_1=np.arange(30))
        for batch_size in (1, 7, 30):
            found = read_reference(path, ToyFeatures(), max_kept=4, batch_size=batch_size)
            expected = statistics_of(images(), ToyFeatures())
            torch.testing.assert_close(found.images.statistics.covariance, expected.covariance)
            torch.testing.assert_close(found.images.statistics.mean, expected.mean)
            assert found.images.statistics.count == found.protocol["images"] == 30
            assert found.images.kept.shape == (4, 12) and found.protocol["statistics"] == "of arr_0"


def test_images_are_read_only_as_far_as_needed(tmp_path: Path) -> None:
    read: list[int] = []

    class Counting(LikeInception):
        def extract(self, images: Tensor) -> Any:
            read.append(len(images))
            return super().extract(images)

    read_reference(adm(tmp_path / "a.npz"), Counting(), max_kept=5, batch_size=2)
    assert read == [2, 2, 1]
    read_reference(tmp_path / "a.npz", Counting(), max_kept=0)
    assert read == [2, 2, 1]


SIGMA = np.eye(12)
NO_STATISTICS = {"mu": None, "sigma": None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(2048)}, r"mu has shape \(2048,\), float64, instead of \(12,\)"),
        ({"sigma": np.eye(11)}, r"sigma has shape \(11, 11\)"),
        ({"mu": np.full(12, np.nan)}, "mu is not all finite floats"),
        ({"sigma": np.full((12, 12), np.inf)}, "sigma is not all finite floats"),
        ({"sigma": SIGMA.astype(int)}, "sigma is not all finite floats"),
        ({"sigma": SIGMA.astype(complex)}, "sigma is not all finite floats"),
        ({"sigma": -SIGMA}, "negative variances"),
        ({"sigma": SIGMA + np.arange(12)}, "not symmetric"),
        ({"mu": np.array([{"a": 1}] * 12, dtype=object)}, "Python objects, which are not read"),
        ({"count": np.array(1), "protocol": np.array("{}")}, "says to be of 1 images"),
        ({"count": np.array([7, 8]), "protocol": np.array("{}")}, r"count has shape \(2,\)"),
        ({"count": np.array(9), "protocol": np.array("{")}, "damaged or no .npz file"),
        ({"count": np.array(9), "protocol": np.array("[1]")}, "damaged or no .npz file"),
        ({"count": np.array(9), "protocol": np.array("{}")}, "damaged or no .npz file"),
        ({"count": np.array(9), "protocol": np.array("x" * 300_000)}, "protocol has shape"),
        ({"mu": None}, "of mu and sigma it holds one alone"),
        ({"count": np.array(9)}, "of count and protocol it holds one alone"),
        ({**NO_STATISTICS, "arr_0": None}, "neither mu and sigma nor arr_0, but mu_s, sigma_s"),
        ({**NO_STATISTICS, "arr_0": np.zeros((4, 6, 6, 3))}, r"must be images .* got \(4, 6, 6, 3\) float64"),
        ({**NO_STATISTICS, "arr_0": np.zeros((4, 3, 6, 6), np.uint8)}, r"must be images .* got \(4, 3, 6, 6\)"),
        ({**NO_STATISTICS, "arr_0": np.zeros((0, 6, 6, 3), np.uint8)}, r"must be images .* got \(0, 6, 6, 3\)"),
        ({**NO_STATISTICS, "arr_0": np.asfortranarray(np.zeros((4, 6, 6, 3), np.uint8))}, "row by row"),
    ],
)
def test_wrong_arrays_are_refused_in_words(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ReferenceFileError, match=words) as error:
        read_reference(adm(tmp_path / "wrong.npz", **arrays), LikeInception())
    assert str(error.value).startswith(f"{tmp_path / 'wrong.npz'} cannot be the reference: ")


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_headers_that_promise_too_much_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    for name, shape, dtype in [
        ("arr_0", (10**9, 512, 512, 3), "|u1"),
        ("arr_0", (4, 10**6, 10**6, 3), "|u1"),
        ("mu", (10**13,), "<f8"),
        ("mu", (12,), "<U900000000"),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.npy", header(shape, dtype) + bytes(100))
            archive.writestr("sigma.npy", header((12, 12), "<f8") + bytes(8 * 144))
        with pytest.raises(ReferenceFileError, match="damaged"):
            read_reference(path, LikeInception())


def test_missing_files_are_said_with_what_there_is(tmp_path: Path) -> None:
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match="VIRTUAL_imagenet256_labeled.npz; write_reference makes one"):
            read_reference(path, ToyFeatures())


def torn(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]


def overwritten(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + chance.randbytes(40) + content[at + 40 :]


@pytest.mark.parametrize("damage", [torn, flipped, overwritten])
@pytest.mark.parametrize("kind", ["ours", "adm", "images"])
def test_damage_is_noticed_or_without_effect(
    damage: Callable[[bytes, random.Random], bytes], kind: str, tmp_path: Path
) -> None:
    path, features = tmp_path / "reference.npz", LikeInception()
    if kind == "ours":
        ours(path, features)
    else:
        adm(path, **(NO_STATISTICS | {"mu_s": None, "sigma_s": None} if kind == "images" else {}))
    whole, content = read_reference(path, features).images, path.read_bytes()
    chance, noticed = random.Random(0), 0
    for _ in range(150):
        path.write_bytes(damage(content, chance))
        try:
            found: FeatureSet = read_reference(path, features).images
        except ReferenceFileError:
            noticed += 1
        else:  # for instance in a checksum's own spare bits, or in an array that is not read
            assert_same(found.statistics, whole.statistics)
            assert len(found.kept) in (0, len(whole.kept)) and torch.equal(found.kept, whole.kept[: len(found.kept)])
    assert noticed > (140 if damage is torn else 75)
