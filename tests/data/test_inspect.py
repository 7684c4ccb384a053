from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from framework.data.inspect import Facts, Inspection, inspect_folder
from framework.data.listing import Listing

from .conftest import MakeImages


def inspected(root: Path, classes: str | None = None, decode: int = 100, workers: int = 0) -> Inspection:
    return inspect_folder(str(root), classes, decode, workers, lambda *state: None)


@pytest.fixture
def wild(make_images: MakeImages) -> Path:
    root = make_images("cat/1.png", "cat/2.png", "cat/3.jpg", "dog/1.png", "owl/1.webp", "owl/2.png")
    Image.new("L", (300, 100)).save(root / "dog/2.png")
    (root / "cat/text.png").write_text("no image")
    (root / "cat/note.png").write_text("no image either")
    (root / "owl/2.png").write_bytes((root / "owl/2.png").read_bytes()[:900])  # its header is right
    (root / "notes.txt").touch()
    (root / "dog/again.png").symlink_to("1.png")
    (root / "owl/up").symlink_to("..")
    (root / "dog/cats").symlink_to("../cat")
    return root


def test_everything_is_counted_and_named(wild: Path) -> None:
    found = inspected(wild)
    lines = list(found.lines())
    assert lines[:8] == [
        f"{wild}: 15 images, 1 other files, 4 subfolders",
        "classes: 3, images in each: 2 to 8, median 5",
        "  largest: dog (8), cat (5), owl (2); smallest: owl (2), cat (5), dog (8)",
        "formats: PNG 8, JPEG 2, WEBP 1",
        "modes: RGB 10, L 1",
        "shorter side: 20 to 100, median 20; 10 below 64, 11 below 128, 11 below 256, 11 below 512",
        "longer side: 24 to 300, median 24",
        "width / height: 1.2 to 3, median 1.2",
    ]
    assert re.fullmatch(r"decoded: 10 of 15, [1-9]\d+ images/s in one process", lines[8])
    assert lines[9:14] == [
        "links to folders, followed: 1 (dog/cats)",
        "links back to a folder above, not followed: 1 (owl/up)",
        "folders that cannot be listed: 0",
        "broken images: 5",
        f"  {found.broken['owl/2.png']}: 1 (owl/2.png)",
    ]
    assert lines[14:] == [
        "  no image in a format that is read: JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF: "
        "4 (cat/note.png, cat/text.png, dog/cats/note.png, ...)"
    ]
    assert "truncated" in lines[13] and len(found.broken) == 5


def test_reasons_that_differ_in_numbers_are_one(make_images: MakeImages) -> None:
    root = make_images("a.png", "b.png")
    facts = [Facts("a.png", reason="120,000,000 pixels over 5"), Facts("b.png", reason="7 pixels over 5")]
    lines = list(Inspection(root, Listing(["a.png", "b.png"]), facts).lines())
    assert lines[-2:] == ["broken images: 2", "  N pixels over N: 2 (a.png, b.png)"]


def test_headers_alone_do_not_show_what_is_cut_off(wild: Path) -> None:
    found = inspected(wild, decode=0)
    assert "owl/2.png" not in found.broken and len(found.broken) == 4
    assert not any("decoded" in line for line in found.lines())


def test_workers_find_the_same(wild: Path) -> None:
    alone, shared = inspected(wild), inspected(wild, workers=2)
    assert [facts._replace(seconds=0) for facts in shared.facts] == [facts._replace(seconds=0) for facts in alone.facts]


def test_listed_classes_only(wild: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("owl\ndog\n")
    found = inspected(wild, str(file))
    assert {path.split("/")[0] for path in found.listing.images} == {"owl", "dog"} and len(found.listing.images) == 10
    file.write_text("owl\ndgo\n")
    with pytest.raises(ValueError, match="dgo: did you mean 'dog'?"):
        inspected(wild, str(file))


def test_a_sound_flat_folder(make_images: MakeImages) -> None:
    progress: list[Any] = []
    root = make_images("a.png", "b.png", "sub/c.png")
    found = inspect_folder(str(root), None, 2, 0, lambda *state: progress.append(state))
    assert not found.broken and "classes: none, since images lie in the folder itself" in found.lines()
    assert progress == [("images", 3, 3)]


def test_folders_that_cannot_be_listed_are_told(make_images: MakeImages) -> None:
    listing = Listing(["a.png"], unreadable={"dog": "Permission denied", "owl": "Permission denied"})
    lines = list(Inspection(make_images("a.png"), listing, []).lines())
    assert lines[-3:] == ["folders that cannot be listed: 2", "  Permission denied: 2 (dog, owl)", "broken images: 0"]


def test_nothing_to_inspect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images in .*: 0 files in 0 subfolders, none ends in .jpg"):
        inspected(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspected(tmp_path / "nowhere")
