from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeImages = Callable[..., Path]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """Writes noise images of 24x20 pixels, one per given relative path, each different; returns their folder."""

    def make(*paths: str, size: tuple[int, int] = (24, 20)) -> Path:
        for number, path in enumerate(paths):
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / path)
        return tmp_path

    return make
