from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework import runs
from framework.launch.probing import probe
from framework.tokenizers.spaces import PixelSpace
from tests.tiny_run import run_tool


def test_a_run_is_probed_on_its_own_data(
    run_on_scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    options = ["--split", "test", "--lengths", "1", "16", "--limit", "30"]
    assert run_tool(monkeypatch, "evaluate", "--run", run_on_scenes, "--probe", *options) == 0
    out = run_on_scenes / "probe_test"
    assert {path.name for path in out.iterdir()} == {"metrics.json", "table.md", "linear_probe.png"}
    said = capsys.readouterr().out
    assert (out / "table.md").read_text().strip() in said and f"results: {out}/linear_probe.png" in said
    protocol = json.loads((out / "metrics.json").read_text())["protocol"]
    assert (protocol["train"]["data"]["split"], protocol["test"]["data"]["split"]) == ("train", "test")
    assert (protocol["train"]["images"], protocol["test"]["images"]) == (120, 30)
    assert protocol["weights"]["run"] == str(run_on_scenes) and protocol["readout"] == "concatenated"
    assert probe(run_on_scenes, print, "mean", lengths=[2]) == run_on_scenes / "probe_validation"
    other = json.loads((run_on_scenes / "probe_validation/metrics.json").read_text())["protocol"]
    assert other["weights"] == protocol["weights"] and other["readout"] == "mean"


def test_the_tokenizer_of_a_policy_is_probed_too(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_policy, "--probe") == 2
    assert "these images have no labels. Sets that have them: Digits" in capsys.readouterr().err
    assert not (tiny_policy / "probe_validation").exists()


def test_what_cannot_be_probed_is_told(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([tiny_run, "--out", "out"], ["--distances", "STLPIPS"]):
        assert run_tool(monkeypatch, "evaluate", "--probe", "mean", "--run", tiny_run, *more) == 2
        assert "--probe and --judge take one run, and neither distances nor features" in capsys.readouterr().err
    monkeypatch.setattr(runs, "load", lambda folder, checkpoint: PixelSpace())
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_run, "--probe") == 2
    assert f"{tiny_run} has trained PixelSpace, which makes no tokens" in capsys.readouterr().err
