"""Makes shards of the WebDataset convention from a folder of images, and the index of shards from elsewhere.

What is written depends on the images and settings alone, not on the number of processes or on how often the work was
stopped: a shard is a list of images that is fixed beforehand, and one process writes it whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from io import BytesIO
from multiprocessing import parent_process
from pathlib import Path, PurePosixPath
from threading import Thread

import numpy as np
from PIL import Image
from webdataset import TarWriter

from framework.data.folder import ImageFolder, existing_folder
from framework.data.listing import read_classes
from framework.data.shard_index import INDEX, Index, Members, Shard, describe, members_name
from framework.data.stream import ignore_signals, refuse_too_many, subset
from framework.data.transforms import EXTENSIONS, RESIZING, ImageError, open_image
from framework.runtime.files import PARTIAL, new_file, remove_partial, write_text
from framework.runtime.hashing import uniforms
from framework.runtime.lock import NAME as LOCK
from framework.runtime.lock import RunLock

PLAN = "plan.sha256"
"""A file with the digest of what the shards beside it are to be made from."""

JPEG_QUALITY = 95
MEASURED = 200
"""Images whose mean size says how many make a shard of a wanted size."""

Planned = tuple[str, str, int | None]
"""An image that is to be written: its path, its key in the shard and its label."""


def write_shards(
    root: str,
    out: str,
    images_per_shard: int | None,
    shard_size: float,
    workers: int,
    resize: int | None,
    files: str | None,
    classes: str | None,
    max_broken: float,
    progress: Callable[[str, int, int], None],
) -> Index:
    """Make ``out/00000.tar``, ... and their index from the images that an ``ImageFolder`` finds.

    Images are shuffled once, so that a shard is a fair sample. Work that was stopped goes on behind the shards that
    are whole; finished work is not done again.

    Args:
        root: a folder of images.
        out: a folder, new or left by the same work.
        images_per_shard: at most; those that cannot be read are left out.
        shard_size: about how many megabytes a shard has, without ``images_per_shard``.
        workers: processes.
        resize: the shorter side is brought to it where it is longer; otherwise files stay as they are, byte by byte.
        files: as of ``ImageFolder``.
        classes: as of ``ImageFolder``.
        max_broken: share of the images that may be left out.
        progress: told what is done, how many images are done, and how many there are.

    Raises:
        ValueError: if the images or settings are not as they should be, or two images have one key.
        FileExistsError: if something else is in ``out``.
        TooManyBroken: if more images than the share ``max_broken`` cannot be read.
        OSError: if ``root`` cannot be read or ``out`` not be written.
    """
    data = ImageFolder(root, classes=classes, files=files, max_broken=max_broken, image_size=1, training=False, seed=0)
    total = len(data)
    labels = [None] * total if data.labels is None else data.labels.tolist()
    images = list(zip(data.paths, _keys(data.paths), labels, strict=True))
    images = [images[index] for index in np.argsort(uniforms(0, "shards", 0, range(total)), kind="stable")]
    if images_per_shard is None:
        images_per_shard = _images_in(shard_size, [data.root / path for path, _, _ in images], resize)
    plan = sha256(json.dumps([images, data.classes, images_per_shard, resize]).encode()).hexdigest()
    folder = Path(out).expanduser()
    with RunLock(folder, print):
        _claim(folder, plan)
        if (folder / INDEX).exists():
            return Index.parse((folder / INDEX).read_bytes(), str(folder / INDEX))
        parts = [images[start : start + images_per_shard] for start in range(0, total, images_per_shard)]
        paths = [folder / f"{number:05}.tar" for number in range(len(parts))]
        shards: list[Shard] = []
        left_out: dict[str, str] = {}
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            for shard, members in pool.map(partial(_write_shard, data.root, resize), paths, parts):
                shards.append(shard)
                left_out |= members.left_out
                refuse_too_many(data, left_out, total)
                progress("images", sum(shard.samples for shard in shards) + len(left_out), total)
        changed = f"shorter side to at most {resize} ({RESIZING}), JPEG quality {JPEG_QUALITY}"
        index = Index(shards, data.classes or None, changed if resize else "original files", left_out)
        index.write(folder)
    return index


def index_shards(
    root: str, classes: str | None, workers: int, progress: Callable[[str, int, int], None]
) -> Index:
    """Make the index of the shards in a folder, which stay as they are.

    Args:
        root: a folder with ``.tar`` files.
        classes: a text file with a class a line, their names in the order of their numbers.
        workers: processes.
        progress: told what is done, how many shards are done, and how many there are.

    Raises:
        ValueError: if there are no shards, one is damaged, or labels are missing or have no name.
        FileExistsError: if there is an index.
        OSError: if the folder cannot be read or written.
    """
    folder = existing_folder(root)
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder / INDEX} exists; remove it to make it anew")
    paths = sorted(folder.glob("*.tar"))
    shards: list[Shard] = []
    left_out: dict[str, str] = {}
    classes_in: dict[str, int] = {}  # of the shards with images: how many classes they need at least
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        for shard, members in pool.map(partial(describe, left_out={}), paths):
            shards.append(shard)
            left_out |= {f"{shard.stem}/{key}": reason for key, reason in members.left_out.items()}
            if members.images:
                classes_in[shard.name] = members.num_classes
            progress("shards", len(shards), len(paths))
    if not classes_in:
        raise ValueError(f"there are no images in the {len(paths)} .tar files of {folder.absolute()}")
    most, least = max(classes_in, key=classes_in.__getitem__), min(classes_in, key=classes_in.__getitem__)
    if classes_in[most] and not classes_in[least]:
        raise ValueError(f"{most} has classes (.cls) and {least} has none; index them in folders of their own")
    names = read_classes(Path(classes), None) if classes else [str(number) for number in range(classes_in[most])]
    if classes and not 0 < classes_in[most] <= len(names):
        raise ValueError(f"{classes} names {len(names)} classes, and samples have {classes_in[most]} (.cls in {most})")
    index = Index(shards, names or None, "as they came in the shards", left_out)
    index.write(folder)
    return index


def _keys(paths: Sequence[str]) -> list[str]:
    """Paths without extension; with it where two images would be one sample. A dot would end the key too early."""
    keys: dict[str, str] = {}
    for path in map(PurePosixPath, paths):
        names = [str(path.with_name(name.replace(".", "_"))) for name in (path.stem, path.name)]
        key = next((name for name in names if name not in keys), None)
        if key is None:
            raise ValueError(f"{path} and {keys[names[1]]} would both be the sample {names[1]}: rename one of them")
        keys[key] = str(path)
    return list(keys)


def _images_in(megabytes: float, paths: Sequence[Path], resize: int | None) -> int:
    sizes = []
    for index in subset(len(paths), MEASURED):
        try:
            sizes.append(len(_encoded(paths[index], resize)[1]))
        except ImageError:
            continue  # those that are written are counted
    return max(1, int(megabytes * 1e6 / np.mean(sizes))) if sizes else len(paths)


def _end_with_parent() -> None:
    """In a worker: when its parent is killed it would write on, beside the workers of the next run."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    ignore_signals(0)  # the parent decides; shards that are begun are finished
    Thread(target=watch, daemon=True).start()


def _claim(folder: Path, plan: str) -> None:
    """Make sure that ``folder`` is new or holds the same work."""
    there = (folder / PLAN).read_text() if (folder / PLAN).exists() else None
    others = {path.name for path in folder.iterdir()} - {LOCK, PLAN + PARTIAL}
    if there != plan and others:
        raise FileExistsError(
            f"{folder} holds other files, or shards of other images or settings. Choose another OUT, or remove it"
        )
    remove_partial(folder)
    write_text(folder / PLAN, plan)


def _write_shard(root: Path, resize: int | None, shard: Path, images: Sequence[Planned]) -> tuple[Shard, Members]:
    """Write a shard and its list of members, unless they are there."""
    left_out: dict[str, str] = {}
    members = shard.with_name(members_name(shard.name))
    if shard.exists() and members.exists():
        left_out = Members.parse(members.read_bytes()).left_out
    else:
        with new_file(shard) as file, TarWriter(file, mtime=0, encoder=False, format="PAX_FORMAT") as tar:
            for path, key, label in images:
                try:
                    extension, content = _encoded(root / path, resize)
                except ImageError as error:
                    left_out[path] = error.reason
                else:
                    classes = {} if label is None else {"cls": str(label).encode()}
                    tar.write({"__key__": key, extension: content} | classes)
    return describe(shard, left_out)


def _encoded(path: Path, resize: int | None) -> tuple[str, bytes]:
    """The extension and the bytes of an image, decoded to see that it can be."""
    image = open_image(path)
    if resize is not None and min(image.size) > resize:
        width, height = (round(side * resize / min(image.size)) for side in image.size)
        scaled = BytesIO()
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image.save(scaled, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return "jpg", scaled.getvalue()
    if not path.name.lower().endswith(EXTENSIONS):
        raise ImageError(path, f"its name ends in none of {', '.join(EXTENSIONS)}")
    return path.suffix[1:].lower(), path.read_bytes()
