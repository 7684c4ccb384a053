"""What shards hold and where: tar files of the WebDataset convention, in which an image is one seek and one read.

A sample is the members of one key: ``cat/7.jpg`` the image, ``cat/7.cls`` its class as a number, if there are classes.
Beside each ``00000.tar`` lies ``00000.members.json`` with the place of every image, and beside all of them
``index.json``, from which an image's number gives its shard.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple, cast

from framework.data.transforms import EXTENSIONS, ImageError
from framework.runtime.files import digest, write_bytes, write_text

INDEX = "index.json"
VERSION = 1
BLOCK = 512
"""Bytes of a member's header, right before its content."""

MAKE = "python tools/make_shards.py DIR OUT makes shards from images; --index DIR indexes the shards in a folder"


class Member(NamedTuple):
    """An image in a shard: the key of its sample, where its bytes begin and how many they are, and its class."""

    key: str
    offset: int
    size: int
    label: int | None


class Members(NamedTuple):
    """The images of one shard in their order in it, and what is not among them, with the reason."""

    images: list[Member]
    left_out: dict[str, str]

    @property
    def num_classes(self) -> int:
        """At least; 0 if there are none."""
        return max((image.label + 1 for image in self.images if image.label is not None), default=0)

    @staticmethod
    def parse(content: bytes) -> Members:
        fields = json.loads(content)
        return Members([Member(*image) for image in fields["images"]], fields["left_out"])


class Shard(NamedTuple):
    """A line of the index: a tar, the images in it, and what tells that it and its list of members are unchanged."""

    name: str
    samples: int
    bytes: int
    sha256: str
    members_sha256: str

    @property
    def stem(self) -> str:
        """The name without ``.tar``; keys begin with it."""
        return self.name.removesuffix(".tar")


class Index(NamedTuple):
    """Of a folder of shards.

    Args:
        shards: in the order in which their images are numbered.
        classes: their names, or ``None`` without labels.
        images: how the images were changed since they were files of their own.
        left_out: of the images that were to be written, those that cannot be read, with the reason.
    """

    shards: Sequence[Shard]
    classes: list[str] | None
    images: str
    left_out: dict[str, str]

    def line(self, folder: str) -> str:
        """All of it in words."""
        images, size = sum(shard.samples for shard in self.shards), sum(shard.bytes for shard in self.shards) / 1e6
        counts = f"{images} images in {len(self.shards)} shards, {size:.1f} MB, {len(self.classes or [])} classes"
        first = "".join(f"\n  {name}: {reason}" for name, reason in list(self.left_out.items())[:5])
        return f"{folder}: {counts}, {len(self.left_out)} images left out{first}"

    def write(self, folder: Path) -> None:
        shards = [shard._asdict() for shard in self.shards]
        counts = {"total": sum(shard.samples for shard in self.shards), "num_left_out": len(self.left_out)}
        content = {"version": VERSION} | counts | self._asdict() | {"shards": shards}
        write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def parse(content: bytes, where: str) -> Index:
        """The index that was written; ``where`` is for the message if it is none."""
        try:
            fields = json.loads(content)
            version = fields["version"]
            if version == VERSION:
                shards = [Shard(**shard) for shard in fields["shards"]]
                return Index(shards, *(fields[name] for name in ("classes", "images", "left_out")))
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{where}: no index of shards ({type(error).__name__}: {error}). {MAKE}") from error
        raise ValueError(f"{where} has version {version}, and this code reads {VERSION}: make it anew. {MAKE}")


def members_name(shard: str) -> str:
    """The file beside a shard that lists its members."""
    return shard.removesuffix(".tar") + ".members.json"


def describe(path: Path, left_out: Mapping[str, str]) -> tuple[Shard, Members]:
    """Read through a whole shard and write its list of members, where ``left_out`` is noted, too."""
    members = scan(path)
    members.left_out.update(left_out)
    content = json.dumps(members._asdict()).encode()
    write_bytes(path.with_name(members_name(path.name)), content)
    size = path.stat().st_size
    return Shard(path.name, len(members.images), size, digest(path), sha256(content).hexdigest()), members


def scan(path: Path) -> Members:
    """Find the images in a tar.

    Raises:
        ValueError: if it is no tar, damaged or cut off, if two images have one key, or if a class is no number or is
            missing where other samples have one.
    """
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    others: dict[str, str] = {}
    key = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isreg() or not stem or re.match(r"__[^/]*__($|/)", member.name):
                    continue  # WebDataset passes over these, too
                key = folder + slash + stem
                if extension == "cls":
                    labels[key] = _class_number(tar, member, f"{path}: the sample {key}")
                elif not f".{extension.lower()}".endswith(EXTENSIONS):
                    others[key] = "no image in the sample"
                elif key in places:
                    raise ValueError(f"{path}: two images have the key {key}; give them different names")
                else:
                    places[key] = member.offset_data, member.size
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):  # or tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        behind = f"behind the sample {key}" if key else "from its beginning"
        raise ValueError(f"{path} cannot be read as a tar {behind} ({error}); fetch or make it anew") from error
    missing = next((key for key in places if key not in labels), None)
    if labels and missing:
        raise ValueError(f"{path}: the sample {missing} has no class (.cls), and others have")
    images = [Member(key, *place, labels.get(key)) for key, place in places.items()]
    return Members(images, {key: reason for key, reason in others.items() if key not in places})


def _class_number(tar: tarfile.TarFile, member: tarfile.TarInfo, what: str) -> int:
    text = cast(IO[bytes], tar.extractfile(member)).read(100).decode(errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{what} has the class {text!r}; classes are numbers from 0")
    return int(text)


def read_member(path: Path, member: Member, key: str) -> bytes:
    """The content of a member. The file is opened anew, so that processes share no position in it.

    Raises:
        ImageError: of ``key``, if the shard is missing, cut off before the member's end, or has no such member there.
    """
    try:
        with open(path, "rb") as file:
            file.seek(member.offset - BLOCK)
            block = file.read(BLOCK + member.size)
        if len(block) < BLOCK + member.size:
            reason = f"{path.name} is cut off at byte {path.stat().st_size}, before the image's end"
            raise ImageError(key, reason)
        if tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "surrogateescape").size != member.size:
            raise tarfile.HeaderError
    except tarfile.HeaderError as error:
        reason = f"{path.name} is damaged or not the shard of the index: no image of {member.size} bytes at byte "
        raise ImageError(key, f"{reason}{member.offset}") from error
    except OSError as error:
        raise ImageError(key, f"{path.name}: {error.strerror or error}") from error
    return block[BLOCK:]
