from __future__ import annotations

from functools import partial
from typing import Any

from framework.config.registry import Factory
from framework.data.data import Data
from framework.data.interface import ImageData
from framework.data.photos import Photos


def test_each_set_is_built_once_when_asked_for() -> None:
    built: list[dict[str, Any]] = []

    def recording(split: Any) -> Factory[ImageData]:
        def build(**given: Any) -> ImageData:
            built.append({"split": split, **given})
            return Photos(split, 4, **given)

        return build

    data = Data(8, recording("train"), recording("validation"), recording("test"), num_workers=2, seed=5)
    assert built == [] and data.num_workers == 2 and data.image_size == 8
    assert data.test is data.test
    assert built == [{"split": "test", "image_size": 8, "training": False, "seed": 5}]
    assert data.train.protocol()["split"] == "train" and data.validation.protocol()["split"] == "validation"
    assert [call["training"] for call in built] == [False, True, False]


def test_evaluation_images_are_the_same_for_every_run() -> None:
    train, validation, test = partial(Photos, "train", 6), partial(Photos, "validation", 6), partial(Photos, "test", 6)
    one, other = (Data(8, train, validation, test, seed=seed) for seed in (0, 1))
    assert one.validation.fetch(range(6), 0).images.equal(other.validation.fetch(range(6), 3).images)
    assert one.test.fetch(range(6), 0).keys == other.test.fetch(range(6), 0).keys
    assert not one.train.fetch(range(6), 0).images.equal(other.train.fetch(range(6), 0).images)
