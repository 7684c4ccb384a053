from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from framework.data.listing import Listing, list_images, read_classes, read_files


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_what_is_listed(tmp_path: Path) -> None:
    root = touch(tmp_path, "b/2.JPG", "b/10.png", "a/x.webp", "a-b/y.bmp", "a/notes.txt", "c/deep/er/z.tiff", "c.gif")
    touch(root, ".hidden/h.png", "a/.h.png")
    assert list_images(root) == Listing(
        ["a/x.webp", "a-b/y.bmp", "b/10.png", "b/2.JPG", "c/deep/er/z.tiff", "c.gif"], num_others=2, num_folders=6
    )


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = touch(tmp_path / "set", "cat/a.png", "dog/b.png")
    touch(tmp_path, "pool/c.png")
    links = {"cat/up": "..", "cat/self": ".", "dog/across": "../cat", "cat/across": "../dog", "owl": "../pool"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    (tmp_path / "pool/back").symlink_to(root)
    listing = list_images(root)
    assert listing.images == ["cat/a.png", "cat/across/b.png", "dog/across/a.png", "dog/b.png", "owl/c.png"]
    assert sorted(listing.links) == ["cat/across", "dog/across", "owl"]
    assert sorted(listing.loops) == [
        "cat/across/across", "cat/self", "cat/up", "dog/across/across", "dog/across/self", "dog/across/up", "owl/back"
    ]  # fmt: skip


def test_dangling_links_and_odd_names_are_listed_to_be_found_broken(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "gone").symlink_to("nowhere")
    try:
        os.close(os.open(os.fsencode(tmp_path) + b"/na\xefve.png", os.O_CREAT))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert list_images(tmp_path).images == ["gone.png", "na\\xefve.png"]


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path, "cat/a.png", "dog/b.png", "owl/c.png")
    scandir, stat = os.scandir, os.stat

    def refusing(real: Any, name: str) -> Any:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **options)

        return call

    monkeypatch.setattr(os, "scandir", refusing(scandir, "dog"))
    monkeypatch.setattr(os, "stat", refusing(stat, "owl"))
    listing = list_images(root)
    assert listing.images == ["cat/a.png"]
    assert listing.unreadable == {"dog": "Permission denied", "owl": "Permission denied"}


def test_classes_with_and_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("n02 dog, hound\n\nn01\tcat\n golden retriever \nbig cat\ttiger\n")
    folders = {"n01", "n02", "n03", "golden retriever", "big cat", "golden"}
    assert read_classes(file, folders) == ["n02", "n01", "golden retriever", "big cat"]
    assert read_classes(file, None) == ["n02", "n01", "golden", "big"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cat\ndgo\nbird\n",
            "FILE: 2 of 3 classes have no folder with images, first:\n  dgo: did you mean 'dog'?\n  bird\n"
            "there are 3 folders with images: cat, dog, owl",
        ),
        ("cat\ndog x\ncat y\ndog\n", "FILE: listed twice: cat, dog"),
        ("\n \n", "FILE: lists no class"),
    ],
)
def test_classes_that_do_not_fit(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_classes(file, {"cat", "dog", "owl"})
    assert str(caught.value) == message.replace("FILE", str(file))


def test_files_with_numbers_and_names(tmp_path: Path) -> None:
    file = tmp_path / "val.txt"
    file.write_bytes(b"\xef\xbb\xbfb.jpg 2\r\nsub/a b.jpg\t0\r\n\r\n")
    assert read_files(file, []) == (["b.jpg", "sub/a b.jpg"], [2, 0])
    file.write_text("b.jpg dog\na.jpg 0\n")
    assert read_files(file, ["cat", "dog"]) == (["b.jpg", "a.jpg"], [1, 0])


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("a.jpg 1\nb.jpg\n", [], "FILE:2: each line is a relative path and a class, a number; got 'b.jpg'"),
        (
            "a.jpg dgo\n",
            ["cat", "dog"],
            "FILE:1: each line is a relative path and a class, a number below 2 or one of 2 names; "
            "got 'a.jpg dgo': did you mean 'dog'?",
        ),
        ("\na.jpg 2\n", ["cat", "dog"], "FILE:2: each line is a relative path and a class, a number below 2 or one of "
         "2 names; got 'a.jpg 2'"),
        ("\n", [], "FILE: lists no image"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(text: str, classes: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "val.txt"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_files(file, classes)
    assert str(caught.value) == message.replace("FILE", str(file))
