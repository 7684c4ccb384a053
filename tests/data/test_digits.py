from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from framework.config.build import build
from framework.config.load import load_config
from framework.config.registry import Factory
from framework.data.data import Data
from framework.data.digits import Digits, DigitScenes, Split, instances_of, render

SPLITS = get_args(Split)
SETS = (Digits, DigitScenes)


def built(kind: type[Any], split: Any = "test", num_images: int = 200, **given: Any) -> Any:
    return kind(split, num_images, **{"image_size": 32, "training": False, "seed": 0, **given})


def ink(scenes: DigitScenes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean of each quadrant, (n, 4)."""
    return reduce(scenes.images.double() / 255, "n (y h) (x w) -> n (y x)", "mean", y=2, x=2).numpy()


def test_no_digit_is_in_two_splits_and_each_class_is_split_alike() -> None:
    labels = load_digits().target
    by_split = {split: instances_of(split) for split in SPLITS}
    everything = np.concatenate([part for by_class in by_split.values() for part in by_class])
    assert sorted(everything) == list(range(1797))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        for digit, instances in enumerate(by_split[split]):
            assert (labels[instances] == digit).all()
            assert abs(len(instances) - share * (labels == digit).sum()) <= 1
    assert np.corrcoef(np.arange(len(by_split["train"][0])), by_split["train"][0])[0, 1] < 0.3  # not by writer


@pytest.mark.parametrize("kind", SETS)
def test_more_images_extend_the_list_and_neither_seed_nor_training_changes_it(kind: type[Any]) -> None:
    few, many = built(kind, num_images=100), built(kind, seed=1, training=True)
    assert torch.equal(few.images, many.images[:100]) and torch.equal(few.labels, many.labels[:100])
    assert few.keys == many.keys[:100] and few.groups == many.groups[:100] and few.kinds == many.kinds[:100]


@pytest.mark.parametrize("kind", SETS)
def test_images_are_all_different_also_between_splits(kind: type[Any]) -> None:
    sets = [built(kind, split, 400) for split in SPLITS]
    assert len({image.numpy().tobytes() for data in sets for image in data.images}) == 1200
    assert len({key for data in sets for key in data.keys}) == 1200
    groups = [set(data.groups) for data in sets]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_strokes_are_crisp_and_centred_at_every_size(kind: type[Any], size: int) -> None:
    images = built(kind, num_images=400, image_size=size).fetch(range(400), epoch=0).images
    assert images.shape == (400, 3, size, size) and 0 <= images.min() and images.max() == 1
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    solid = 0.3 if kind is DigitScenes and size == 16 else 0.55  # of 8x8 pixels, edges are the larger part
    assert (images == 0).float().mean() > 0.6 and (images > 0.9).float().mean() > solid * images.mean()
    mean = images[:, 0].mean(0)
    centre = torch.stack([(mean.sum(axis) * (torch.arange(size) + 0.5)).sum() / mean.sum() for axis in (0, 1)])
    assert (centre / size - 0.5).abs().max() < 0.03


def test_an_image_is_its_digit_under_a_small_map() -> None:
    """Averaged over many maps, a rendering is the digit itself again, the right way round."""
    instance = instances_of("train")[4][0]
    mean = render(np.full(200, instance), "many", np.arange(200), 48).double().mean(0)[8:40, 8:40]
    original = load_digits().images[instance]
    found = {
        (turns, mirrored): np.corrcoef(
            reduce(mean, "(y h) (x w) -> y x", "mean", y=8, x=8).numpy().flatten(),
            np.rot90(original[:, ::-1] if mirrored else original, turns).flatten(),
        )[0, 1]
        for turns in range(4)
        for mirrored in (False, True)
    }
    assert max(found, key=lambda way: found[way]) == (0, False) and found[0, False] > 0.9


def test_labels_are_right() -> None:
    train, test = built(Digits, "train", 2000), built(Digits, "test", 500)
    neighbours = KNeighborsClassifier(3).fit(train.images.flatten(1), train.labels)
    assert neighbours.score(test.images.flatten(1), test.labels) > 0.9
    assert test.kinds[:12] == ["a 0", "a 1", "a 2", "a 3", "a 4", "a 5", "a 6", "a 7", "a 8", "a 9", "a 0", "a 1"]
    scenes = built(DigitScenes, "test", 500)
    pieces = rearrange(scenes.images, "n (y h) (x w) -> (n y x) (h w)", y=2, x=2)
    inked = pieces.sum(1) > 0
    small = built(Digits, "train", 2000, image_size=16)
    predicted = KNeighborsClassifier(3).fit(small.images.flatten(1), small.labels).predict(pieces[inked])
    assert (predicted == scenes.labels.repeat_interleave(4)[inked].numpy()).mean() > 0.9


def test_keys_and_groups_name_the_digit() -> None:
    data = built(Digits, num_images=400)
    labels = load_digits().target
    for key, group, label in zip(data.keys, data.groups, data.labels, strict=True):
        split, number, rendering = key.split()
        assert split == "test" and group == f"digit {number}" and labels[int(number)] == label
        assert rendering in ("#0", "#1", "#2")
    assert set(Counter(data.groups).values()) == {2, 3} and data.protocol()["instances"] == 179


def test_every_40_scenes_hold_each_class_with_each_number_of_digits() -> None:
    data = built(DigitScenes, num_images=80)
    both = Counter(zip(data.labels.tolist(), data.kinds, strict=True))
    assert set(both.values()) == {2} and len(both) == 40
    assert {kind for _, kind in both} == {"1 digit", "2 digits", "3 digits", "4 digits"}


def test_digits_of_a_scene_lie_in_as_many_random_quadrants() -> None:
    data = built(DigitScenes, num_images=2000)
    inked = ink(data) > 0.01
    assert inked.sum(1).tolist() == [int(kind.split()[0]) for kind in data.kinds]
    for count in (1, 2, 3):
        shares = inked[inked.sum(1) == count].mean(0)
        assert np.abs(shares - count / 4).max() < 0.07
    assert not inked[ink(data) <= 0.01].any() and (ink(data)[~inked] == 0).all()


def test_the_digits_of_a_scene_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray[Any, np.dtype[np.int64]]] = []

    def spy(instances: np.ndarray[Any, np.dtype[np.int64]], address: str, numbers: Any, size: int) -> torch.Tensor:
        drawn.append(np.stack([instances, numbers // 4]))
        return render(instances, address, numbers, size)

    monkeypatch.setattr("framework.data.digits.render", spy)
    data = built(DigitScenes, num_images=2000)
    pairs = Counter(map(tuple, drawn[0].T.tolist()))
    assert set(pairs.values()) == {1} and len(pairs) == 5000
    assert set(Counter(drawn[0][0].tolist())) == set(np.concatenate(instances_of("test")).tolist())
    assert data.protocol()["instances"] == 179


def test_a_sheet_begins_with_the_first_image_of_its_group() -> None:
    data = built(DigitScenes)
    sheet = data.whole(data.groups[13])
    assert sheet.shape == (3, 256, 256)
    assert torch.equal(sheet[:, :32, 32:64], data.fetch([data.groups.index(data.groups[13]) + 1], epoch=0).images[0])
    assert built(Digits, image_size=300, num_images=3).whole("digit 0827").shape == (3, 300, 300)


@pytest.mark.parametrize("kind", SETS)
def test_sizes_and_counts_that_cannot_be_are_refused(kind: type[Any]) -> None:
    for size in (14, 33):
        with pytest.raises(ValueError, match=f"{kind.__name__}: image_size must be even and at least 16, got {size}"):
            built(kind, image_size=size)
    with pytest.raises(ValueError, match=f"{kind.__name__}: num_images must be at least 1, got 0"):
        built(kind, num_images=0)


class Root:
    def __init__(self, data: Factory[Data]) -> None:
        self.data = data


@pytest.mark.parametrize(("file", "kind"), [("digits32", Digits), ("scenes32", DigitScenes)])
def test_the_base_files_name_the_three_splits(file: str, kind: type[Any]) -> None:
    path = Path(__file__).parents[2] / f"projects/_base_/{file}.yaml"
    config = load_config(path, ["data.train.num_images=40"])
    data = build(config, Root, lambda module, path, where: None).data(seed=0)
    assert isinstance(data.train, kind) and isinstance(data.validation, kind) and isinstance(data.test, kind)
    assert [part.protocol()["split"] for part in (data.train, data.validation, data.test)] == [
        "train",
        "validation",
        "test",
    ]
    assert (len(data.validation), len(data.test)) == (2048, 4096) and data.image_size == 32
