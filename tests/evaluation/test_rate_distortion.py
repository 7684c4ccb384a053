from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from framework.data.stream import Sequential
from framework.evaluation.rate_distortion import (
    RateDistortion,
    default_lengths,
    few_lengths,
    mean_intervals,
    rate_distortion,
    rows_by_kind,
    validation_errors,
)
from framework.tokenizers.interface import Contract
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens
from tests.evaluation.fakes import BasisTokenizer, FixedImages, basis_tokenizer

GROUPS = ["a", "b", "a", "b", "a", "b"]


def pixel_tokenizer(contract: Contract = "truncate") -> Tokenizer:
    """Each of four tokens holds twelve of the 48 values of a 4 x 4 image; values of dropped tokens become 0."""
    return basis_tokenizer(torch.zeros(48), torch.eye(48), token_dim=12, contract=contract)


def grey_images() -> FixedImages:
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 0.0])
    return FixedImages(levels[:, None, None, None].expand(6, 3, 4, 4).clone(), GROUPS)


def curve(errors: Tensor, lengths: tuple[int, ...]) -> RateDistortion:
    keys = tuple(f"image,{row}" for row in range(len(errors)))
    return RateDistortion(errors.double(), lengths, keys, ("g",) * len(errors), {"data": "made up"})


@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 6, 8)),
        (16, (1, 2, 4, 8, 12, 16)),
        (20, (1, 2, 4, 8, 15, 16, 20)),
    ],
)
def test_default_lengths(num_tokens: int, lengths: tuple[int, ...]) -> None:
    assert default_lengths(num_tokens) == lengths


def test_few_lengths() -> None:
    assert [few_lengths(n) for n in (1, 2, 16)] == [(1,), (1, 2), (1, 4, 16)]


@pytest.mark.parametrize("contract", ["truncate", "length_conditioned"])
def test_errors_of_every_image_at_every_length_are_exact(contract: Contract) -> None:
    tokenizer = pixel_tokenizer(contract=contract)
    result = rate_distortion(tokenizer, grey_images(), [1, 2, 4], batch_size=4, record={"step": 7})
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 0.0]).double()
    expected = levels[:, None].square() * torch.tensor([0.75, 0.5, 0.0])
    torch.testing.assert_close(result.errors, expected, atol=1e-7, rtol=1e-6)
    assert result.keys == ("a@0,0", "b@1,0", "a@2,0", "b@3,0", "a@4,0", "b@5,0")
    assert result.groups == tuple(GROUPS)
    assert tokenizer.encodings == (2 if contract == "truncate" else 6)  # two batches, three lengths
    assert result.protocol["weights"] == {"step": 7}
    assert result.protocol["data"] == {"source": "given images"}
    assert (result.protocol["images"], result.protocol["groups"], result.protocol["lengths"]) == (6, 2, [1, 2, 4])


def test_limit_and_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    result = rate_distortion(
        pixel_tokenizer(), grey_images(), limit=5, batch_size=2, progress=lambda *state: seen.append(state)
    )
    assert len(result.errors) == 5
    assert seen == [("tokenizer", 2, 5), ("tokenizer", 4, 5), ("tokenizer", 5, 5)]


class DivergedTokenizer(BasisTokenizer):
    """Breaks where the third token of a bright image is read."""

    def decode(self, tokens: Tokens) -> Tensor:
        broken = (tokens.lengths > 2) & (tokens.latents.amax((1, 2)) > 0.5)
        return torch.where(broken[:, None, None, None], torch.nan, super().decode(tokens))


def test_reconstructions_that_are_not_finite_are_refused_with_keys() -> None:
    tokenizer = cast(Tokenizer, DivergedTokenizer(torch.zeros(48), torch.eye(48), token_dim=12).eval())
    with pytest.raises(ValueError, match="length 4 are not finite for 3 of 6 images, first a@2,0, b@3,0, a@4,0: the"):
        rate_distortion(tokenizer, grey_images(), [1, 2, 4])


def test_wrong_calls_say_what_to_do() -> None:
    tokenizer, data = pixel_tokenizer(), grey_images()
    with pytest.raises(ValueError, match=r"cannot keep 9 of the tokenizer's 4 tokens: .* the nearest is 4"):
        rate_distortion(tokenizer, data, [1, 9])
    with pytest.raises(ValueError, match=r"lengths must increase, got \[4, 1, 4\]; try \[1, 4\]"):
        rate_distortion(tokenizer, data, [4, 1, 4])
    with pytest.raises(ValueError, match="no images to measure: the data set holds 6 and the limit is 0"):
        rate_distortion(tokenizer, data, limit=0)
    with pytest.raises(ValueError, match=r"call tokenizer.eval\(\) first"):
        rate_distortion(tokenizer.train(), data)


def test_summary_has_the_numbers_worked_out_by_hand() -> None:
    errors = torch.tensor([[0.04, 0.01, 0.0025], [0.16, 0.01, 0.04], [0.01, 0.01, 0.0001], [0.04, 0.02, 0.01]])
    summary: dict[str, Any] = curve(errors, (1, 2, 3)).summary()
    first, second, third = summary["per_length"]
    assert first["length"] == 1 and first["share_falling"] is None
    assert first["mse"] == first["rmse"] == pytest.approx(0.0625)  # the paper's rMSE takes no root
    assert first["root_mse"] == pytest.approx((0.2 + 0.4 + 0.1 + 0.2) / 4)
    assert second["psnr"] == pytest.approx((20 + 20 + 20 + 16.98970004) / 4)
    assert second["rqpr"] == {"0.005": 0.0, "0.01": pytest.approx(0.75), "0.02": 1.0}
    assert (second["share_falling"], third["share_falling"]) == (0.75, 0.75)
    assert summary["share_falling_over_single_steps"] == 0.75
    low, high = first["mse_interval"]
    assert 0.01 <= low < 0.0625 < high <= 0.16


def test_share_over_single_steps_needs_every_length() -> None:
    assert curve(torch.rand(4, 3), (1, 2, 4)).summary()["share_falling_over_single_steps"] is None
    assert curve(torch.rand(4, 1), (1,)).summary()["share_falling_over_single_steps"] is None


def test_intervals_cover_the_true_mean_and_see_the_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    covered, trials = 0, 60
    for _ in range(trials):
        centres = torch.randn(20, generator=generator, dtype=torch.float64)
        errors = (centres[:, None] + 0.3 * torch.randn(20, 10, generator=generator)).reshape(-1, 1)
        low, high = mean_intervals(errors, [str(i // 10) for i in range(200)], resamples=200)
        covered += int(low <= 0 <= high)
    assert covered >= 50  # 57 expected; images alone would cover about 30
    ignoring = mean_intervals(errors, [str(i) for i in range(200)], resamples=200)
    assert high - low > 2 * (ignoring[1] - ignoring[0])


def test_intervals_are_deterministic_and_do_not_depend_on_the_order_of_images() -> None:
    errors = torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = ["a"] * 10 + ["b"] * 20
    once = mean_intervals(errors, groups)
    assert torch.equal(once, mean_intervals(errors, groups))
    alike = mean_intervals(torch.full((30, 2), 0.25, dtype=torch.float64), groups)
    torch.testing.assert_close(alike, torch.full((2, 2), 0.25, dtype=torch.float64))


def test_save_writes_strict_json_and_one_csv_row_per_image(tmp_path: Path) -> None:
    errors = torch.tensor([[0.5, 0.0], [0.25, 0.125]])  # an exact copy: its PSNR must not be infinite
    written = curve(errors, (1, 4)).save(tmp_path, {"pca": None})
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert metrics == written
    assert metrics["rate_distortion"]["protocol"] == {"data": "made up"} and metrics["pca"] is None
    assert set(metrics["definitions"]) >= set(metrics["rate_distortion"]["per_length"][0]) - {"length"}
    with open(tmp_path / "per_image.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["key", "group", "mse@1", "mse@4"],
        ["image,0", "g", "0.5", "0.0"],
        ["image,1", "g", "0.25", "0.125"],
    ]


def test_kinds_are_collected_named_per_image_and_averaged(tmp_path: Path) -> None:
    kinds = ["10 digits", "2 digits", "2 digits", "10 digits", "1 digit", "2 digits"]
    images = FixedImages(grey_images().images, GROUPS, kinds)
    result = rate_distortion(pixel_tokenizer(), images, [1, 4], batch_size=4)
    assert result.kinds == tuple(kinds)
    assert rows_by_kind(result.kinds) == {"1 digit": [4], "2 digits": [1, 2, 5], "10 digits": [0, 3]}
    found = result.by_kind()
    assert list(found) == ["1 digit", "2 digits", "10 digits"]
    assert [found[kind]["count"] for kind in found] == [1, 3, 2]
    first, last = found["2 digits"]["per_length"]
    assert first == {"length": 1, "mse": pytest.approx(0.75 * (0.16 + 0.36) / 3)} and last["length"] == 4
    result.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert list(rows[0]) == ["key", "group", "kind", "mse@1", "mse@4"] and [row["kind"] for row in rows] == kinds

    plain = rate_distortion(pixel_tokenizer(), grey_images(), [1, 4])
    assert plain.kinds is None and plain.by_kind() == {} == rows_by_kind(None)


@pytest.mark.parametrize(
    ("means", "length"),
    [
        ((0.9, 0.5, 0.2, 0.1), 8),
        ((0.9, 0.5, 0.1009, 0.1), 4),
        ((0.9, 0.5, 0.1011, 0.1), 8),
        ((0.9, 0.05, 0.2, 0.1), 2),  # more tokens make it worse
        ((0.1, 0.1, 0.1, 0.1), 1),
    ],
)
def test_the_idle_tail_starts_behind_the_shortest_length_that_is_as_good(means: tuple[float, ...], length: int) -> None:
    errors = torch.tensor(means).expand(3, 4)
    assert curve(errors, (1, 2, 4, 8)).idle_tail(8) == {
        "length": length, "tokens": 8 - length, "tolerance": 0.01, "measured": [1, 2, 4, 8],
    }  # fmt: skip
    assert curve(errors, (1, 2, 4, 8)).idle_tail(16) is None  # all tokens were not measured


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        curve(torch.rand(2, 1), (1,)).save(tmp_path, {"pca": {"mse": float("nan")}})
    assert not list(tmp_path.iterdir())


def test_validation_errors_are_means_over_all_images_whatever_the_batches() -> None:
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 0.0])
    result = validation_errors(pixel_tokenizer(), Sequential(grey_images(), batch_size=4))
    mean = levels.square().mean().item()
    assert result == {"mse@1": pytest.approx(0.75 * mean), "mse@4": pytest.approx(0.0, abs=1e-9)}
    assert list(validation_errors(pixel_tokenizer(), Sequential(grey_images(), 4), [2])) == ["mse@2"]
