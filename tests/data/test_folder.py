from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framework.data.folder import ImageFolder
from framework.data.interface import Batch, in_unit_range
from framework.data.transforms import CenterCrop, RandomResizedCrop

from .conftest import MakeImages


def folder(root: Path | str, training: bool = False, seed: int = 0, **given: Any) -> ImageFolder:
    return ImageFolder(str(root), **given, image_size=16, training=training, seed=seed)


def test_class_folders_are_labelled_by_sorted_name(make_images: MakeImages) -> None:
    data = folder(make_images("dog/b.jpg", "cat/deep/er/z.png", "dog/a.JPEG", "cat/a.webp", "cat-like/c.PNG"))
    batch = data.fetch(range(len(data)), epoch=0)
    assert data.classes == ["cat", "cat-like", "dog"]
    assert batch.keys == ["cat/a.webp", "cat/deep/er/z.png", "cat-like/c.PNG", "dog/a.JPEG", "dog/b.jpg"]
    assert batch.groups == batch.keys
    assert batch.labels is not None and batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [0, 0, 1, 2, 2]
    assert batch.images.shape == (5, 3, 16, 16) and batch.images.dtype == torch.float32
    assert 0 <= batch.images.min() and 0.5 < batch.images.max() <= 1


def test_flat_folder_has_no_labels_and_leaves_other_files_alone(make_images: MakeImages) -> None:
    root = make_images("b.png", "a.png", "sub/c.png", ".hidden.png", ".thumbnails/d.png")
    (root / "notes.txt").write_text("no image")
    data = folder(root)
    assert data.paths == ["a.png", "b.png", "sub/c.png"]
    assert data.fetch([0], epoch=0).labels is None and data.protocol()["classes"] == 0


def test_linked_class_folders_count(make_images: MakeImages) -> None:
    root = make_images("pool/cat/a.png", "set/dog/b.png")
    (root / "set/cat").symlink_to(root / "pool/cat")
    assert folder(root / "set").paths == ["cat/a.png", "dog/b.png"]


def test_evaluation_is_the_centre_crop_in_every_epoch(make_images: MakeImages) -> None:
    data = folder(make_images("a.png"))
    image = Image.open(data.root / "a.png")
    expected = np.asarray(CenterCrop(image_size=16)(image, np.random.default_rng())) / np.float32(255)
    for epoch in (0, 5):
        assert np.array_equal(data.fetch([0], epoch).images[0].permute(1, 2, 0).numpy(), expected)
    assert "bicubic" in str(data.protocol()["crop"]) and data.protocol()["augmentation"] == "none"


def test_augmentation_depends_on_seed_epoch_and_index_alone(make_images: MakeImages) -> None:
    root = make_images(*(f"{number}.png" for number in range(8)))
    data = folder(root, training=True)
    together = data.fetch(range(8), epoch=1).images
    one_by_one = torch.cat([data.fetch([index], epoch=1).images for index in reversed(range(8))]).flip(0)
    assert torch.equal(together, one_by_one)
    assert torch.equal(together, folder(root, training=True).fetch(range(8), epoch=1).images)
    assert not torch.equal(together, data.fetch(range(8), epoch=2).images)
    assert not torch.equal(together, folder(root, training=True, seed=1).fetch(range(8), epoch=1).images)


def test_training_flips(make_images: MakeImages) -> None:
    root = make_images("a.png", size=(16, 16))  # a square leaves the crop no choice
    plain = folder(root).fetch([0], epoch=0).images
    assert torch.equal(folder(root, training=True, flip=1.0).fetch([0], epoch=0).images, plain.flip(-1))
    assert torch.equal(folder(root, training=True, flip=0.0).fetch([0], epoch=0).images, plain)
    assert torch.equal(folder(root, flip=1.0).fetch([0], epoch=0).images, plain)


def test_a_chosen_transform_is_used_and_recorded(make_images: MakeImages) -> None:
    root = make_images("a.png")
    data = folder(root, transform=partial(RandomResizedCrop, scale=0.1))
    assert data.protocol()["crop"] == (
        "random square of area 0.1 to 1, to 16 (Pillow bicubic, antialiased; smaller images are enlarged)"
    )
    assert not torch.equal(data.fetch([0], epoch=0).images, folder(root).fetch([0], epoch=0).images)
    assert torch.equal(data.fetch([0], epoch=0).images, data.fetch([0], epoch=7).images)


def test_whole_is_uncropped(make_images: MakeImages) -> None:
    data = folder(make_images("cat/a.png"))
    whole = data.whole("cat/a.png")
    assert whole.shape == (3, 20, 24)
    pixels = np.asarray(Image.open(data.root / "cat/a.png"))
    assert np.array_equal((whole * 255).round().permute(1, 2, 0).numpy(), pixels)


def test_missing_root_says_where_it_looked_and_how_to_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for root, reason in {
        "photos": f"the folder {tmp_path}/photos does not exist",
        "file": f"the folder {tmp_path}/file is a file",
        "": "root is empty",
    }.items():
        with pytest.raises(FileNotFoundError) as caught:
            folder(root)
        assert str(caught.value) == f"ImageFolder: {reason}. Name a folder of images: data.train.root=DIR"


def test_home_is_expanded(make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(make_images("photos/a.png")))
    assert folder("~/photos").paths == ["a.png"]


def test_a_root_without_images_counts_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/clip.mp4").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError) as caught:
        folder(tmp_path)
    assert str(caught.value) == (
        f"no images in {tmp_path}: 2 files in 1 subfolders, none ends in "
        ".jpg, .jpeg, .jfif, .png, .webp, .bmp, .gif, .ppm, .pgm, .tif, .tiff"
    )


def test_a_folder_that_cannot_be_listed_is_not_left_out_in_silence(
    make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images("cat/a.png", "dog/b.png")
    scandir = os.scandir

    def refuse_dogs(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_dogs)
    with pytest.raises(PermissionError) as caught:
        folder(root)
    assert str(caught.value) == (
        f"ImageFolder: 1 folders below {root} cannot be listed, first dog (Permission denied). "
        "Make them readable, or move them away"
    )


def test_a_list_of_classes_says_which_and_in_which_order(make_images: MakeImages) -> None:
    root = make_images("cat/a.png", "dog/b.png", "owl/c.png", "loose.png", "dog/deep/d.png")
    (root / "classes.txt").write_text("owl\tbird of the night\ndog\n")
    data = folder(root, classes=str(root / "classes.txt"))
    batch = data.fetch(range(len(data)), epoch=0)
    assert data.classes == ["owl", "dog"] and batch.labels is not None
    labels = dict(zip(batch.keys, batch.labels.tolist(), strict=True))
    assert labels == {"dog/b.png": 1, "dog/deep/d.png": 1, "owl/c.png": 0}
    protocol = data.protocol()
    assert protocol["count"] == 3 and protocol["classes"] == 2
    assert re.fullmatch(rf"{root}/classes.txt \(sha256 [0-9a-f]{{12}}\)", protocol["lists"]["classes"])  # type: ignore[index]
    (root / "classes.txt").write_text("owls\n")
    with pytest.raises(ValueError, match="owls: did you mean 'owl'?"):
        folder(root, classes=str(root / "classes.txt"))


def test_a_list_of_files_says_which_in_which_order_and_their_classes(make_images: MakeImages) -> None:
    root = make_images("val_1.png", "val_2.png", "val_3.png", "sub/val_4.png")
    (root / "val.txt").write_text("val_3.png 1\nval_1.png 0\nsub/val_4.png 1\nval_9.png 5\n")
    data = folder(root, files=str(root / "val.txt"))
    batch = data.fetch(range(len(data)), epoch=0)
    assert batch.keys == ["val_3.png", "val_1.png", "sub/val_4.png"]
    assert batch.labels is not None and batch.labels.tolist() == [1, 0, 1]
    assert batch.broken == {"val_9.png": "No such file or directory"}  # named and counted like any other
    assert data.classes == list("012345") and len(data) == 4

    (root / "names.txt").write_text("cat small\ndog large\n")
    (root / "val.txt").write_text("val_3.png dog\nval_1.png cat\n")
    named = folder(root, files=str(root / "val.txt"), classes=str(root / "names.txt"))
    labels = named.fetch([0, 1], epoch=0).labels
    assert named.classes == ["cat", "dog"] and labels is not None and labels.tolist() == [1, 0]
    assert set(named.protocol()["lists"]) == {"classes", "files"}  # type: ignore[call-overload]


def test_the_protocol_can_be_stored_and_says_what_was_done(make_images: MakeImages) -> None:
    protocol = folder(make_images("a.png")).protocol()
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol["crop"] == (
        "shorter side to 16 (Pillow bicubic, antialiased; smaller images are enlarged), centre crop"
    )
    for fact in ("EXIF", "transparency over white", "first frame", "ICC profiles ignored"):
        assert fact in str(protocol["decoding"])


def test_bytes_become_floats_by_one_division(make_images: MakeImages) -> None:
    data = folder(make_images("a.png", "b.png"), training=True)
    read, fetched = data.read([1, 0], epoch=2), data.fetch([1, 0], epoch=2)
    assert read.images.dtype == torch.uint8 and read.keys == fetched.keys
    assert torch.equal(read.images.float() / 255, fetched.images) and fetched.images.is_contiguous()
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    assert torch.equal(in_unit_range(Batch(levels, ["a"], ["a"])).images, levels.float() / 255)
