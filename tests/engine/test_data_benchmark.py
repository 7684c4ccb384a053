from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.datasets import folder as torchvision_folder

from framework.data import folder
from framework.data.shard_writer import write_shards
from framework.engine.data_benchmark import STEPS, time_loading

CASES = ("decode only", "Stream", "torchvision")


def images(root: Path, *paths: str) -> str:
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)
    return str(root)


def test_every_side_reads_as_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png")
    opened: Counter[str] = Counter()

    def spy(module: Any, name: str, what: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            opened[what] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    spy(folder, "open_image", "decode only and Stream")
    spy(torchvision_folder, "pil_loader", "torchvision")
    times = time_loading(root, image_size=16, batch_size=5, num_workers=0, rounds=2)
    assert {name: len(laps) for name, laps in times.rounds.items()} == dict.fromkeys(CASES, 2)
    images_of_a_case = 2 * (1 + STEPS) * 5  # one batch before the clock starts
    assert opened == {"decode only and Stream": 2 * images_of_a_case, "torchvision": images_of_a_case}


def test_flat_folders_and_broken_images(tmp_path: Path) -> None:
    root = images(tmp_path, *(f"{number}.png" for number in range(150)))
    (tmp_path / "7.png").write_text("no image")
    times = time_loading(root, image_size=8, batch_size=30, num_workers=0, rounds=1)
    assert list(times.rounds) == ["decode only", "Stream"]


def test_shards_are_compared_with_webdataset_on_equal_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path / "images", "cat/a.png", "cat/b.png", "dog/c.png")
    write_shards(root, str(tmp_path / "shards"), 2, 1, 1, None, None, None, 0, lambda *_: None)
    decoded: Counter[tuple[int, int]] = Counter()
    real = transforms.Resize.forward

    def resize(self: Any, image: Image.Image) -> Any:
        decoded[image.size] += 1
        return real(self, image)

    monkeypatch.setattr(transforms.Resize, "forward", resize)
    times = time_loading(str(tmp_path / "shards"), image_size=16, batch_size=5, num_workers=0, rounds=2)
    assert {name: len(laps) for name, laps in times.rounds.items()} == {
        "decode only": 2, "Stream": 2, "webdataset": 2
    }  # fmt: skip
    assert decoded == {(24, 20): 2 * (1 + STEPS) * 5}
