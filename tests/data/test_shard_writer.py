"""Writing shards: the same bytes whatever the processes, whatever the interruptions; and shards from elsewhere."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from framework.data import shard_index
from framework.data.interface import TooManyBroken
from framework.data.shard_index import Members
from framework.data.transforms import open_image
from framework.runtime import files
from framework.runtime.files import digest
from tests.tiny_run import run_tool

from .conftest import MakeImages
from .make_shards import indexed, shards, written

NAMES = [f"{'cat' if number % 2 else 'dog'}/{number}.{'png' if number % 3 else 'jpg'}" for number in range(14)]


@pytest.fixture
def images(make_images: MakeImages) -> Path:
    return make_images(*(f"images/{name}" for name in NAMES)) / "images"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}


def samples(folder: Path) -> list[dict[str, Any]]:
    """As WebDataset itself reads them."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False))


# What is written


def test_webdataset_reads_the_files_themselves_and_their_classes(images: Path, tmp_path: Path) -> None:
    written(images, tmp_path / "out")
    read = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    for name in NAMES:
        key, _, extension = name.rpartition(".")
        assert read[str(key)][extension] == (images / name).read_bytes()
        assert read[str(key)]["cls"] == (b"1" if name.startswith("dog") else b"0")
    order = [sample["__key__"] for sample in samples(tmp_path / "out")]
    assert len(order) == 14 and order != sorted(order)


def test_the_index_says_what_there_is(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (images / "cat/bad.png").write_text("no image")
    progress: list[Any] = []
    index = written(images, out, progress=lambda *state: progress.append(state))
    fields = json.loads((out / "index.json").read_text())
    assert fields["version"] == 1 and fields["total"] == 14 and fields["classes"] == ["cat", "dog"]
    assert fields["num_left_out"] == 1 and list(fields["left_out"]) == ["cat/bad.png"]
    assert fields["left_out"]["cat/bad.png"].startswith("no image in a format")
    assert [shard["name"] for shard in fields["shards"]] == [f"{number:05}.tar" for number in range(4)]
    for shard in fields["shards"]:
        path = out / shard["name"]
        assert shard["sha256"] == digest(path) and shard["bytes"] == path.stat().st_size
        assert shard["members_sha256"] == digest(out / f"{path.stem}.members.json")
    assert progress[-1] == ("images", 15, 15) and len(progress) == 4
    size = sum(shard["bytes"] for shard in fields["shards"]) / 1e6
    assert index.line("here") == (
        f"here: 14 images in 4 shards, {size:.1f} MB, 2 classes, 1 images left out\n"
        f"  cat/bad.png: {fields['left_out']['cat/bad.png']}"
    )


def test_names_with_dots_of_one_stem_long_or_foreign(make_images: MakeImages, tmp_path: Path) -> None:
    long = "x" * 120 + "/" + "y" * 110
    names = ["a.jpg", "a.png", "b.1.png", "b.2.png", "ä/ü.png", f"{long}.png"]
    root = make_images(*(f"images/{name}" for name in names)) / "images"
    written(root, tmp_path / "out")
    keys = {"a", "a_png", "b_1", "b_2", "ä/ü", long}
    assert {sample["__key__"] for sample in samples(tmp_path / "out")} == keys
    data = shards(tmp_path / "out")
    assert {data.key(index).partition("/")[2] for index in range(6)} == keys and not data.fetch(range(6), 0).broken

    (tmp_path / "list").write_text("b.1.png 0\na.jpg 0\nb.1.png 0\nb.1.png 0\n")
    with pytest.raises(ValueError, match="b.1.png and b.1.png would both be the sample b_1_png: rename one of them"):
        written(root, tmp_path / "twice", files=str(tmp_path / "list"))


def test_resizing_changes_only_what_is_larger(make_images: MakeImages, tmp_path: Path) -> None:
    make_images("images/large.png", size=(60, 90))
    root = make_images("images/small.png", size=(40, 20)) / "images"
    written(root, tmp_path / "out", resize=30)
    read = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    assert read["small"]["png"] == (root / "small.png").read_bytes()
    large = Image.open(io.BytesIO(read["large"]["jpg"]))
    assert large.size == (30, 45) and large.format == "JPEG"
    plain = open_image(root / "large.png").resize((30, 45), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(large, float) - np.asarray(plain, float)).mean() < 5


def test_shards_of_about_a_size(make_images: MakeImages, tmp_path: Path) -> None:
    root = make_images(*(f"images/{number}.png" for number in range(20)), size=(60, 60)) / "images"  # 11 KB each
    index = written(root, tmp_path / "out", images_per_shard=None, shard_size=0.05)
    assert [shard.samples for shard in index.shards] == [4] * 5
    assert all(4e4 < shard.bytes < 6.5e4 for shard in index.shards)


def test_lists_choose_images_and_name_classes(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("dog\n")
    assert written(images, tmp_path / "dogs", classes=str(tmp_path / "classes")).classes == ["dog"]
    assert len(samples(tmp_path / "dogs")) == 7
    (tmp_path / "files").write_text("cat/1.png 5\ndog/2.png 3\ncat/5.png 3\n")
    written(images, tmp_path / "listed", files=str(tmp_path / "files"))
    read = {sample["__key__"]: sample["cls"] for sample in samples(tmp_path / "listed")}
    assert read == {"cat/1": b"5", "dog/2": b"3", "cat/5": b"3"}


# The same bytes, whole or not there


def test_neither_processes_nor_interruptions_change_a_byte(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "cat/bad.png").write_text("no image")
    written(images, tmp_path / "one")
    expected = contents(tmp_path / "one")
    assert len(expected) == 9
    written(images, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == expected

    def full(shard: str) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(shard + ".partial"):
                raise OSError(errno.ENOSPC, "No space left on device")

        return fsync

    for number, name in enumerate(("00001.tar", "00002.members.json", "index.json")):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: .*/{name}"):
            patch.setattr(files, "_fsync", full(name))
            written(images, out)
        left = contents(out)
        assert "index.json" not in left and name not in left
        assert not list(out.glob("*.partial"))
        written(images, out)
        assert contents(out) == expected


def _write_and_die(images: Path, out: Path) -> None:
    def die(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("00002.tar.partial"):
            os._exit(9)

    files._fsync = die
    written(images, out)


def test_a_killed_run_goes_on_behind_its_whole_shards(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(images, tmp_path / "whole")
    out = tmp_path / "out"
    process = get_context("fork").Process(target=_write_and_die, args=(images, out))
    process.start()
    process.join()
    assert process.exitcode != 0  # a worker that dies breaks the pool
    left = sorted(path.name for path in out.glob("*.tar*"))
    assert left == ["00000.tar", "00001.tar", "00002.tar.partial"]
    before = (out / "00001.tar").stat().st_mtime_ns
    written(images, out)
    assert contents(out) == contents(tmp_path / "whole") and (out / "00001.tar").stat().st_mtime_ns == before
    assert not list(out.glob("*.partial"))
    for path in images.rglob("*.png"):
        path.write_text("not read again")
    assert written(images, out).left_out == {} and contents(out) == contents(tmp_path / "whole")


def _write_until_the_first_shard_and_die(images: Path, out: Path, pids: Path) -> None:
    def die(*_: object) -> None:
        pids.write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
        os._exit(9)

    written(images, out, images_per_shard=1, workers=2, progress=die)


def test_workers_end_with_their_parent(images: Path, tmp_path: Path) -> None:
    process = get_context("fork").Process(
        target=_write_until_the_first_shard_and_die, args=(images, tmp_path / "out", tmp_path / "pids")
    )
    process.start()
    process.join()
    pids = (tmp_path / "pids").read_text().split()
    assert process.exitcode == 9 and len(pids) == 2
    for _ in range(500):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        alive = [state for state in states if state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"]
        if not alive:
            break
        time.sleep(0.02)
    assert not alive


def test_another_set_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(images, out)
    before = contents(out)
    for given in ({"images_per_shard": 5}, {"resize": 8}):
        with pytest.raises(FileExistsError, match=f"{out} holds other files, or shards of other images or settings"):
            written(images, out, **given)
    assert contents(out) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/list.txt").touch()
    with pytest.raises(FileExistsError, match="Choose another OUT"):
        written(images, tmp_path / "notes")
    with pytest.raises(FileExistsError, match=f"{out}/index.json exists; remove it to make it anew"):
        indexed(out)


def test_too_many_broken_images_stop_it_and_allowing_more_goes_on(images: Path, tmp_path: Path) -> None:
    for name in NAMES[:3]:
        (images / name).write_text("no image")
    with pytest.raises(TooManyBroken, match="of 14 images cannot be read"):
        written(images, tmp_path / "out", max_broken=0.1)
    assert not (tmp_path / "out/index.json").exists()
    assert set(written(images, tmp_path / "out", max_broken=0.25).left_out) == set(NAMES[:3])
    assert len(samples(tmp_path / "out")) == 11


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        written(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="no images in"):
        written(tmp_path, tmp_path / "out")


# Shards from elsewhere

PNG = io.BytesIO()
Image.new("RGB", (20, 20), "red").save(PNG, "PNG")
RED = PNG.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    tar(folder / "train-b.tar", ("__meta__/x.jpg", b""), ("7.WEBP", RED), ("7.json", b"{}"), ("7.cls", b"2\n"))
    tar(folder / "train-a.tar", ("./0.cls", b"0"), ("./0.input.jpeg", RED), ("text.json", b"{}"), (".x.png", RED))
    index = indexed(folder)
    assert [shard.name for shard in index.shards] == ["train-a.tar", "train-b.tar"]
    assert index.classes == ["0", "1", "2"] and index.left_out == {"train-a/text": "no image in the sample"}
    batch = shards(folder).fetch([0, 1], 0)
    assert batch.keys == ["train-a/./0", "train-b/7"] and batch.labels is not None and batch.labels.tolist() == [0, 2]
    assert (batch.images[:, 0] == 1).all() and (batch.images[:, 1:] == 0).all()
    assert shards(folder).protocol()["images"] == "as they came in the shards"


def test_names_of_the_classes_of_others(tmp_path: Path) -> None:
    folder, names = tmp_path / "theirs", tmp_path / "names"
    tar(folder / "a.tar", ("0.png", RED), ("0.cls", b"1"))
    names.write_text("cat\n")
    with pytest.raises(ValueError, match=r"names names 1 classes, and samples have 2 \(.cls in a.tar\)"):
        indexed(folder, names)
    names.write_text("cat\ndog\nowl\n")
    assert indexed(folder, names).classes == ["cat", "dog", "owl"]
    (folder / "index.json").unlink()
    tar(folder / "a.tar", ("0.png", RED))
    with pytest.raises(ValueError, match=r"names 3 classes, and samples have 0"):
        indexed(folder, names)
    assert indexed(folder).classes is None and shards(folder).fetch([0], 0).labels is None


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a/0.png", RED), ("b.png", RED), ("a/0.jpg", RED)], "bad.tar: two images have the key a/0"),
        ([("0.png", RED), ("0.cls", b"cat")], "bad.tar: the sample 0 has the class 'cat'; classes are numbers from 0"),
        ([("0.png", RED), ("0.cls", b"1"), ("1.png", RED)], "bad.tar: the sample 1 has no class"),
        ([("0.txt", b"text")], "there are no images in the 1 .tar files of"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named(members: list[tuple[str, bytes]], words: str, tmp_path: Path) -> None:
    tar(tmp_path / "theirs/bad.tar", *members)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        indexed(tmp_path / "theirs")
    assert not (tmp_path / "theirs/index.json").exists()


def test_classes_in_some_shards_only(tmp_path: Path) -> None:
    tar(tmp_path / "theirs/a.tar", ("0.png", RED), ("0.cls", b"1"))
    tar(tmp_path / "theirs/b.tar", ("0.png", RED))
    with pytest.raises(ValueError, match=r"a.tar has classes \(.cls\) and b.tar has none"):
        indexed(tmp_path / "theirs")


@pytest.mark.parametrize("where", ["in an image", "in a header", "before the end", "not a tar", "changed header"])
def test_a_damaged_shard_gets_no_index(where: str, tmp_path: Path) -> None:
    path = tar(tmp_path / "theirs/a.tar", ("0.png", RED), ("1.png", RED), ("2.png", RED))
    content, last = path.read_bytes(), shard_index.scan(path).images[2]
    end = last.offset + -(-last.size // 512) * 512
    path.write_bytes(
        {
            "in an image": content[: last.offset + 20],
            "in a header": content[: last.offset - 100],
            "before the end": content[:end],
            "not a tar": b"\x1f\x8b" + content,
            "changed header": content[: last.offset - 400] + b"?" + content[last.offset - 399 :],
        }[where]
    )
    behind = {"not a tar": "from its beginning", "before the end": "behind the sample 2"}.get(where, "behind the")
    with pytest.raises(ValueError, match=rf"a.tar cannot be read as a tar {behind}.*; fetch or make it anew"):
        indexed(tmp_path / "theirs")


def test_an_empty_folder_and_a_list_of_members(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no images in the 0 .tar files of"):
        indexed(tmp_path)
    path = tar(tmp_path / "theirs/a.tar", ("0.png", RED))
    shard, members = shard_index.describe(path, {"b.png": "gone"})
    there = Members.parse((path.parent / "a.members.json").read_bytes())
    assert there == members and there.left_out == {"b.png": "gone"} and shard.samples == 1


# The tool


def test_the_tool_writes_goes_on_and_says_what_is_wrong(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert run_tool(monkeypatch, "make_shards", images, out, "--images-per-shard", "5", "--workers", "1") == 0
        assert f"{out}: 14 images in 3 shards, 0.1 MB, 2 classes, 0 images left out\n" in capsys.readouterr().out
    assert run_tool(monkeypatch, "make_shards", images, out) == 2  # another number of images in a shard
    assert "Choose another OUT" in capsys.readouterr().err
    tar(tmp_path / "theirs/a.tar", ("0.png", RED))
    assert run_tool(monkeypatch, "make_shards", "--index", tmp_path / "theirs") == 0
    assert "theirs: 1 images in 1 shards" in capsys.readouterr().out
    for arguments, words in {
        ("--index", images, out): "--index takes DIR, --classes and --workers, nothing else",
        (images,): "OUT is missing",
        (images, out, "--workers", "0"): "must be above 0, got 0",
    }.items():
        assert run_tool(monkeypatch, "make_shards", *arguments) == 2
        assert words in capsys.readouterr().err
