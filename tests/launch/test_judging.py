from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import framework
from framework.data.stream import Sequential
from framework.evaluation.digit_judge import DigitJudge, JudgeTraining
from framework.evaluation.token_coding import with_lengths
from framework.launch import judging
from framework.launch.judging import judge
from framework.models.loading import experiment_from, run_config
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import run_tool

FEW = JudgeTraining(steps=20, batch_size=32)


@pytest.fixture(autouse=True)
def quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where runs/cache is
    monkeypatch.setattr(judging.DigitJudge, "trained", partial(DigitJudge.trained, training=FEW))


def test_reconstructions_are_judged_beside_the_images(
    run_on_scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--split", "test", "--lengths", "1", "16", "--limit", "30"]
    assert run_tool(monkeypatch, "evaluate", "--run", run_on_scenes, "--judge", *options) == 0
    out = run_on_scenes / "judge_test"
    assert {path.name for path in out.iterdir()} == {"judge.json", "table.md"}
    assert (out / "table.md").read_text().strip() in capsys.readouterr().out
    found = json.loads((out / "judge.json").read_text())
    assert list(found["sets"]) == ["held-out images", "1 tokens", "16 tokens"]
    assert found["protocol"]["weights"]["run"] == str(run_on_scenes)
    assert found["protocol"]["data"]["split"] == "test"

    data = experiment_from(run_config(run_on_scenes), "meta").data
    again, tokenizer = DigitJudge.trained(data.train, Path("runs/cache")), framework.load(run_on_scenes)
    assert isinstance(tokenizer, Tokenizer)
    (batch,) = Sequential(data.test, 64, 30)
    with torch.no_grad():
        seen = {"held-out images": batch.images, "16 tokens": tokenizer.decode(tokenizer.encode(batch.images))}
        for name, images in seen.items():
            right = (again(images).argmax(1) == batch.labels).double().mean().item()
            assert found["sets"][name]["accuracy"] == pytest.approx(right)
            row = next(line for line in (out / "table.md").read_text().splitlines() if name in line)
            assert f"| {name} | {right:.1%} |" in row


def test_images_without_labels_are_refused(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_policy, "--judge") == 2
    assert "these images have no labels" in capsys.readouterr().err
    assert not (tiny_policy / "judge_validation").exists()
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_policy, "--judge", "--probe") == 2


def test_a_policys_own_lengths_are_judged_too(run_on_scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = framework.load(run_on_scenes)
    assert isinstance(tokenizer, Tokenizer)
    fixed = with_lengths(tokenizer, 2)
    experiment = experiment_from(run_config(run_on_scenes), "meta")
    monkeypatch.setattr(judging, "trained_model", lambda folder, which: (fixed, experiment, {}))
    out = judge(run_on_scenes, print, lengths=[2], limit=20)
    sets = json.loads((out / "judge.json").read_text())["sets"]
    assert sets["own lengths"] == sets["2 tokens"] != sets["held-out images"]
