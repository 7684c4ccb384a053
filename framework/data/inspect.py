"""What is in a folder of images, told before anyone trains on it: formats, sizes, classes, broken files, speed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset

from framework.data.folder import existing_folder
from framework.data.listing import Listing, list_images, read_classes
from framework.data.stream import ignore_signals, subset
from framework.data.transforms import MAX_PIXELS, ImageError, image_file, open_image
from framework.runtime.files import write_text


class Facts(NamedTuple):
    """What was found out about one image; ``reason`` says why it is broken, ``seconds`` what decoding took."""

    path: str
    format: str | None = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """What was found in a folder.

    Args:
        root: the folder.
        listing: its files; the images are those of the classes asked for.
        facts: on each of the images.
    """

    root: Path
    listing: Listing
    facts: Sequence[Facts]

    @property
    def broken(self) -> dict[str, str]:
        """The reason of each broken image, by path."""
        return {fact.path: fact.reason for fact in self.facts if fact.reason}

    def write_broken(self, file: Path | None) -> None:
        """Write a path and a reason a line for each broken image, where a file is given."""
        if file is not None:
            write_text(file, "".join(f"{path}\t{why}\n" for path, why in self.broken.items()))

    def lines(self) -> Iterator[str]:
        """All of it in words and numbers, a fact a line."""
        listing, paths = self.listing, self.listing.images
        others = f"{listing.num_others} other files, {listing.num_folders} subfolders"
        yield f"{self.root.absolute()}: {len(paths)} images, {others}"
        if all("/" in path for path in paths):
            sizes = Counter(path.split("/")[0] for path in paths)
            ordered = [f"{name} ({count})" for name, count in sizes.most_common()]
            yield f"classes: {len(sizes)}, images in each: {_range(sizes.values())}"
            yield f"  largest: {', '.join(ordered[:3])}; smallest: {', '.join(ordered[:-4:-1])}"
        else:
            yield "classes: none, since images lie in the folder itself"
        known = [fact for fact in self.facts if fact.format]
        if known:
            yield f"formats: {_counts(fact.format for fact in known)}"
            yield f"modes: {_counts(fact.mode for fact in known)}"
            shorter = [min(fact.width, fact.height) for fact in known]
            small = ", ".join(f"{sum(side < size for side in shorter)} below {size}" for size in (64, 128, 256, 512))
            yield f"shorter side: {_range(shorter)}; {small}"
            yield f"longer side: {_range(max(fact.width, fact.height) for fact in known)}"
            yield f"width / height: {_range(fact.width / fact.height for fact in known)}"
        seconds = [fact.seconds for fact in self.facts if fact.seconds]
        if seconds:
            yield f"decoded: {len(seconds)} of {len(paths)}, {len(seconds) / sum(seconds):.0f} images/s in one process"
        yield f"links to folders, followed: {_named(listing.links)}"
        yield f"links back to a folder above, not followed: {_named(listing.loops)}"
        for what, reasons in (("folders that cannot be listed", listing.unreadable), ("broken images", self.broken)):
            yield f"{what}: {len(reasons)}"
            groups: dict[str, list[str]] = {}
            for path, reason in reasons.items():
                groups.setdefault(re.sub(r"\d[\d,]*", "N", reason), []).append(path)
            yield from (f"  {reason}: {_named(groups[reason])}" for reason in sorted(groups))


class _Examined(Dataset[Facts]):
    """Opens images, in this process or in a worker."""

    def __init__(self, root: Path, paths: Sequence[str], decoded: set[int]) -> None:
        self.root, self.paths, self.decoded = root, paths, decoded

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Facts:
        facts = Facts(self.paths[index])
        try:
            with image_file(self.root / facts.path, MAX_PIXELS) as image:
                facts = Facts(facts.path, image.format, image.mode, image.width, image.height)
            if index in self.decoded:
                began = perf_counter()
                open_image(self.root / facts.path)
                facts = facts._replace(seconds=perf_counter() - began)
        except ImageError as error:
            facts = facts._replace(reason=error.reason)
        return facts


def inspect_folder(
    root: str, classes: str | None, decode: int, workers: int, progress: Callable[[str, int, int], None]
) -> Inspection:
    """Read the header of every image below a folder, and decode some.

    Args:
        root: the folder.
        classes: a text file with a class a line; only their subfolders are looked at.
        decode: how many images are decoded: random ones, always the same.
        workers: processes; 0 does all in this one.
        progress: told what is done, how many images are done, and how many there are.

    Raises:
        FileNotFoundError: if ``root`` is no folder.
        ValueError: if there are no images in it, or the list of classes does not fit.
    """
    folder = existing_folder(root)
    listing = list_images(folder)
    listing.check(folder)
    if classes:
        tops = {path: path.split("/")[0] for path in listing.images if "/" in path}
        chosen = set(read_classes(Path(classes), set(tops.values())))
        listing.images = [path for path, top in tops.items() if top in chosen]
    total = len(listing.images)
    examined = _Examined(folder, listing.images, set(subset(total, decode)))
    facts: list[Facts] = []
    for some in DataLoader(examined, 64, num_workers=workers, collate_fn=list, worker_init_fn=ignore_signals):
        facts += some
        progress("images", len(facts), total)
    return Inspection(folder, listing, facts)


def _counts(names: Iterable[str | None]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def _range(numbers: Iterable[float]) -> str:
    values = list(numbers)
    return f"{min(values):.4g} to {max(values):.4g}, median {median(values):.4g}"


def _named(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")
