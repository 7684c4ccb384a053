from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.fidelity import SquaredError
from framework.allocation.rewards import ContinuousReward, ThresholdReward
from framework.allocation.rules import ComplexityLookup, FixedLength
from framework.evaluation import allocation_plots, allocation_report
from framework.evaluation.allocation_plots import plot_allocated_photograph, plot_wall
from framework.evaluation.allocation_report import compare_allocations, evaluate_allocation
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.reconstruction_distances import policy_lengths, reconstruction_distances
from framework.tokenizers.interface import Quantizer
from tests.evaluation.fakes import FixedImages, SignQuantizer
from tests.evaluation.toy_features import ToyFeatures
from tests.tokenizers.build import small_tokenizer

FILES = {"metrics.json", "per_image.csv", "table.md", "landscape.png", "lengths.png", "wall.png", "photograph.png"}
HISTORY: list[dict[str, object]] = [
    {"step": 10, "total": 1.0, "policy/entropy": 1.0, "policy/log_probability": -2.0, "policy/length": 3.0},
    {"step": 20, "total": None, "policy/entropy": None, "not_finite": ["total", "policy/entropy"]},
    {"step": 20, "validation/reward": 0.4, "validation/reward_fixed": 0.3, "validation/reward_oracle": 0.5},
]


def data(count: int = 24, kinds: bool = False) -> FixedImages:
    """Flat, smooth and noisy images of 16 x 16 pixels in turn."""
    generator = torch.Generator().manual_seed(0)
    sides = [1, 2, 16]
    parts = [torch.rand(1, 3, sides[i % 3], sides[i % 3], generator=generator) for i in range(count)]
    images = torch.cat([torch.nn.functional.interpolate(part, (16, 16), mode="bilinear") for part in parts])
    named = [("flat", "smooth", "noisy")[i % 3] for i in range(count)] if kinds else None
    return FixedImages(images, ["cat", "coin"] * (count // 2), named)


def by_size(quantizer: Quantizer | None = None, **options: Any) -> AdaptiveTokenizer:
    """Small files keep one token, large ones all six."""
    tokenizer = small_tokenizer(quantizer=quantizer)
    feature_dim = tokenizer.encoder.feature_dim
    policy = ComplexityLookup([150, 400], [1, 3, 6], num_tokens=6, feature_dim=feature_dim, **options)
    return AdaptiveTokenizer(tokenizer, policy).eval()


def pixels(path: Path) -> Tensor:
    return rearrange(torch.from_numpy(np.array(Image.open(path).convert("RGB"))), "h w c -> c h w") / 255


def test_evaluation_leaves_numbers_and_pictures(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    metrics: dict[str, Any] = evaluate_allocation(
        by_size(),
        ThresholdReward(0.05).eval(),
        SquaredError(),
        data(),
        tmp_path / "new",
        {"step": 7},
        HISTORY,
        limit=20,
        progress=lambda *state: told.append(state),
    )
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES | {"training.png"}
    assert json.loads((tmp_path / "new/metrics.json").read_text()) == metrics
    assert told == [("errors", 20, 20)]
    study = metrics["allocation"]
    assert study["protocol"]["weights"] == {"step": 7} and study["protocol"]["lengths"] == [1, 3, 6]
    assert study["protocol"]["reward"] == {"name": "ThresholdReward", "threshold": 0.05, "gamma": 10.0, "tau": 0.1}
    assert set(metrics["definitions"]["policies"]) == set(study["policies"])

    rows = list(csv.DictReader((tmp_path / "new/per_image.csv").open()))
    assert len(rows) == 20 and {row["length"] for row in rows} == {"1.0", "3.0", "6.0"}
    for name in ("fixed_at_mean", "best_fixed", "binary_search", "oracle"):
        for metric in ("length", "reward", "mse"):
            mean = sum(float(row[f"{name}_{metric}"]) for row in rows) / 20
            assert mean == pytest.approx(study["policies"][name][metric])
    assert all(float(row["oracle_reward"]) >= float(row["reward"]) for row in rows)
    assert all(float(row["png_bytes"]) > 400 for row in rows if row["length"] == "6.0")

    table = (tmp_path / "new/table.md").read_text()
    lines = table.splitlines()
    assert lines[2].startswith("| Full | 6.00 ± 0.00 | continuous | ")
    assert lines[3].startswith("| Adaptive | ") and " | continuous | " in lines[3]
    assert [line.split(" | ")[0] for line in lines[7:15]] == [
        f"| {name.replace('_', ' ')}" for name in study["policies"]
    ]
    policy = study["policies"]["policy"]
    assert f"| policy | {policy['length']:.2f} ± {policy['length_std']:.2f} | " in table
    assert f"{study['unimodal']:.1%} of images ({study['unimodal_hard']:.1%} with tau 0)" in table
    assert "The search asks for 0.05." in table and "20 images of 2 groups; pixels in [0, 1]" in table
    for name in ("landscape", "lengths", "training", "wall", "photograph"):
        picture = pixels(tmp_path / f"new/{name}.png")
        assert 200 < picture.shape[1] < 2500 and 300 < picture.shape[2] <= 1600 and picture.std() > 0.05


def test_rules_have_no_training_and_named_images_no_photograph(tmp_path: Path) -> None:
    scores = "".join(f"{data().key(index)!r},{index}\n".replace("'", '"') for index in range(24))
    (tmp_path / "scores.csv").write_text(f"key,score\n{scores}")
    model = by_size(table=str(tmp_path / "scores.csv"))
    evaluate_allocation(model, ContinuousReward(), SquaredError(), data(), tmp_path / "out", {}, HISTORY[2:])
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"photograph.png"}
    assert "No photograph: ComplexityLookup reads scores" in (tmp_path / "out/table.md").read_text()


def test_one_length_for_all_is_a_policy_too(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    policy = FixedLength(2, num_tokens=6, feature_dim=tokenizer.encoder.feature_dim)
    model = AdaptiveTokenizer(tokenizer, policy).eval()
    evaluate_allocation(model, ContinuousReward(), SquaredError(), data(), tmp_path, {})
    assert "error at the shortest: none" in (tmp_path / "table.md").read_text()
    assert "| policy | 2.00 ± 0.00 | " in (tmp_path / "table.md").read_text()


def test_sets_of_reconstructions_are_compared_at_the_policys_own_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    model, measures = by_size(), Evaluation(features=[ToyFeatures()], thresholds=(0.03,))
    metrics: dict[str, Any] = evaluate_allocation(
        model, ContinuousReward(), SquaredError(), data(), tmp_path, {}, measures=measures, limit=20
    )
    mean = metrics["allocation"]["policies"]["policy"]["length"]
    nearest = min((1, 3, 6), key=lambda budget: abs(budget - mean))
    fixed = sorted({nearest, 6})
    alone = reconstruction_distances(
        model.tokenizer, data(), ToyFeatures(), fixed, {"policy": policy_lengths(model)}, limit=20
    )
    assert metrics["distributions"] == {"fd_toy": alone}
    assert alone["own_lengths"]["policy"]["mean_length"] == pytest.approx(mean)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0].endswith("| PSNR, dB | rQPR 0.03 | fd_toy |")
    assert table[2].endswith(f" {alone['per_length'][-1]['fd_toy']:.4g} |")
    assert table[3].endswith(f" {alone['own_lengths']['policy']['fd_toy']:.4g} |")
    own = f"{alone['own_lengths']['policy']['fd_toy']:.4g} at the policy's own, {mean:.2f} on average."
    assert own in (tmp_path / "table.md").read_text()
    compare_allocations({"it": (model, ContinuousReward(), SquaredError(), ())}, data(), tmp_path, measures, limit=20)
    rows = (tmp_path / "comparison.md").read_text().splitlines()
    assert rows[0].endswith(" | fd_toy |") and rows[2].endswith(f" {alone['own_lengths']['policy']['fd_toy']:.4g} |")


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("plot_landscape", "plot_wall", "plot_allocated_photograph", "plot_training"):
        monkeypatch.setattr(allocation_report, plot, lambda *arguments: None)


def test_a_discrete_model_has_two_rows_with_bits_and_a_row_for_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    model, images = by_size(SignQuantizer(3)), data(kinds=True)
    metrics: dict[str, Any] = evaluate_allocation(model, ContinuousReward(), SquaredError(), images, tmp_path, {})
    full, adaptive = metrics["systems"]["full"], metrics["systems"]["adaptive"]
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    lengths = torch.tensor([float(row["length"]) for row in rows])
    assert full["bits"] == 6 * 3
    assert adaptive["bits"] == pytest.approx(3 * lengths.mean().item() + math.log2(3))
    policies = metrics["allocation"]["policies"]
    for system, policy in ((full, "full"), (adaptive, "policy")):
        assert policies[policy].items() <= system.items()
    decibels = [-10 * math.log10(float(row["mse"])) for row in rows]
    assert adaptive["psnr"] == pytest.approx(sum(decibels) / len(rows)) and adaptive["psnr"] != full["psnr"]

    assert [row["kind"] for row in rows] == images.kinds and list(metrics["kinds"]) == ["flat", "noisy", "smooth"]
    for kind, numbers in metrics["kinds"].items():
        own = [row for row in rows if row["kind"] == kind]
        assert numbers["count"] == len(own) == 8
        for metric in ("length", "reward", "mse"):
            assert numbers[metric] == pytest.approx(sum(float(row[metric]) for row in own) / 8)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[2].split(" | ")[:3] == ["| Full", "6.00 ± 0.00", "18.0"]
    assert table[3].split(" | ")[:3] == ["| Adaptive", f"{adaptive['length']:.2f} ± {lengths.std(correction=0):.2f}",
                                         f"{adaptive['bits']:.1f}"]  # fmt: skip
    assert "| noisy | 8 | 6.00 | " in "\n".join(table)
    # A second row of panels.
    assert pixels(tmp_path / "lengths.png").shape[1] == 1200


def test_a_policy_that_never_uses_all_tokens_has_a_longest_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    tokenizer = small_tokenizer(quantizer=SignQuantizer(3))
    policy = ComplexityLookup([200], [1, 4], num_tokens=6, feature_dim=tokenizer.encoder.feature_dim)
    model = AdaptiveTokenizer(tokenizer, policy).eval()
    metrics: dict[str, Any] = evaluate_allocation(model, ContinuousReward(), SquaredError(), data(), tmp_path, {})
    assert "| longest budget | 4.00 ± 0.00 | 12.0 | " in (tmp_path / "table.md").read_text()
    assert metrics["systems"]["full"]["bits"] == 12 and "kinds" not in metrics


def test_the_wall_shows_each_image_above_its_reconstruction(tmp_path: Path) -> None:
    model, images = by_size(), data().images[:13]
    lengths = torch.tensor([1, 6] * 6 + [3])
    with torch.no_grad():
        rebuilt = model.decode(model.encode(images, lengths))
    plot_wall(images, lengths, model.tokenizer, tmp_path / "wall.png")
    sheet = pixels(tmp_path / "wall.png")
    factor, gap, line = 7, 12, 32  # twelve columns of 16 pixels in 1600; a caption has 32 pixels
    side = 16 * factor
    assert sheet.shape[1:] == (12 + 2 * (2 * side + factor + line + gap), 12 + 12 * (side + gap))
    for at, shown in ((0, 0), (1, 1), (12, 0)):
        top, left = 12 + at // 12 * (2 * side + factor + line + gap), 12 + shown * (side + gap)
        for below, expected in ((0, images[at]), (side + factor, rebuilt[at])):
            cell = sheet[:, top + below : top + below + side, left : left + side]
            large = expected.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            torch.testing.assert_close(cell, large, atol=1 / 255, rtol=0)


def test_tiles_of_a_photograph_get_the_tokens_they_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(allocation_plots, "write_rows", lambda *arguments: shown.extend(arguments))
    model, tiles = by_size(), data().images[:6]
    photograph = rearrange(tiles, "(rows columns) c h w -> c (rows h) (columns w)", columns=3)
    plot_allocated_photograph(photograph, model, tmp_path / "photograph.png")
    cells, captions = shown[:2]
    original, policy, chosen, fixed = (cell[:, :32] for cell in cells)
    lengths = model.allocate(tiles)[1].lengths
    total = int(lengths.sum())
    assert lengths.tolist() == [1, 3, 6, 1, 3, 6]
    with torch.no_grad():
        rebuilt = model.decode(model.encode(tiles, lengths))
        equal = model.decode(model.encode(tiles, [3, 3, 4, 3, 3, 4]))
    for picture, parts in ((original, tiles), (policy, rebuilt), (fixed, equal)):
        expected = rearrange(parts, "(rows columns) c h w -> c (rows h) (columns w)", columns=3)
        torch.testing.assert_close(picture, expected)
    colours = chosen - 0.4 * photograph.mean(0)
    brightness = reduce(colours, "c (rows h) (columns w) -> (rows columns)", "mean", h=16, w=16)
    assert brightness.argsort(stable=True).tolist() == [0, 3, 1, 4, 2, 5]
    assert "policy: 1 to 6 tokens a tile\n20 in all, " in captions[1] and total == 20
    assert "fixed: 3 or 4 tokens a tile\n20 in all, " in captions[3] and "from 1 on the left to 6" in captions[2]


def test_policies_are_compared_on_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        "good": (by_size(), ContinuousReward(), SquaredError(), HISTORY),
        "other reward": (by_size(), ThresholdReward(0.05), SquaredError(), HISTORY),
    }
    compare_allocations(models, data(), tmp_path, limit=12)
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "comparison.md").read_text().splitlines()]
    assert [row[0] for row in rows[2:4]] == ["good", "other reward"]
    assert rows[2][1] == rows[3][1] and rows[2][3] == rows[3][3] and rows[2][2] != rows[3][2]
    metrics: dict[str, Any] = evaluate_allocation(*models["good"][:3], data(), tmp_path / "one", {}, limit=12)
    study = metrics["allocation"]
    expected = [study["policies"]["policy"]["reward"], study["differences"]["fixed_at_mean"]["reward"]]
    found = [float(re.split(" ", rows[2][column])[0]) for column in (2, 4)]
    assert found == pytest.approx(expected, abs=6e-5)
    assert pixels(tmp_path / "comparison.png").std() > 0.05
    assert "bits per image" not in (tmp_path / "comparison.md").read_text()
    without_pictures(monkeypatch)
    discrete = (by_size(SignQuantizer(3)), ContinuousReward(), SquaredError(), HISTORY)
    compare_allocations({"good": models["good"], "discrete": discrete}, data(), tmp_path, limit=12)
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "comparison.md").read_text().splitlines()]
    assert rows[0][4] == "bits per image" and rows[2][4] == "continuous"
    assert float(rows[3][4]) == pytest.approx(3 * float(rows[3][1].split(" ")[0]) + math.log2(3), abs=0.1)
