"""What lies in a folder of images, and the text files that say what is used of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from framework.config.errors import did_you_mean
from framework.data.transforms import EXTENSIONS


@dataclass
class Listing:
    """The files below a folder; paths are relative to it.

    Args:
        images: files whose names end as an image's, sorted folder by folder. Bytes of a name that are no UTF-8 become
            ``\\x`` codes; no file has that name, so that the image counts as broken.
        num_others: how many other files there are.
        num_folders: how many subfolders there are.
        links: links to folders, which are followed.
        loops: links that lead back to a folder above them, which are not.
        unreadable: folders that could not be listed, with the reason.
    """

    images: list[str] = field(default_factory=list)
    num_others: int = 0
    num_folders: int = 0
    links: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def check(self, root: Path) -> None:
        """Raise a ``ValueError`` if there are no images."""
        if not self.images:
            raise ValueError(
                f"no images in {root.absolute()}: {self.num_others} files in {self.num_folders} subfolders, none ends "
                f"in {', '.join(EXTENSIONS)}"
            )


def list_images(root: Path) -> Listing:
    """Every image below a folder; what begins with a dot is ignored."""
    listing = Listing()

    def relative(path: str) -> str:
        return _printable(os.path.relpath(path, root))

    def note(error: OSError) -> None:
        listing.unreadable[relative(error.filename)] = error.strerror or str(error)

    leading: dict[str, set[tuple[int, int]]] = {}  # to a folder to come: the folders on the way, and itself
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=note):
        above = leading.pop(folder, None) or {_identity(folder)}
        inside = [name for name in subfolders if not name.startswith(".")]
        subfolders.clear()
        for path in (os.path.join(folder, name) for name in inside):
            try:
                identity = _identity(path)
            except OSError as error:
                note(error)
                continue
            if identity in above:
                listing.loops.append(relative(path))
                continue
            if os.path.islink(path):
                listing.links.append(relative(path))
            leading[path] = above | {identity}
            subfolders.append(os.path.basename(path))
        names = [name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        prefix = relative(folder) + "/" if folder != str(root) else ""
        listing.images += [prefix + _printable(name) for name in names]
        listing.num_others += len(files) - len(names)
        listing.num_folders += len(subfolders)
    listing.images.sort(key=lambda path: path.split("/"))
    return listing


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def read_classes(file: Path, folders: Collection[str] | None) -> list[str]:
    """The classes that a text file lists, one a line: their order is their numbers.

    A line is a folder's name, or that and a label for people behind a tab or space, as in ImageNet's list of synsets.
    Folders that are not listed are left out, which is what such a list is for.

    Args:
        file: UTF-8 text; empty lines are ignored.
        folders: those with images; ``None`` if the names are not folders.

    Raises:
        ValueError: if a listed class has no folder (says the nearest), is listed twice, or there are none.
    """
    known = set(folders or ())

    def name_of(line: str) -> str:  # the whole line where there is such a folder, for names may hold spaces
        return next((name for name in (line, line.split("\t")[0].rstrip()) if name in known), line.split()[0])

    classes = [name_of(line) for _, line in _lines(file)]
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not classes:
        raise ValueError(f"{file}: {'listed twice: ' + ', '.join(twice) if twice else 'lists no class'}")
    missing = [] if folders is None else [name for name in classes if name not in known]
    if missing:
        named = "".join(f"\n  {name}{did_you_mean(name, known)}" for name in missing[:10])
        raise ValueError(
            f"{file}: {len(missing)} of {len(classes)} classes have no folder with images, first:{named}\n"
            f"there are {len(known)} folders with images: {', '.join(sorted(known)[:10])}"
        )
    return classes


def read_files(file: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Images and their classes from a text file: on each line a relative path, a space or tab, a number or a name.

    Args:
        file: UTF-8 text; empty lines are ignored.
        classes: their names; without any, all classes are numbers.

    Raises:
        ValueError: if a line is not so, or names a class that there is not; says the line.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in _lines(file):
        path, _, name = line.replace("\t", " ").rpartition(" ")
        label = numbers.get(name, int(name) if name.isdecimal() else -1)
        if not path or label < 0 or (classes and label >= len(classes)):
            wanted = f"a number below {len(classes)} or one of {len(classes)} names" if classes else "a number"
            raise ValueError(
                f"{file}:{number}: each line is a relative path and a class, {wanted}; "
                f"got {line!r}{did_you_mean(name, numbers)}"
            )
        paths.append(path.rstrip())
        labels.append(label)
    if not paths:
        raise ValueError(f"{file}: lists no image")
    return paths, labels


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    text = file.expanduser().read_text(encoding="utf-8-sig", errors="replace")
    return ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip())
