"""Images that cannot be read are left out of every number and picture, and told."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.data.interface import Batch, TooManyBroken
from framework.data.stream import subset
from framework.evaluation import report
from framework.evaluation.comparison import compare_tokenizers
from framework.evaluation.rate_distortion import rate_distortion
from framework.evaluation.report import evaluate_tokenizer
from tests.evaluation.fakes import FixedImages, basis_tokenizer, orthonormal


class Damaged(FixedImages):
    """Images of which some cannot be read."""

    def __init__(self, count: int, bad: Sequence[int], max_broken: float = 0.5) -> None:
        images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        super().__init__(images, [f"group {index % 3}" for index in range(count)])
        self.bad, self.max_broken = bad, max_broken

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        batch = super().fetch([index for index in indices if index not in self.bad], epoch)
        broken = super().fetch([index for index in indices if index in self.bad], epoch).keys
        return replace(batch, broken=dict.fromkeys(broken, "cut off"))


def tokenizer() -> Any:
    return basis_tokenizer(torch.full((48,), 0.5), orthonormal(48, 16, seed=0), token_dim=4)


def test_numbers_are_those_of_the_readable_images() -> None:
    damaged, intact = Damaged(12, [0, 5, 6]), Damaged(12, [])
    curve, whole = (rate_distortion(tokenizer(), data, batch_size=2) for data in (damaged, intact))
    rows = [row for row in range(12) if row not in (0, 5, 6)]
    torch.testing.assert_close(curve.errors, whole.errors[rows])
    assert curve.keys == tuple(whole.keys[row] for row in rows)
    protocol = curve.protocol
    assert (protocol["images"], protocol["of"], protocol["broken"]) == (9, 12, 3)
    assert protocol["first_broken"] == dict.fromkeys([whole.keys[row] for row in (0, 5, 6)], "cut off")
    assert whole.protocol["broken"] == 0 and whole.protocol["first_broken"] == {}


def test_progress_comes_to_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    rate_distortion(tokenizer(), Damaged(8, [2, 7]), batch_size=4, progress=lambda *state: told.append(state))
    assert told == [("tokenizer", 4, 8), ("tokenizer", 8, 8)]


def test_above_the_share_nothing_is_measured() -> None:
    with pytest.raises(TooManyBroken, match="3 of 12 images cannot be read, 25.00%, and max_broken allows 20.00%"):
        rate_distortion(tokenizer(), Damaged(12, [0, 5, 6], max_broken=0.2))


@pytest.mark.parametrize("limit", [None, 20])
def test_pictures_show_the_images_of_their_rows(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.Tensor] = []
    monkeypatch.setattr(report, "plot_reconstructions", lambda images, *rest: shown.append(images))
    monkeypatch.setattr(report, "plot_tiled_photograph", lambda *rest: None)
    monkeypatch.setattr(report, "spread_images", lambda curve: [0, 5, 9])
    data = Damaged(30, [0, 4, 11, 12])
    evaluate_tokenizer(tokenizer(), data, tmp_path, {}, data, limit=limit)
    readable = [index for index in subset(30, limit) if index not in data.bad]
    assert torch.equal(shown[0], data.images[[readable[0], readable[5], readable[9]]])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    broken = len(subset(30, limit)) - len(readable)
    assert broken >= 2 and metrics["rate_distortion"]["protocol"]["broken"] == broken
    fitted = metrics["pca"]["protocol"]["weights"]
    assert (fitted["fitted_images"], fitted["broken"]) == (26, 4)
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert [row["key"] for row in rows] == [data.key(index) for index in readable]
    told = f"{len(readable)} images of 3 groups, {broken} left out that cannot be read; pixels in [0, 1]"
    assert told in (tmp_path / "table.md").read_text()
    compare_tokenizers({"one": tokenizer()}, data, tmp_path, limit=limit)
    assert told in (tmp_path / "comparison.md").read_text()
