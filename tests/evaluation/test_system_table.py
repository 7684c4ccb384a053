from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.fidelity import SquaredError
from framework.allocation.rewards import ContinuousReward
from framework.allocation.rules import ComplexityLookup
from framework.evaluation import allocation_report, report
from framework.evaluation.allocation_report import evaluate_allocation
from framework.evaluation.autoencoder_report import evaluate_autoencoder
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.report import evaluate_tokenizer
from framework.evaluation.system_table import write_system_table
from framework.evaluation.systems import system_facts
from framework.tokenizers.autoencoders.autoencoder_kl import AutoencoderKL
from framework.tokenizers.masking import DelayedStart, FullLength, NestedTailMasking
from tests.evaluation.fakes import FixedImages, SignQuantizer
from tests.evaluation.toy_features import ToyFeatures
from tests.tiny_run import run_tool
from tests.tokenizers.build import small_tokenizer

MEASURES = Evaluation(features=[ToyFeatures()], codec_images=0, pca=False)


def data(seed: int = 0) -> FixedImages:
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return FixedImages(images, ["a", "b", "c"] * 4)


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Evaluations of a discrete tokenizer, a policy and an autoencoder on the same images, by name."""
    for module, plots in (
        (report, ("plot_rate_distortion", "plot_reconstructions", "plot_tiled_photograph", "plot_codebook")),
        (allocation_report, ("plot_landscape", "plot_lengths", "plot_wall", "plot_allocated_photograph")),
    ):
        for plot in plots:
            monkeypatch.setattr(module, plot, lambda *arguments: None)
    tokenizer = small_tokenizer(quantizer=SignQuantizer(5), masking=NestedTailMasking()).eval()
    policy = ComplexityLookup([600], [2, 6], num_tokens=6, feature_dim=tokenizer.encoder.feature_dim)
    adaptive = AdaptiveTokenizer(tokenizer, policy).eval()
    space = AutoencoderKL(8, (1, 2), 1, (), latent_channels=2, resolution=16).eval()
    evaluate_tokenizer(tokenizer, data(), tmp_path / "discrete", {}, measures=MEASURES)
    reward, fidelity = ContinuousReward(), SquaredError()
    evaluate_allocation(adaptive, reward, fidelity, data(), tmp_path / "policy", {}, measures=MEASURES)
    evaluate_autoencoder(space, data(), tmp_path / "space", {}, MEASURES)
    return {name: tmp_path / name / "metrics.json" for name in ("discrete", "policy", "space")}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_table_has_what_the_evaluations_say(evaluated: dict[str, Path], tmp_path: Path) -> None:
    text = write_system_table(evaluated, tmp_path / "table.md", lengths=[2])
    assert (tmp_path / "table.md").read_text() == text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:8]]
    assert rows[0][:2] == ["Tokenizer", "Elastic"] and rows[0][-1] == "fd_toy"
    first = [row[0] for row in rows[2:]]
    assert first == ["2D tokenizers", "space", "1D tokenizers", "discrete, 2 tokens", "discrete", "policy"]
    by_name = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    discrete = read(evaluated["discrete"])
    last = discrete["rate_distortion"]["per_length"][-1]
    found = by_name["discrete"]
    assert (found["Codebook"], found["#Tokens"], found["Bits"], found["Elastic"]) == ("32", "6", "30", "yes")
    assert found["MSE x 1000"].strip("*") == f"{1000 * last['mse']:.3g}"
    distance = discrete["distributions"]["fd_toy"]["per_length"][-1]["fd_toy"]
    assert found["fd_toy"].strip("*") == f"{distance:.4g}"
    own = read(evaluated["policy"])["systems"]["adaptive"]
    assert by_name["policy"]["#Tokens"] == f"{own['length']:.4g}" and by_name["policy"]["SSIM"] == "-"
    assert by_name["space"]["Codebook"] == "-" and by_name["space"]["#Tokens"] == "64"
    assert by_name["space"]["Elastic"] == "no" and by_name["space"]["Dim"] == "2"
    best = min(found["MSE x 1000"].strip("*") for found in by_name.values() if found["MSE x 1000"])
    assert [name for name, found in by_name.items() if "**" in found["MSE x 1000"]] == [
        name for name, found in by_name.items() if found["MSE x 1000"].strip("*") == best
    ]
    assert "12 images of 16x16: source given images. fd_toy: against these images themselves, in " in text


def test_numbers_at_full_precision_and_for_latex(evaluated: dict[str, Path], tmp_path: Path) -> None:
    write_system_table(evaluated, tmp_path / "table.csv")
    rows = {row["Tokenizer"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    last = read(evaluated["discrete"])["rate_distortion"]["per_length"][-1]
    assert float(rows["discrete"]["MSE x 1000"]) == last["mse"] and rows["space"]["Codebook"] == ""
    write_system_table(evaluated, tmp_path / "table.tex")
    assert r"\begin{tabular}{llrr" in (tmp_path / "table.tex").read_text()
    with pytest.raises(ValueError, match="a table is a .md, .tex or .csv file"):
        write_system_table(evaluated, tmp_path / "table.txt")


def test_what_was_measured_otherwise_is_refused(
    evaluated: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = read(evaluated["policy"])
    for change, told in (
        (lambda m: m["allocation"]["protocol"].update(images=11), "images is 12 and 11"),
        (lambda m: m["allocation"]["protocol"].update(data={"source": "others"}), "data is {'source': 'given images'}"),
        (lambda m: m["distributions"]["fd_toy"]["protocol"].update(reference={"file": "x"}), "fd_toy is "),
    ):
        changed = json.loads(json.dumps(good))
        change(changed)
        evaluated["policy"].write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"discrete and policy were not measured alike: {told}"):
            write_system_table({name: evaluated[name] for name in ("discrete", "policy")}, tmp_path / "table.md")
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    arguments = ["--run", run, "--out", tmp_path / "table.md"]
    assert run_tool(monkeypatch, "report", *arguments) == 2
    assert f"there is no {run}/evaluation/metrics.json: evaluate the run first" in capsys.readouterr().err
    for content in ("{", '{"rate_distortion": {}}'):
        (run / "evaluation/metrics.json").write_text(content)
        assert run_tool(monkeypatch, "report", *arguments) == 2
        assert "is damaged, or of an older version: evaluate the run again" in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()


def test_the_tool_writes_the_table(
    tiny_run: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_tool(monkeypatch, "report", "--run", tiny_run, tiny_policy, "--out", tmp_path / "table.md") == 0
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert f"| {tiny_policy} | yes |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "masking, elastic",
    [
        (FullLength(), False),
        (NestedTailMasking(), True),
        (DelayedStart(NestedTailMasking(), 0.1), True),
        (DelayedStart(FullLength(), 0.1), False),
    ],
)
def test_what_is_elastic(masking: Any, elastic: bool) -> None:
    tokenizer = small_tokenizer(masking=masking)
    facts = system_facts(tokenizer)
    assert facts["elastic"] is elastic and facts["codebook"] is None
    assert facts["parameters"] == sum(parameter.numel() for parameter in tokenizer.parameters())
