from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.data.digits import Digits, DigitScenes
from framework.data.interface import Batch
from framework.data.stream import Sequential, subset
from framework.evaluation.digit_judge import (
    DEFINITIONS,
    DigitJudge,
    JudgeTraining,
    diversity,
    judge_images,
)
from tests.evaluation.fakes import FixedImages
from tests.evaluation.labelled import LabelledImages, blobs

FEW = JudgeTraining(steps=3, batch_size=16)


def digits(split: Any, count: int) -> Digits:
    return Digits(split, count, image_size=16, training=False, seed=0)


def right(judge: DigitJudge, data: Iterable[Batch]) -> float:
    with torch.no_grad():
        return torch.cat([judge(batch.images).argmax(1) == batch.labels for batch in data]).double().mean().item()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> DigitJudge:
    """Trained on digits for about a second; to be read only."""
    training = JudgeTraining(steps=120, batch_size=64)
    return DigitJudge.trained(digits("train", 3000), tmp_path_factory.mktemp("judge"), training)


def test_a_judge_knows_digits_after_little_training(judge: DigitJudge) -> None:
    assert right(judge, Sequential(digits("test", 500), 100)) > 0.9


def test_a_judge_knows_the_digit_of_a_scene(tmp_path: Path) -> None:
    train, test = (
        DigitScenes(split, count, image_size=32, training=False, seed=0)  # type: ignore[arg-type]
        for split, count in (("train", 3000), ("test", 400))
    )
    judge = DigitJudge.trained(train, tmp_path, JudgeTraining(steps=150, batch_size=64))
    assert right(judge, Sequential(test, 100)) > 0.5


def test_the_same_data_and_settings_give_the_same_judge(tmp_path: Path) -> None:
    data = blobs(60, 16, seed=0)
    torch.manual_seed(1)
    one = DigitJudge.trained(data, tmp_path / "one", FEW)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with torch.no_grad():  # as evaluations run
        same = DigitJudge.trained(data, tmp_path / "same", FEW)
    assert torch.equal(torch.get_rng_state(), state) and not same.training
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    other = DigitJudge.trained(data, tmp_path / "one", replace(FEW, seed=1))
    assert not torch.equal(other.head.weight, one.head.weight) and len(list((tmp_path / "one").iterdir())) == 2


def test_a_judge_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    def trained(data: LabelledImages) -> DigitJudge:
        return DigitJudge.trained(data, tmp_path, FEW, lambda *state: told.append(state))

    first = trained(blobs(60, 16, seed=0))
    assert told == [("training the judge", step, 3) for step in (1, 2, 3)]
    again = trained(blobs(60, 16, seed=0))
    assert len(told) == 3 and again.protocol == first.protocol
    assert torch.equal(again.head.weight, first.head.weight) and not again.training
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-40], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert torch.equal(trained(blobs(60, 16, seed=0)).head.weight, first.head.weight)
        assert file.read_bytes() == whole
    assert len(told) == 12
    trained(blobs(60, 16, seed=1))  # its protocol is the same, its images are not
    assert len(told) == 15 and len(list(tmp_path.iterdir())) == 2


def test_numbers_are_those_of_brute_force(judge: DigitJudge) -> None:
    train, held_out = digits("train", 1000), digits("test", 600)
    metrics = judge_images(judge, {"held-out": Sequential(held_out, 50)}, train)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    numbers, protocol = metrics["sets"]["held-out"], metrics["protocol"]
    assert set(numbers) - {"images", "groups"} <= set(DEFINITIONS) | {"nearest_images"}
    assert protocol["judge"]["training"]["steps"] == 120 and protocol["compared_with"]["images"] == 1000
    assert (numbers["images"], numbers["nearest_images"]) == (600, 512)
    assert numbers["accuracy"] == right(judge, Sequential(held_out, 600))
    assert numbers["accuracy_interval"][0] <= numbers["accuracy"] <= numbers["accuracy_interval"][1]

    real, seen = (data.fetch(range(len(data)), 0) for data in (train, held_out))
    with torch.no_grad():
        reference, features = (judge.features(batch.images).double().numpy() for batch in (real, seen))
    assert real.labels is not None and seen.labels is not None
    shares = []
    for label in range(10):
        spreads = [
            np.sqrt(values[labels.numpy() == label].var(0, ddof=1).mean())
            for values, labels in ((features, seen.labels), (reference, real.labels))
        ]
        shares.append(spreads[0] / spreads[1])
    assert numbers["diversity"] == pytest.approx(np.mean(shares))
    overlap = np.sqrt(np.linalg.eigvals(np.cov(reference.T) @ np.cov(features.T)).real.clip(0)).sum()
    offset = ((reference.mean(0) - features.mean(0)) ** 2).sum()
    distance = offset + np.trace(np.cov(reference.T) + np.cov(features.T)) - 2 * overlap
    assert numbers["fd_digit_judge"] == pytest.approx(distance, rel=1e-3)
    some, pixels = (images.flatten(1).double().numpy() for images in (seen.images[subset(600, 512)], real.images))
    nearest = [np.sqrt(((pixels - image) ** 2).mean(1)).min() for image in some]
    for share in (0.05, 0.5):
        assert numbers["nearest"][str(share)] == pytest.approx(np.quantile(nearest, share), rel=1e-3)


def test_copies_collapse_and_wrong_labels_are_seen(judge: DigitJudge) -> None:
    train, held_out = digits("train", 1000), digits("test", 200)
    copies = train.fetch(range(200), 0)
    assert copies.labels is not None
    first = copies.select([int(label) for label in copies.labels])  # images 0 to 9 show digits 0 to 9
    wrong = replace(copies, labels=copies.labels.roll(1))
    sets = {"held-out": Sequential(held_out, 50), "copies": [copies], "collapsed": [first], "wrong": [wrong]}
    found = judge_images(judge, sets, train)["sets"]
    assert found["copies"]["nearest"]["0.5"] < 1e-3 < 0.05 < found["held-out"]["nearest"]["0.05"]
    assert found["copies"]["accuracy"] > 0.9 > 0.1 > found["wrong"]["accuracy"]
    assert found["collapsed"]["diversity"] < 1e-6 and 0.8 < found["copies"]["diversity"] < 1.2
    distances = [found[name]["fd_digit_judge"] for name in ("copies", "held-out", "collapsed")]
    assert distances == sorted(distances) and found["wrong"]["fd_digit_judge"] == distances[0]


def test_images_of_a_class_that_training_has_not_are_wrong(judge: DigitJudge) -> None:
    """A generator may have more classes than its data, and nobody can tell what they look like."""
    some = digits("test", 40).fetch(range(40), 0)
    assert some.labels is not None
    unknown = replace(some, labels=torch.where(torch.arange(40) < 10, 11, some.labels))
    sets = judge_images(judge, {"known": [some], "unknown": [unknown]}, digits("train", 20))["sets"]
    known = (judge(some.images).argmax(1) == some.labels)[10:].double().mean().item()
    assert sets["unknown"]["accuracy"] == pytest.approx(known * 30 / 40) and sets["known"]["accuracy"] > 0


def test_spreads_known_by_hand() -> None:
    features = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(500) % 5
    centres = torch.tensor([0.0, 9.0, -9.0, 3.0, 5.0]).double()[labels, None]
    assert diversity(features * 3 + centres, labels, features, labels) == pytest.approx(3)
    assert diversity(features, torch.arange(500), features, labels) is None
    assert diversity(features, labels, torch.zeros(500, 4).double(), labels) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "no labels. Sets that have them: Digits, .*Without labels: generated"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "labels count from 0, got -1"),
        ({"images": torch.full((4, 3, 16, 16), 1.5)}, r"must be \(b, 3, 16, 16\) in \[0, 1\], .*from 1.5 to 1.5"),
        ({"images": torch.full((4, 3, 16, 16), torch.nan)}, "generated: images must be .*nan"),
        ({"images": torch.zeros(4, 3, 8, 8)}, r"got \(4, 3, 8, 8\)"),
    ],
)
def test_sets_that_cannot_be_judged_are_refused(judge: DigitJudge, change: dict[str, Any], message: str) -> None:
    batch = replace(digits("test", 4).fetch(range(4), 0), **change)
    with pytest.raises(ValueError, match=message):
        judge_images(judge, {"generated": [batch]}, digits("train", 20))


def test_what_else_is_refused(judge: DigitJudge, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generated: a spread needs at least two images, and there are 1"):
        judge_images(judge, {"generated": [digits("test", 1).fetch([0], 0)]}, digits("train", 20))
    with pytest.raises(ValueError, match="no labels. Sets that have them: Digits, DigitScenes, .*given images"):
        DigitJudge.trained(FixedImages(blobs(8, 16, seed=0).images, ["a"] * 8), tmp_path, FEW)
    with pytest.raises(ValueError, match="training mode"):
        judge_images(DigitJudge(3, {}), {}, digits("train", 20))
