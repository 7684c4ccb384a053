"""Where the files of a set of shards are: in a folder, or behind a URL and brought when they are first needed."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from webdataset.gopen import gopen

from framework.data.shard_index import INDEX, MAKE, Index
from framework.runtime.files import new_file

CHUNK = 1 << 20
ATTEMPTS = 2


class ShardFiles:
    """Reads the index, and knows a path on this machine for every file in it.

    With a cache, files come whole into a subfolder of it that is named by the index, checked by their digest; what
    lies there was checked, and is not fetched again. Processes that need the same file wait for the one that brings it.

    Args:
        root: a folder; or with ``cache`` a URL that WebDataset opens (``https:``, ``gs:``, ``hf:``, ``pipe:COMMAND``),
            where ``{}`` stands for the name of a file, or the name comes behind a slash at the end.
        cache: a folder on a disk of this machine.

    Raises:
        OSError: if there is no index at ``root``, or it cannot be fetched.
        ValueError: if a URL comes without ``cache`` or WebDataset does not know its kind, or if the index is none or
            does not fit the shards in the folder.
    """

    def __init__(self, root: str, cache: str | None) -> None:
        is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", root) is not None
        if is_url and cache is None:
            raise ValueError(f"Shards: {root} is a URL, so a folder is needed to bring shards to: data.train.cache=DIR")
        self.root = root if is_url else str(Path(root).expanduser())
        if not is_url and not Path(self.root, INDEX).is_file():
            raise FileNotFoundError(f"Shards: there is no {INDEX} in {Path(self.root).absolute()}. {MAKE}")
        content = b"".join(self._chunks(INDEX))
        self.index = Index.parse(content, self._url(INDEX))
        self.digest = sha256(content).hexdigest()
        self.cache = None if cache is None else Path(cache).expanduser() / self.digest[:12]
        if self.cache is None:
            self._check()

    def path(self, name: str, digest: str) -> Path:
        """Of a file on this machine, which is brought first if need be."""
        if self.cache is None:
            return Path(self.root, name)
        path = self.cache / name
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with open(self.cache / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._bring(name, digest, path)
        return path

    def _bring(self, name: str, digest: str, path: Path) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with new_file(path) as file:
                    received = sha256()
                    for chunk in self._chunks(name):
                        received.update(chunk)
                        file.write(chunk)
                    if received.hexdigest() != digest:
                        raise OSError(f"{self._url(name)} came cut off or altered, {file.tell()} bytes")
                return
            except OSError as error:
                if attempt == ATTEMPTS:
                    raise OSError(f"Shards: tried {ATTEMPTS} times to fetch {name}: {error}") from error

    def _chunks(self, name: str) -> Iterator[bytes]:
        with gopen(self._url(name)) as stream:
            yield from iter(lambda: stream.read(CHUNK), b"")

    def _url(self, name: str) -> str:
        return self.root.replace("{}", name) if "{}" in self.root else f"{self.root.rstrip('/')}/{name}"

    def _check(self) -> None:
        """Refuse shards that are missing or grew; of one that is cut off the samples before the cut can be read."""
        paths = {shard: Path(self.root, shard.name) for shard in self.index.shards}
        sizes = {shard: path.stat().st_size if path.is_file() else None for shard, path in paths.items()}
        wrong = [
            f"\n  {shard.name} " + ("is missing" if size is None else f"has {size} bytes instead of {shard.bytes}")
            for shard, size in sizes.items()
            if size is None or size > shard.bytes
        ]
        if wrong:
            words = f"{len(wrong)} of {len(sizes)} shards do not fit {self._url(INDEX)}, first:{''.join(wrong[:5])}"
            raise ValueError(f"Shards: {words}\nBring them back, or remove the index and make it anew. {MAKE}")
