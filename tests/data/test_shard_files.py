"""Shards behind a URL: brought whole, once, checked."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.data import shard_files
from framework.data.stream import Stream
from framework.runtime import files

from .conftest import MakeImages
from .make_shards import shards, written

TAR = "00000.tar"


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts what is asked for, and once or always damages a shard on the way."""

    asked: Counter[str]
    damage: list[bytes]

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.asked[name] += 1
        if name == TAR and self.damage:
            content = self.damage.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def root(make_images: MakeImages, tmp_path: Path) -> Path:
    images = make_images(*(f"images/{number}.png" for number in range(6))) / "images"
    written(images, tmp_path / "shards", images_per_shard=3)
    return tmp_path / "shards"


@pytest.fixture
def url(root: Path) -> Iterator[str]:
    Handler.asked, Handler.damage = Counter(), []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def folder_of(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_shards_come_when_needed_whole_and_once(url: str, root: Path, tmp_path: Path) -> None:
    data = shards(url, cache=str(tmp_path / "cache"))
    assert len(data) == 6 and Handler.asked == {"index.json": 1}
    local = shards(root).fetch(range(6), 0)
    assert torch.equal(data.fetch(range(3), 0).images, local.images[:3])
    assert Handler.asked == {"index.json": 1, "00000.members.json": 1, TAR: 1}
    assert data.key(5) == local.keys[5] and Handler.asked["00001.tar"] == 0
    again = shards(url, cache=str(tmp_path / "cache"))
    assert torch.equal(again.fetch(range(6), 0).images, local.images)
    assert Handler.asked == {"index.json": 2, "00000.members.json": 1, TAR: 1, "00001.members.json": 1, "00001.tar": 1}
    assert (folder_of(tmp_path / "cache") / TAR).read_bytes() == (root / TAR).read_bytes()
    assert data.protocol()["source"] == url


def test_processes_that_need_the_same_shard_fetch_it_once(url: str, root: Path, tmp_path: Path) -> None:
    data = shards(url, training=True, cache=str(tmp_path / "cache"))
    streams = [Stream(data, 1, seed=0, rank=rank, world_size=2, num_workers=2) for rank in range(2)]
    for _ in range(6):
        for stream in streams:
            next(stream)
    del stream, streams
    assert Handler.asked == dict.fromkeys(
        ["index.json", "00000.members.json", TAR, "00001.members.json", "00001.tar"], 1
    )


@pytest.mark.parametrize("alter", [lambda whole: whole[:700], lambda whole: whole[:-1] + b"x"])
def test_a_damaged_download_is_fetched_again_once(url: str, root: Path, tmp_path: Path, alter: Any) -> None:
    damaged = alter((root / TAR).read_bytes())
    cache = tmp_path / "cache"
    data = shards(url, cache=str(cache))
    Handler.damage = [damaged]
    assert torch.equal(data.fetch([0], 0).images, shards(root).fetch([0], 0).images)
    assert Handler.asked[TAR] == 2

    (folder_of(cache) / TAR).unlink()
    Handler.damage = [damaged, damaged]
    with pytest.raises(OSError) as caught:
        data.fetch([0], 0)
    assert str(caught.value) == (
        f"Shards: tried 2 times to fetch {TAR}: {url}/{TAR} came cut off or altered, {len(damaged)} bytes"
    )
    assert [path.name for path in folder_of(cache).glob(f"{TAR}*")] == [f"{TAR}.lock"]


def test_what_is_not_there_and_what_is_not_known(url: str, root: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"{url} is a URL, so a folder is needed to bring shards to: data.train.cache"):
        shards(url)
    with pytest.raises(OSError, match="exit 22"):  # curl's word for an answer such as 404
        shards(url + "/nowhere", cache=cache)
    with pytest.raises(ValueError, match="s3://bucket/index.json: no gopen handler defined"):
        shards("s3://bucket", cache=cache)
    data = shards(url, cache=cache)
    (root / TAR).unlink()
    with pytest.raises(OSError, match=f"tried 2 times to fetch {TAR}: .*exit 22"):
        data.fetch([0], 0)


@pytest.mark.parametrize("form", ["{root}", "file:{root}", "pipe:cat {root}", "pipe:cat {root}/{{}}"])
def test_other_ways_to_the_same_shards(form: str, root: Path, tmp_path: Path) -> None:
    data = shards(form.format(root=root), cache=str(tmp_path / "cache"))
    expected = shards(root).fetch(range(6), 0)
    batch = data.fetch(range(6), 0)
    assert torch.equal(batch.images, expected.images) and batch.keys == expected.keys
    assert sorted(path.name for path in folder_of(tmp_path / "cache").glob("*.tar")) == [TAR, "00001.tar"]


def test_another_set_in_the_same_cache_is_another(root: Path, make_images: MakeImages, tmp_path: Path) -> None:
    other = make_images("more/a.png", "more/b.png") / "more"
    written(other, tmp_path / "others")
    cache = str(tmp_path / "cache")
    for folder in (root, tmp_path / "others"):
        assert torch.equal(shards(folder, cache=cache).fetch([0], 0).images, shards(folder).fetch([0], 0).images)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_full_disk_is_said(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_fsync", full)
    with pytest.raises(OSError, match=r"to fetch 00000.members.json: .*No space left on device: .*00000.members.json"):
        shards(root, cache=str(tmp_path / "cache")).fetch([0], 0)


def _fetch_and_die(root: Path, cache: Path) -> None:
    def die(descriptor: int) -> None:
        import os

        os._exit(9)

    files._fsync = die
    shards(root, cache=str(cache)).fetch([0], 0)


def test_a_kill_leaves_nothing_that_looks_whole_and_no_lock(root: Path, tmp_path: Path) -> None:
    process = get_context("fork").Process(target=_fetch_and_die, args=(root, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode == 9
    left = sorted(path.name for path in folder_of(tmp_path / "cache").iterdir())
    assert left == ["00000.members.json.lock", "00000.members.json.partial"]
    assert shards(root, cache=str(tmp_path / "cache")).fetch(range(6), 0).images.shape[0] == 6
    assert shard_files.ATTEMPTS == 2
