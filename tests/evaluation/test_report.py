from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framework.data.stream import subset
from framework.evaluation import report
from framework.evaluation.comparison import compare_tokenizers
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.image_metrics import SSIM_PROTOCOL, squared_error, ssim
from framework.evaluation.pca import PrincipalComponents
from framework.evaluation.plots import plot_rate_distortion, plot_tiled_photograph
from framework.evaluation.rate_distortion import RateDistortion, rate_distortion
from framework.evaluation.reconstruction_distances import data_reference, reconstruction_distances
from framework.evaluation.reference_statistics import write_reference
from framework.evaluation.report import evaluate_tokenizer, spread_images
from framework.runtime.files import digest
from framework.tokenizers.tokenizer import Tokenizer
from tests.evaluation.fakes import FixedImages, SignQuantizer, basis_tokenizer, orthonormal
from tests.evaluation.toy_features import ToyFeatures
from tests.tokenizers.build import small_tokenizer


def smooth_images(count: int, seed: int) -> torch.Tensor:
    """Colourful 8 x 8 images whose neighbouring pixels agree."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear")


def data(count: int = 24) -> FixedImages:
    return FixedImages(smooth_images(count, seed=3), ["cat", "coin", "rocket"] * (count // 3))


def tokenizer() -> Tokenizer:
    return basis_tokenizer(torch.full((192,), 0.5), orthonormal(192, 64, seed=0), token_dim=8)


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("plot_rate_distortion", "plot_reconstructions", "plot_tiled_photograph"):
        monkeypatch.setattr(report, plot, lambda *arguments: None)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_evaluation_leaves_numbers_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    train, measured = FixedImages(smooth_images(100, seed=4), ["train"] * 100), []
    metrics: dict[str, Any] = evaluate_tokenizer(
        tokenizer(), data(), folder, {"step": 3}, train, progress=lambda *state: measured.append(state)
    )
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "per_image.csv",
        "table.md",
        "rate_distortion.png",
        "reconstructions.png",
        "photograph.png",
    }
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert measured == [("tokenizer", 24, 24), ("PCA baseline", 24, 24)]
    for name, width in (("rate_distortion", 1600), ("reconstructions", 1400), ("photograph", 1000)):
        picture = pixels(folder / f"{name}.png")
        assert width <= picture.shape[1] <= 1600 and 400 < picture.shape[0] < 2500
        assert picture.std() > 10 and len(np.unique(picture[::9, ::9].reshape(-1, 3), axis=0)) > 20

    pca = metrics["pca"]
    components = PrincipalComponents.fit([train.images])
    expected = components.errors(data().images, [8, 16, 32, 48, 64]).double().mean(0).tolist()
    assert [row["mse"] for row in pca["per_length"]] == expected
    assert pca["protocol"]["weights"]["fitted_images"] == 100
    table = (folder / "table.md").read_text().splitlines()
    assert len(table) == 2 + 5 + 2  # header, rule, lengths 1 2 4 6 8, blank, note
    assert table[2].startswith("| 1 | ") and table[2].endswith(f" {1000 * expected[0]:.3g} |")
    assert metrics["idle_tail"]["tokens"] == 0 and not {"codebook", "kinds"} & set(metrics)


def test_a_discrete_tokenizer_also_tells_of_bits_and_its_codebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    held_out = FixedImages(images, ["a", "b", "c"] * 4, ["noise", "more noise"] * 6)
    coding = small_tokenizer(quantizer=SignQuantizer(5)).eval()
    metrics: dict[str, Any] = evaluate_tokenizer(coding, held_out, tmp_path, {}, held_out, limit=8)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    codes = coding.encode(held_out.fetch(subset(12, 8), 0).images).codes
    assert codes is not None
    codebook = metrics["codebook"]
    assert (codebook["vocabulary"], codebook["bits_per_token"], codebook["tokens"]) == (32, 5, 48)
    assert codebook["dead_codes"] == 32 - len(codes.unique())
    assert codebook["per_position"]["usage"] == [len(column.unique()) / 32 for column in codes.T]
    assert set(codebook["definitions"]) >= set(codebook) - {"definitions", "vocabulary", "bits_per_token", "dead_codes"}

    table = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[1] for line in table.splitlines()[2:6]] == ["5.0", "10.0", "20.0", "30.0"]
    perplexities = codebook["per_position"]["perplexity"]
    ends = (min(perplexities), max(perplexities))
    low, high = (f"{value:.4g} at token {perplexities.index(value) + 1}" for value in ends)
    told = f", dead codes {codebook['dead_codes']}. By position, the lowest perplexity is {low}, the highest {high}."
    assert told in table
    assert "48 in all (of 16,000 wanted), 8 at each position (of 320 wanted)" in table
    assert metrics["pca_note"].endswith("32 codes, 5 bits, while PCA's 5 floats for it are not coded.")
    assert len(metrics["kinds"]) == 2
    for kind, numbers in metrics["kinds"].items():
        errors = (f"{1000 * row['mse']:.3g}" for row in numbers["per_length"])
        assert f"| {kind} | {numbers['count']} | {' | '.join(errors)} |\n" in table
    assert pixels(tmp_path / "codebook.png").std() > 10


def test_sets_similarity_and_thresholds_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    held_out, coding = FixedImages(images, ["a", "b", "c"] * 4), small_tokenizer().eval()
    measures = Evaluation(lengths=(2, 6), features=[ToyFeatures()], thresholds=(0.1, 0.25), pca=False)
    metrics: dict[str, Any] = evaluate_tokenizer(coding, held_out, tmp_path, {"step": 5}, measures=measures, limit=9)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    alone = reconstruction_distances(coding, held_out, ToyFeatures(), (2, 6), limit=9, record={"step": 5})
    assert metrics["distributions"] == {"fd_toy": alone}
    chosen = images[subset(12, 9)]
    curve = metrics["rate_distortion"]
    for at in curve["per_length"]:
        rebuilt = coding.decode(coding.encode(chosen, at["length"]))
        assert at["ssim"] == pytest.approx(ssim(chosen, rebuilt).mean().item())
        errors = squared_error(chosen, rebuilt)
        assert at["rqpr"] == {str(most): (errors <= most).double().mean().item() for most in (0.1, 0.25)}
    assert curve["protocol"]["ssim"] == SSIM_PROTOCOL
    table = (tmp_path / "table.md").read_text()
    header, last = (table.splitlines()[row].strip("| ").split(" | ") for row in (0, 3))
    assert header[4:9] == ["SSIM", "rQPR 0.1", "rQPR 0.25", "fd_toy", "falls"]
    assert last[4] == f"{curve['per_length'][1]['ssim']:.3f}" and last[7] == f"{alone['per_length'][1]['fd_toy']:.4g}"
    assert "fd_toy: 9 reconstructions against these images themselves, in colours of quarters, none, weights " in table
    assert "the sample has 9 images, not more than the 12 features" in table


def test_other_statistics_may_be_the_reference(tmp_path: Path) -> None:
    made = data_reference(FixedImages(smooth_images(30, seed=8), ["x"] * 30), ToyFeatures())
    write_reference(tmp_path / "reference.npz", made, ToyFeatures())
    measures = Evaluation(features=[ToyFeatures()], references={"fd_toy": str(tmp_path / "reference.npz")})
    compare_tokenizers({"one": tokenizer(), "two": tokenizer()}, data(), tmp_path, measures=measures)
    expected = reconstruction_distances(tokenizer(), data(), ToyFeatures(), reference=made)
    numbers = " | ".join(f"{at['fd_toy']:.3g}" for at in expected["per_length"])
    text = (tmp_path / "comparison.md").read_text()
    header = f"| fd_toy at tokens | 1 | 2 | 4 | 6 | 8 |\n| --- |{' ---: |' * 5}\n"
    assert f"{header}| one | {numbers} |\n| two | {numbers} |\n" in text
    assert f"against 30 images of reference.npz (sha256 {digest(tmp_path / 'reference.npz')[:12]}), in colours" in text


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"features": [ToyFeatures(), ToyFeatures(2.0)]}, "two of evaluation.features give one metric; there"),
        ({"features": [ToyFeatures()], "references": {"fid": "x"}}, "'fid', and the metrics of features are fd_toy"),
        ({"references": {"fid": "x.npz"}}, "are none: set evaluation.features"),
        ({"thresholds": (0.1, 0.0)}, "squared errors above 0"),
        ({"codec_images": -1}, "codec_images and judge_images are not below 0"),
    ],
)
def test_measures_that_make_no_sense_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Evaluation(**wrong)


def test_discrete_tokens_stand_beside_codecs_at_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    images = torch.nn.functional.interpolate(smooth_images(12, seed=1), (16, 16), mode="bilinear")
    held_out, coding = FixedImages(images, ["a", "b", "c"] * 4), small_tokenizer(quantizer=SignQuantizer(5)).eval()
    measures = Evaluation(lengths=(2, 6), codec_images=5)
    metrics: dict[str, Any] = evaluate_tokenizer(coding, held_out, tmp_path, {}, measures=measures, limit=9)
    codecs, chosen = metrics["codecs"], images[subset(12, 5)]
    rebuilt = coding.decode(coding.encode(chosen, 6))
    assert codecs["tokens"]["per_length"][1]["mse"] == pytest.approx(squared_error(chosen, rebuilt).mean().item())
    for title in ("JPEG", "WebP without headers"):
        assert codecs[title]["protocol"]["images"] == 5
        assert [at["max_bytes"] for at in codecs[title]["per_length"]] == [2, 4]
    table = (tmp_path / "table.md").read_text()
    assert "| PSNR, dB, of 5 images at tokens | 2 | 6 |" in table and "| bytes at most | 2 | 4 |" in table
    assert f"| bits a pixel | {10 / 256:.3g} | {30 / 256:.3g} |" in table
    jpeg = codecs["JPEG"]["per_length"][0]
    assert jpeg["fitting"] == 0 and f"| JPEG | {jpeg['psnr']:.2f} in {jpeg['bytes']:,.0f} bytes |" in table
    none = evaluate_tokenizer(coding, held_out, tmp_path, {}, measures=Evaluation(codec_images=0), limit=9)
    assert "codecs" not in none and "JPEG" not in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ((1, 2, 3, 4), "that of all 4 tokens: the last 2 do nearly nothing for it.\n"),
        ((2, 4), "the last 2 do nearly nothing for it (no length between 0 and 2 was measured).\n"),
        ((1, 4), None),
    ],
)
def test_tokens_that_do_nothing_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], told: str | None
) -> None:
    without_pictures(monkeypatch)
    images = torch.full((6, 192), 0.3)
    images[:, :48] = torch.rand(6, 48, generator=torch.Generator().manual_seed(0))
    images[:, 48:96] = 0.5  # the last two of four tokens have nothing to tell
    held_out = FixedImages(images.reshape(6, 3, 8, 8), ["a"] * 6)
    half = basis_tokenizer(torch.full((192,), 0.5), torch.eye(192)[:, :96], token_dim=24)
    evaluate_tokenizer(half, held_out, tmp_path, {}, measures=Evaluation(lengths=tuple(lengths)))
    table = (tmp_path / "table.md").read_text()
    assert ("do nearly nothing" in table) == (told is not None)
    if told is not None:
        assert "Of the measured lengths, 2 is the shortest whose mean MSE is at most 1% above " in table
        assert table.endswith(told) and ("at least" in table) == (lengths == (2, 4))


def test_missing_baselines_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    metrics = evaluate_tokenizer(tokenizer(), data(), tmp_path, {}, measures=Evaluation(lengths=(8,)))
    assert metrics["pca"] is None and metrics["pca_note"] == "No PCA baseline: not asked for."
    large = FixedImages(torch.rand(3, 3, 40, 40), ["a", "b", "c"])
    wide = basis_tokenizer(torch.full((4800,), 0.5), torch.eye(4800)[:, :2], token_dim=1)
    metrics = evaluate_tokenizer(wide, large, tmp_path, {}, train_data=large)
    assert metrics["pca"] is None and metrics["pca_note"] == "No PCA baseline: images of 4800 values."
    assert "No PCA baseline" in (tmp_path / "table.md").read_text()


def test_spread_takes_groups_in_turn_and_rising_difficulty() -> None:
    errors = torch.arange(20.0)[:, None] / 100
    groups = tuple("ab"[row % 2] for row in range(20))
    curve = RateDistortion(errors, (1,), tuple(map(str, range(20))), groups, {})
    rows = spread_images(curve, count=4)
    assert [groups[row] for row in rows] == ["a", "b", "a", "b"]
    assert rows == [2, 7, 12, 17]
    assert spread_images(RateDistortion(errors[:1], (1,), ("0",), ("a",), {}), count=4) == [0]


def test_the_photograph_is_in_colour_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.Tensor] = []
    monkeypatch.setattr(report, "plot_tiled_photograph", lambda photograph, *rest: chosen.append(photograph))
    images = smooth_images(3, seed=0)
    images[[0, 2]] = images[[0, 2], :1]  # grey
    held_out = FixedImages(images, ["grey", "colour", "grey again"])
    evaluate_tokenizer(tokenizer(), held_out, tmp_path, {}, measures=Evaluation(lengths=(8,)))
    assert torch.equal(chosen[0], held_out.whole("colour"))


def test_tiles_of_a_photograph_come_back_where_they_were(tmp_path: Path) -> None:
    copying = basis_tokenizer(torch.zeros(192), torch.eye(192), token_dim=48)
    photograph = torch.rand(3, 20, 35, generator=torch.Generator().manual_seed(0))
    plot_tiled_photograph(photograph, copying, (1, 4), tmp_path / "photograph.png")
    sheet = torch.from_numpy(pixels(tmp_path / "photograph.png").copy()).permute(2, 0, 1) / 255
    cropped = photograph[:, 2:18, 1:33]  # two by four whole tiles of 8 x 8, from the centre
    factor = ((1600 - 12) // 2 - 12) // 32
    cropped = cropped.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    height, width = cropped.shape[1:]
    assert sheet.shape[2] == 12 + 2 * (width + 12)
    original, below = sheet[:, 12 : 12 + height], sheet[:, 12 + height + 56 + 12 :][:, :height]
    torch.testing.assert_close(original[:, :, 12 : 12 + width], cropped, atol=1 / 255, rtol=0)
    torch.testing.assert_close(below[:, :, 12 : 12 + width], cropped, atol=1 / 255, rtol=0)  # all four tokens
    one = original[:, :, 24 + width : 24 + 2 * width]
    assert squared_error(one[None], cropped[None]).item() > 0.1


def test_large_photographs_shrink_to_24_tiles_and_small_ones_grow_to_one(tmp_path: Path) -> None:
    for height, width, tiles in ((400, 800, 12 * 24), (800, 400, 12 * 24), (5, 20, 4), (8, 8, 1)):
        copying = basis_tokenizer(torch.zeros(192), torch.eye(192), token_dim=48)
        plot_tiled_photograph(torch.rand(3, height, width), copying, (4,), tmp_path / "photograph.png")
        assert copying.decoded == tiles


def test_a_second_curve_is_drawn(tmp_path: Path) -> None:
    errors = torch.tensor([[0.1, 0.05, 0.01], [0.2, 0.08, 0.02]]).double()
    one = RateDistortion(errors, (1, 2, 4), ("a", "b"), ("a", "b"), {})
    two = RateDistortion(errors * 3, (1, 2, 4), ("a", "b"), ("a", "b"), {})
    plot_rate_distortion({"masked": one}, None, tmp_path / "one.png")
    plot_rate_distortion({"masked": one, "full": two}, one, tmp_path / "two.png")
    orange = np.array([0xC4, 0x57, 0x2E])
    assert not (pixels(tmp_path / "one.png") == orange).all(-1).any()
    assert (pixels(tmp_path / "two.png") == orange).all(-1).sum() > 500


def test_several_tokenizers_are_compared_on_the_same_images(tmp_path: Path) -> None:
    tokenizers = {"good": tokenizer(), "same": tokenizer()}
    compare_tokenizers(tokenizers, data(), tmp_path, data())
    rows = [line.split(" | ") for line in (tmp_path / "comparison.md").read_text().splitlines()]
    names = [row[0].strip("| ") for row in rows[:5]]
    assert names == ["MSE x 1000 at tokens", "---", "good", "same", "PCA, equal floats"]
    assert rows[2][1:] == rows[3][1:] and len(rows[2]) == len(rows[0])
    expected = 1000 * rate_distortion(tokenizer(), data()).errors.mean(0)
    assert [float(cell.strip(" |")) for cell in rows[2][1:]] == pytest.approx(expected.tolist(), rel=5e-3)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
