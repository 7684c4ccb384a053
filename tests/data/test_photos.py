from __future__ import annotations

import pickle
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.data import photos
from framework.data.photos import SPLITS, Photos


def crops(split: Any = "validation", num_crops: int = 24, **given: Any) -> Photos:
    return Photos(split, num_crops, **{"image_size": 16, "training": False, "seed": 0, **given})


def augmented(**given: Any) -> Photos:
    return crops(num_crops=400, training=True, **given)


def test_images_are_floats_in_the_unit_range_with_names() -> None:
    data = crops()
    batch = data.fetch([0, 5, 23], epoch=0)
    assert len(data) == 24
    assert batch.images.shape == (3, 3, 16, 16) and batch.images.dtype == torch.float32
    assert 0 <= batch.images.min() and batch.images.max() <= 1 and batch.images.std() > 0.05
    assert batch.groups == ["chelsea", "coins", "coins"]
    assert batch.keys[0].startswith("chelsea@") and len(set(data.keys)) == 24
    assert batch.labels is None


def test_key_names_the_pixels_that_were_cut() -> None:
    data = crops("test", 40)
    for index in (0, 7, 30):
        batch = data.fetch([index], epoch=0)
        x, y, size = map(int, batch.keys[0].split("@")[1].split(","))
        cut = data.whole(batch.groups[0])[:, y : y + size, x : x + size]
        assert cut.shape == (3, size, size) and size >= 16
        torch.testing.assert_close(batch.images[0].mean((1, 2)), cut.mean((1, 2)), atol=0.02, rtol=0)


def test_no_photograph_is_in_two_splits() -> None:
    files = [file for scenes in SPLITS.values() for paths in scenes.values() for file in paths]
    names = [scene for scenes in SPLITS.values() for scene in scenes]
    assert len(set(files)) == len(files) == 18 and len(set(names)) == len(names)
    assert min(len(SPLITS["validation"]), len(SPLITS["test"])) >= 3
    for split in SPLITS:
        data = crops(split, len(SPLITS[split]))
        assert data.groups == list(SPLITS[split])


def test_both_motorcycle_pictures_are_one_group() -> None:
    data = crops("train", 20)
    assert [key.split("@")[0] for key in data.keys if "motorcycle" in key] == ["motorcycle_left", "motorcycle_right"]
    assert data.groups.count("motorcycle") == 2


def test_grey_photographs_have_three_equal_channels() -> None:
    batch = crops().fetch([2], epoch=0)  # coins
    assert torch.equal(batch.images[:, 0], batch.images[:, 1]) and torch.equal(batch.images[:, 0], batch.images[:, 2])


def test_crops_ignore_the_seed_and_more_crops_extend_the_list() -> None:
    few, many = crops(seed=0), crops(num_crops=40, seed=1)
    assert many.keys[:24] == few.keys
    assert torch.equal(many.images[:24], few.images)


def test_sides_are_log_uniform_down_to_min_crop() -> None:
    sides = [int(key.split(",")[2]) for key in crops(num_crops=600, min_crop=30, max_crop=1.0, image_size=4).keys]
    assert 30 <= min(sides) < 33 and max(sides) > 380
    assert 85 < sorted(sides)[300] < 125  # the geometric mean of 30 and about 350; the arithmetic one is 190


def test_max_crop_is_a_share_of_the_shorter_side() -> None:
    sides = [int(key.split(",")[2]) for key in crops(num_crops=600, min_crop=30, max_crop=0.25, image_size=4).keys]
    assert min(sides) < 32 and 100 < max(sides) <= 427 // 4
    with pytest.raises(ValueError, match="max_crop is a share of the shorter side, above 0 and at most 1; got 2"):
        crops(max_crop=2.0)


def test_evaluation_is_the_same_in_every_epoch() -> None:
    data = crops()
    assert torch.equal(data.fetch(range(8), epoch=0).images, data.fetch(range(8), epoch=3).images)


def test_augmentation_is_a_flip_and_a_channel_order_with_the_given_probabilities() -> None:
    plain = crops(num_crops=400).images.float() / 255
    flipped = augmented(flip=1.0, permute_channels=0.0).fetch(range(400), epoch=0).images
    assert torch.equal(flipped, plain.flip(-1))
    permuted = augmented(flip=0.0, permute_channels=1.0).fetch(range(400), epoch=0).images
    assert torch.equal(permuted.sort(dim=1).values, plain.sort(dim=1).values)
    half = augmented(permute_channels=0.0).fetch(range(400), epoch=0).images
    assert 0.4 < (half == plain).flatten(1).all(1).float().mean() < 0.6


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    data = augmented()
    together = data.fetch(range(40), epoch=2).images
    one_by_one = torch.cat([data.fetch([index], epoch=2).images for index in reversed(range(40))]).flip(0)
    assert torch.equal(together, one_by_one)
    assert torch.equal(together, augmented().fetch(range(40), epoch=2).images)
    assert not torch.equal(together, data.fetch(range(40), epoch=3).images)
    assert not torch.equal(together, augmented(seed=1).fetch(range(40), epoch=2).images)


def test_whole_is_the_photograph() -> None:
    whole = crops().whole("chelsea")
    assert whole.shape == (3, 300, 451) and whole.dtype == torch.float32
    assert 0 <= whole.min() and 0.9 < whole.max() <= 1


def test_protocol_can_be_stored() -> None:
    protocol = crops().protocol()
    assert protocol["split"] == "validation" and protocol["count"] == 24 and protocol["augmentation"] == "none"
    assert "bicubic" in str(protocol["resize"]) and "from 16" in str(protocol["crop"])


def test_travels_to_a_worker() -> None:
    data = crops(training=True)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.fetch([3], epoch=1).images, data.fetch([3], epoch=1).images)


def test_a_missing_file_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("skimage", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(photos, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError) as caught:
        crops()
    assert str(caught.value) == (
        f"Photos reads skimage/data/chelsea.png, but the package scikit-image at {tmp_path} lacks the file. "
        "Repair it: pip install --force-reinstall scikit-image"
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="chelsea.png, but the package scikit-image is not installed"):
        crops()


def test_crops_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        crops(image_size=512)
    assert str(caught.value) == (
        "Photos: crops of at least 512 pixels do not fit skimage/data/chelsea.png (451x300) with max_crop 0.5; "
        "set min_crop to at most 150, or max_crop higher"
    )
    with pytest.raises(ValueError, match="num_crops must be at least 1, got 0"):
        crops(num_crops=0)
