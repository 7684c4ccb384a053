"""Generated images beside real ones, and in the table of systems."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.data.digits import DigitScenes
from framework.data.interface import Batch
from framework.data.stream import Sequential
from framework.evaluation import generator_report
from framework.evaluation.digit_judge import DigitJudge
from framework.evaluation.distribution_metrics import FeatureStatistics, frechet_distance
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.generated_images import (
    HELD_OUT,
    RECONSTRUCTIONS,
    RealImages,
    compare_with_real,
    comparison_texts,
)
from framework.evaluation.image_metrics import to_uint8
from framework.evaluation.report import evaluate_tokenizer
from framework.evaluation.system_table import write_system_table
from framework.generators.guidance import Guidance
from framework.tasks.interface import Report
from tests.evaluation.toy_features import ToyFeatures
from tests.tasks.test_train_generator import make_task, silent


def scenes(split: Any, count: int) -> DigitScenes:
    return DigitScenes(split, count, image_size=16, training=False, seed=0)


@pytest.fixture(autouse=True)
def untrained_judge(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A judge that knows nothing is as good to count with, and takes no time."""
    asked: list[Path] = []

    def instead(data: DigitScenes, cache: Path, progress: object) -> DigitJudge:
        asked.append(cache)
        torch.manual_seed(0)
        return DigitJudge(10, {"training": "none"}).eval()

    monkeypatch.setattr(DigitJudge, "trained", instead)
    return asked


def real_images(cache: Path | None, **measures: Any) -> RealImages:
    chosen = Evaluation(features=[ToyFeatures()], **measures)
    return RealImages(scenes("test", 60), scenes("train", 90), lambda batch: batch.images / 2, chosen, cache)


def white(count: int) -> Iterator[Batch]:
    names = [str(number) for number in range(count)]
    yield Batch(torch.ones(count, 3, 16, 16), names, names, torch.arange(count) % 10)


def test_sets_are_compared_alike(tmp_path: Path, untrained_judge: list[Path]) -> None:
    real, stages = real_images(tmp_path, judge_images=50), []
    copies = real.sets(40)[HELD_OUT]
    found = compare_with_real(
        {"copies": copies, "white": lambda: white(40)}, real, 40, lambda stage, done, total: stages.append(stage)
    )
    judged, measured = found["judge"]["sets"], found["distributions"]["fd_toy"]
    assert list(judged) == list(measured["sets"]) == [HELD_OUT, RECONSTRUCTIONS, "copies", "white"]
    assert {each["images"] for each in (*judged.values(), *measured["sets"].values())} == {40}
    assert judged["copies"] == judged[HELD_OUT] and measured["sets"]["copies"] == measured["sets"][HELD_OUT]
    assert judged["white"]["diversity"] == 0 and judged["white"]["accuracy"] == 0.1
    assert found["judge"]["protocol"]["compared_with"]["images"] == 50 and untrained_judge == [tmp_path]
    assert measured["protocol"]["reference"]["images"] == 40 and "fd_toy" in stages

    def statistics(data: DigitScenes, factor: float) -> FeatureStatistics:
        images = torch.cat([batch.images * factor for batch in Sequential(data, 7, 40)])
        return FeatureStatistics.of(ToyFeatures()(to_uint8(images)).features)

    for name, factor in ((HELD_OUT, 1.0), (RECONSTRUCTIONS, 0.5)):
        expected = frechet_distance(statistics(real.train_data, 1.0), statistics(real.data, factor)).distance
        assert measured["sets"][name]["fd_toy"] == pytest.approx(expected, rel=1e-6)
    assert measured["sets"][HELD_OUT]["fd_toy"] < measured["sets"][RECONSTRUCTIONS]["fd_toy"]

    table, notes = comparison_texts(found)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0][1:] == ["accuracy", "95% interval", "fd_digit_judge", "diversity", "nearest training image, RMS",
                           "fd_toy"]  # fmt: skip
    assert rows[5][:2] == ["white", "10.0%"] and rows[5][-1] == f"{measured['sets']['white']['fd_toy']:.4g}"
    assert notes.startswith("Of 40 images each; real images that were not trained on, the first line, are the floor.")


@pytest.mark.parametrize(("cache", "number"), [(None, 50), (Path("here"), 0)])
def test_without_a_judge(cache: Path | None, number: int, untrained_judge: list[Path]) -> None:
    real = real_images(cache, judge_images=number)
    found = compare_with_real({}, real, 5)
    assert "judge" not in found and untrained_judge == []
    assert comparison_texts({"distributions": {}}) == []


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A generator's evaluation by its task, and its tokenizer's, on the same images."""
    for name in ("_plot_positions", "_draw_samples"):
        monkeypatch.setattr(generator_report, name, lambda *arguments: None)
    task, measures = make_task(guidance=Guidance(3.0)).eval(), Evaluation(features=[ToyFeatures()], pca=False)
    out, data = tmp_path / "ar", (scenes("test", 30), scenes("train", 50))
    task.report(Report(*data, out, {"step": 1}, measures, progress=silent, cache=tmp_path))
    plots = ("plot_rate_distortion", "plot_reconstructions", "plot_tiled_photograph", "plot_codebook")
    for name in plots:
        monkeypatch.setattr(f"framework.evaluation.report.{name}", lambda *arguments: None)
    evaluate_tokenizer(task.images.tokenizer, scenes("test", 30), tmp_path / "tokenizer", {}, measures=measures)
    return {name: tmp_path / name / "metrics.json" for name in ("tokenizer", "ar")}


def test_a_generators_evaluation_compares_its_samples(evaluated: dict[str, Path]) -> None:
    metrics = json.loads(evaluated["ar"].read_text())
    names = [HELD_OUT, RECONSTRUCTIONS, "samples, guidance 1", "samples, guidance 3 constant"]
    assert list(metrics["judge"]["sets"]) == list(metrics["distributions"]["fd_toy"]["sets"]) == names
    assert {each["images"] for each in metrics["judge"]["sets"].values()} == {30}  # 40 samples, 30 held-out images
    assert sum(metrics["samples"][names[2]]["lengths"].values()) == 40
    table = (evaluated["ar"].parent / "table.md").read_text()
    assert all(name in table for name in names) and "floor" in table
    assert "fd_toy: against 30 images of the train split, in " in table


def test_generators_in_the_table_of_systems(evaluated: dict[str, Path], tmp_path: Path) -> None:
    text = write_system_table(evaluated, tmp_path / "table.md")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:5]]
    by_name = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[3:]}
    metrics = json.loads(evaluated["ar"].read_text())
    tokenizer, generator = by_name["tokenizer"], by_name["ar"]
    size = metrics["system"]["generator_parameters"] / 1e6
    assert generator["Generator"] == f"LlamaGenAR, {size:.3g}M" and tokenizer["Generator"] == "-"
    assert generator["#Tokens"] == "6" and generator["#Params"] == tokenizer["#Params"]
    chosen = "samples, guidance 3 constant"
    expected = metrics["distributions"]["fd_toy"]["sets"][chosen]["fd_toy"]
    assert generator["fd_toy, generated"].strip("*") == f"{expected:.4g}" and tokenizer["fd_toy, generated"] == "-"
    judged = metrics["judge"]["sets"][chosen]["fd_digit_judge"]
    assert generator["fd_digit_judge, generated"] == f"{judged:.4g}"
    assert (generator["fd_toy"], generator["PSNR, dB"], tokenizer["fd_digit_judge, generated"]) == ("-", "-", "-")
    assert "fd_digit_judge, generated: in a small classifier's features, against 50 training images" in text
    alone = write_system_table({"tokenizer": evaluated["tokenizer"]}, tmp_path / "other.md")
    assert "Generator" not in alone and "generated" not in alone
    write_system_table(evaluated, tmp_path / "table.csv")
    assert "Generator" in (tmp_path / "table.csv").read_text().splitlines()[0]
