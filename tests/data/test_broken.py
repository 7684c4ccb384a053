"""Images that cannot be read: each is named with its reason, replaced in training, left out of evaluation."""

from __future__ import annotations

import builtins
import os
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from framework.data.folder import ImageFolder
from framework.data.interface import Batch, ImageData, TooManyBroken
from framework.data.stream import Sequential, Stream
from framework.data.transforms import ImageError, open_image
from tests.data.pictures import empty_png, gradient, picture, png

from .conftest import MakeImages

# Files


def cut(path: Path) -> None:
    picture().resize((64, 64)).save(path.with_suffix(".whole.jpg"))
    path.write_bytes(path.with_suffix(".whole.jpg").read_bytes()[:900])


def damaged_png(path: Path) -> None:
    content = bytearray(png(gradient()))
    content[60:70] = bytes(10)
    path.write_bytes(content)


BROKEN: dict[str, tuple[Any, str]] = {
    "cut.jpg": (cut, "truncated"),
    "damaged.png": (damaged_png, "broken data stream"),
    "empty.webp": (Path.touch, "the file is empty"),
    "text.png": (lambda path: path.write_text("no image"), "no image in a format that is read: JPEG, PNG, WEBP, BMP"),
    "vector.jpg": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image in a"),
    "film.gif": (lambda path: path.write_bytes(b"\0\0\0\x20ftypisom" + bytes(99)), "no image in a format"),
    "gone.png": (lambda path: None, "No such file or directory"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "loop.png": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "pipe.png": (os.mkfifo, "no regular file"),
    "folder.png": (Path.mkdir, "no regular file"),
    "huge.png": (lambda path: path.write_bytes(empty_png(20_000, 6_000)), "120,000,000 pixels, and max_pixels is 100,"),
    "bomb.png": (lambda path: path.write_bytes(empty_png(60_000, 60_000)), "exceeds limit of 178956970 pixels"),
    "float.tif": (lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path), "floating-point pixels"),
    "deep.tif": (lambda path: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path), "32-bit grey"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_is_named_with_its_reason(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    make, reason = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / name)
    assert reason in caught.value.reason and str(tmp_path) not in caught.value.reason
    assert str(caught.value) == f"{tmp_path / name}: cannot be read as an image ({caught.value.reason})"
    assert not recwarn.list


def test_a_file_that_may_not_be_read(make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_images("a.png")
    real = builtins.open  # tests may run as root, who may read everything

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ImageError) as caught:
        open_image(root / "a.png")
    assert caught.value.reason == "Permission denied"


def test_a_lack_of_memory_is_no_fault_of_the_file(make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise MemoryError

    root = make_images("a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        open_image(root / "a.png")


def folder(root: Path, **given: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"image_size": 8, "training": True, "seed": 0, **given})


def test_fetch_leaves_broken_images_out(make_images: MakeImages) -> None:
    root = make_images("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png")
    data = folder(root)
    whole = data.fetch([3, 1, 2, 0], epoch=1)
    (root / "cat/b.png").write_text("no image")
    (root / "dog/d.png").unlink()
    batch = data.fetch([3, 1, 2, 0], epoch=1)
    assert batch.keys == batch.groups == ["dog/c.png", "cat/a.png"]
    assert torch.equal(batch.images, whole.images[2:]) and batch.images.dtype == torch.float32
    assert batch.labels is not None and batch.labels.tolist() == [1, 0]
    assert list(batch.broken) == ["dog/d.png", "cat/b.png"] and batch.broken["dog/d.png"] == "No such file or directory"
    none = data.fetch([1, 3], epoch=0)
    assert none.images.shape == (0, 3, 8, 8) and none.keys == [] and len(none.broken) == 2
    assert none.labels is not None and none.labels.shape == (0,)


def test_max_pixels_refuses_large_and_narrow_images_before_they_take_memory(make_images: MakeImages) -> None:
    root = make_images("a.png", "b.png")
    Image.new("RGB", (1, 900)).save(root / "c.png")
    Image.new("RGB", (31, 32)).save(root / "d.png")
    batch = folder(root, max_pixels=800).fetch(range(4), epoch=0)
    assert batch.keys == ["a.png", "b.png"]  # 24x20 pixels each
    assert batch.broken == {
        "c.png": "900 pixels, and max_pixels is 800",
        "d.png": "992 pixels, and max_pixels is 800",
    }
    assert folder(root, max_pixels=1000).fetch([2, 3], epoch=0).broken == {
        "c.png": "57,600 pixels after resizing 1x900, and max_pixels is 1,000"
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_broken": 1.0}, "max_broken is a share, at least 0 and below 1; got 1"),
        ({"max_broken": -0.1}, "max_broken is a share"),
        ({"max_pixels": 0}, "max_pixels goes from 1 to 178956970, got 0"),
        ({"max_pixels": 10**9}, "max_pixels goes from 1 to 178956970"),
    ],
)
def test_limits_out_of_range_are_refused(given: dict[str, Any], message: str, make_images: MakeImages) -> None:
    with pytest.raises(ValueError, match=message):
        folder(make_images("a.png"), **given)


# Streams


class Numbered(ImageData):
    """Image i is constant i / 1000; those in ``bad`` cannot be read. Counts what is read."""

    image_size = 2

    def __init__(self, count: int, bad: Sequence[int], max_broken: float = 0.5) -> None:
        self.count, self.bad, self.max_broken = count, set(bad), max_broken
        self.tried: Counter[int] = Counter()

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"image {index}"

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        self.tried.update(indices)
        good = [index for index in indices if index not in self.bad]
        names = [f"image {index}" for index in good]
        images = torch.tensor(good, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2) / 1000
        broken = {f"image {index}": f"reason {index}" for index in indices if index in self.bad}
        return Batch(images, names, names, torch.tensor(good, dtype=torch.int64), broken)

    def whole(self, group: str) -> Tensor:
        raise NotImplementedError

    def protocol(self) -> dict[str, object]:
        return {}


def numbers(batches: Sequence[Batch]) -> list[int]:
    """What came, sample by sample; fields that do not belong together fail."""
    for batch in batches:
        assert batch.labels is not None and batch.keys == batch.groups
        assert batch.keys == [f"image {label}" for label in batch.labels.tolist()]
        assert (batch.images[:, 0, 0, 0] * 1000).round().long().equal(batch.labels)
    return [int(key.split()[1]) for batch in batches for key in batch.keys]


def stream(data: ImageData, batch_size: int = 6, **given: Any) -> Stream:
    return Stream(data, batch_size, seed=0, **given)


def test_others_come_in_place_of_broken_images() -> None:
    bad = [2, 7, 8]
    came = list(islice(stream(Numbered(20, bad)), 20))
    assert all(len(batch.images) == 6 for batch in came)
    got, intact = numbers(came), numbers(list(islice(stream(Numbered(20, [])), 20)))
    assert not set(bad) & set(got)
    assert [a for a, b in zip(got, intact, strict=True) if b not in bad] == [b for b in intact if b not in bad]
    met = [set(batch.broken) for batch in came]
    planned = [intact[start : start + 6] for start in range(0, 120, 6)]
    for names, plan in zip(met, planned, strict=True):  # and broken substitutes
        assert {f"image {index}" for index in plan if index in bad} <= names <= {f"image {index}" for index in bad}
        assert bool(names) == bool(set(plan) & set(bad))


def test_substitutes_are_uniform_over_the_whole_set() -> None:
    data = Numbered(10, [4])
    got = numbers(list(islice(stream(data, 10), 1800)))
    extra = Counter(got) - Counter(list(range(10)) * 1800)
    assert set(extra) == set(range(10)) - {4} and sum(extra.values()) == 1800
    assert sum((count - 200) ** 2 / 200 for count in extra.values()) < 26  # chi-square, 8 degrees of freedom, p 0.001
    assert data.tried[4] == 1  # the broken one is not tried again


def test_nothing_depends_on_batches_ranks_and_workers() -> None:
    def data() -> Numbered:
        return Numbered(20, [2, 7, 8])

    whole = numbers(list(islice(stream(data()), 20)))
    assert numbers(list(islice(stream(data(), 4), 30))) == whole
    assert numbers(list(islice(stream(data(), num_workers=2), 20))) == whole
    ranks = [numbers(list(islice(stream(data(), 3, rank=rank, world_size=2), 20))) for rank in range(2)]
    assert ranks == [whole[0::2], whole[1::2]]


def test_the_stream_knows_what_is_broken_and_takes_it_along() -> None:
    bad = [2, 7, 8]
    first = stream(Numbered(20, bad))
    uninterrupted = numbers(list(islice(first, 12)))
    assert first.broken == {f"image {index}": f"reason {index}" for index in bad}
    again = stream(Numbered(20, bad))
    head = numbers(list(islice(again, 5)))
    state = again.state_dict()
    assert state["broken"] == again.broken and state["broken"]
    resumed = stream(Numbered(20, bad))
    resumed.load_state_dict(state)
    assert resumed.broken == state["broken"]
    assert head + numbers(list(islice(resumed, 7))) == uninterrupted
    assert resumed.broken == first.broken
    old = stream(Numbered(20, bad))
    old.load_state_dict({"samples_seen": 30, "num_images": 20})
    assert old.broken == {} and numbers(list(islice(old, 7))) == uninterrupted[30:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_the_share_is_refused_in_words(num_workers: int) -> None:
    allowed = stream(Numbered(20, [2, 7], max_broken=0.1), num_workers=num_workers)
    numbers(list(islice(allowed, 10)))
    assert len(allowed.broken) == 2
    refused = stream(Numbered(20, [2, 7, 8], max_broken=0.1), num_workers=num_workers)
    with pytest.raises(TooManyBroken) as caught:
        list(islice(refused, 10))
    assert len(refused.broken) == 3
    listed = "".join(f"\n  {key}: {reason}" for key, reason in refused.broken.items())
    assert str(caught.value) == (
        f"3 of 20 images cannot be read, 15.00%, and max_broken allows 10.00%. The first:{listed}\n"
        "Repair, replace or remove them, or set max_broken of this data set higher; "
        "python tools/info.py data DIR finds all of them"
    )


@pytest.mark.parametrize("count", [1, 30])
def test_a_set_with_nothing_readable_ends(count: int) -> None:
    data = Numbered(count, range(count), max_broken=0.9)
    with pytest.raises(TooManyBroken, match=f"of {count} images cannot be read"):
        list(islice(stream(data), 50))
    with pytest.raises(TooManyBroken):
        next(stream(data))


def test_files_that_break_or_vanish_during_training(make_images: MakeImages) -> None:
    root = make_images(*(f"{number}.png" for number in range(10)))
    batches = stream(folder(root, max_broken=0.2), 10, num_workers=2)
    first = next(batches)
    (root / "3.png").unlink()
    cut(root / "5.png")
    later = list(islice(batches, 12))
    assert all(batch.images.shape == first.images.shape for batch in later)
    assert set(batches.broken) == {"3.png", "5.png"} and batches.broken["3.png"] == "No such file or directory"
    assert all(not {"3.png", "5.png"} & set(batch.keys) for batch in later[-3:])


# Evaluation


def test_evaluation_leaves_out_and_counts() -> None:
    reader = Sequential(Numbered(20, [3, 8, 9, 10, 11], max_broken=0.25), 4)
    batches = list(reader)
    assert [len(batch.images) for batch in batches] == [3, 4, 4, 4]  # 8 to 11, all broken, are no batch
    assert numbers(batches) == [index for index in range(20) if index not in (3, 8, 9, 10, 11)]
    assert list(reader.broken) == ["image 3", "image 8", "image 9", "image 10", "image 11"]
    assert reader.record() == {"broken": 5, "first_broken": reader.broken}


def test_a_broken_end_is_counted_too() -> None:
    reader = Sequential(Numbered(9, [8]), 4)
    assert len(list(reader)) == 2 and list(reader.broken) == ["image 8"]


def test_the_record_names_twenty() -> None:
    reader = Sequential(Numbered(100, range(30)), 10)
    list(reader)
    record = reader.record()
    assert record["broken"] == 30 and record["first_broken"] == {f"image {i}": f"reason {i}" for i in range(20)}


def test_evaluation_refuses_a_share_of_the_images_asked_for() -> None:
    data = Numbered(100, range(0, 100, 2), max_broken=0.1)
    with pytest.raises(TooManyBroken, match=r"2 of 10 images cannot be read, 20.00%, and max_broken allows 10.00%"):
        list(Sequential(data, 1, limit=10))
