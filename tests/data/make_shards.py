"""Small sets of shards, in this process and without settings that no test looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framework.data.shard_index import Index
from framework.data.shard_writer import index_shards, write_shards
from framework.data.shards import Shards


def silent(stage: str, done: int, total: int) -> None:
    pass


def written(root: Path, out: Path, images_per_shard: int | None = 4, **given: Any) -> Index:
    usual = {"shard_size": 100, "workers": 1, "resize": None, "files": None, "classes": None, "max_broken": 0.2}
    return write_shards(str(root), str(out), images_per_shard, **{**usual, "progress": silent, **given})


def indexed(folder: Path, classes: Path | None = None) -> Index:
    return index_shards(str(folder), None if classes is None else str(classes), 1, silent)


def shards(root: Path | str, training: bool = False, seed: int = 0, **given: Any) -> Shards:
    return Shards(str(root), **given, image_size=16, training=training, seed=seed)
