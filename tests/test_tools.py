from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from framework.tokenizers.interface import QUANTIZERS
from tests.tiny_run import ROOT, TINY, files_of, run_tool, train_tiny

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
CONFIG = str(ROOT / "projects/adatok/ntm.yaml")


@pytest.mark.parametrize("name", TOOLS)
def test_help_has_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, name, "--help") == 0
    text = capsys.readouterr().out
    assert "example" in text and f"python tools/{name}.py " in text


@pytest.mark.parametrize("name", TOOLS)
def test_an_unknown_option_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, name, "--no-such-option") == 2
    assert capsys.readouterr().err.startswith("usage:")


# train_net.py


def test_check_of_a_right_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = f"run.dir={tmp_path / 'run'}"
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, before, "--check", "train.max_steps=3") == 0
    assert capsys.readouterr() == (f"{CONFIG} is right\n", "")
    assert list(tmp_path.iterdir()) == []


def test_check_lists_all_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["tokenizer.encoder.widht=3", "train.batch_size=many"]
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, "--check", *wrong) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("2 errors in the configuration:")
    assert "tokenizer.encoder.widht: unknown key 'widht': did you mean 'width'?" in err
    assert "train.batch_size: expected an integer, got the string 'many'" in err


REFUSED = {
    "no such file": (["--config", "no/such.yaml"], "there is no configuration no/such.yaml"),
    "parts that do not fit": (["--config", CONFIG, *TINY, "tokenizer.encoder.patch_size=5"], "patch_size must divide"),
    "no such images": (
        ["--config", CONFIG, "data.train.name=ImageFolder", "data.train.root=no/photos"],
        "no/photos does not exist",
    ),
    "weights of no run": (["--config", CONFIG, *TINY, "tokenizer.weights=no/run"], "no/run holds no run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_told_in_words(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    assert run_tool(monkeypatch, "train_net", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    assert run_tool(monkeypatch, "train_net", "--config", CONFIG, *TINY, run, "--dry-run") == 0
    out = capsys.readouterr().out
    for fact in ("parameters", "multiply-adds per image of 16x16", "6 steps of 4 images", str(tmp_path / "run")):
        assert fact in out
    assert list(tmp_path.iterdir()) == []


def test_train_twice_and_anew(
    tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["--config", CONFIG, *TINY, "train.max_steps=2", f"run.dir={folder}"]
    assert run_tool(monkeypatch, "train_net", *command) == 0
    assert f"results: {folder}/evaluation/metrics.json" in capsys.readouterr().out
    assert run_tool(monkeypatch, "train_net", *command) == 0
    assert f"{folder} is finished: 2 steps" in capsys.readouterr().out
    assert run_tool(monkeypatch, "train_net", *command, "run.seed=1") == 2
    out, err = capsys.readouterr()
    assert "of another configuration" in err and "-  seed: 0\n+  seed: 1" in err
    assert run_tool(monkeypatch, "train_net", *command, "run.seed=1", "--fresh") == 0
    assert "moved the older run to" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2


def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = [*TINY, "train.max_steps=1000000", "train.log_every=1", f"run.dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/train_net.py"), "--config", CONFIG, *changes],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"stopped and saved at step {step} of 1000000; the same command continues" in out
    assert "SIGINT: saving after this step" in err and "Traceback" not in err
    assert not (folder / "evaluation").exists()


# evaluate.py


def test_evaluate_measures_what_it_is_told(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(tiny_run)
    out = tmp_path / "results"
    what = ["--split", "test", "--lengths", "1", "16", "--limit", "5", "--out", out]
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_run, *what) == 0
    measured = json.loads((out / "metrics.json").read_text())["rate_distortion"]
    assert [row["length"] for row in measured["per_length"]] == [1, 16]
    assert measured["protocol"]["images"] == 5 and measured["protocol"]["data"]["split"] == "test"
    assert str(out / "photograph.png") in capsys.readouterr().out
    assert files_of(tiny_run) == before


def test_evaluate_without_options(tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(tmp_path / "run", "train.max_steps=2")
    own = (tmp_path / "run/evaluation/metrics.json").read_bytes()
    assert run_tool(monkeypatch, "evaluate", "--run", tmp_path / "run") == 0
    assert (tmp_path / "run/evaluation/metrics.json").read_bytes() == own
    asked = json.loads((tmp_path / "run/evaluation_validation/metrics.json").read_text())
    assert (asked["split"], asked["lengths"], asked["limit"]) == ("validation", None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "1", "17"], "cannot keep 17 of the tokenizer's 16 tokens"),
        (["--lengths", "4", "2"], "lengths must increase, got [4, 2]; try [2, 4]"),
        (["--limit", "0"], "there are no images to measure"),
    ],
)
def test_evaluate_refuses_in_words(
    options: list[str],
    message: str,
    tmp_path: Path,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_run, "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_evaluate_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "evaluate", "--run", tmp_path) == 2
    assert f"{tmp_path} holds no run: it has no config.yaml" in capsys.readouterr().err


# info.py


def test_info_lists_components(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(monkeypatch, "info", "components") == 0
    out = capsys.readouterr().out
    for name in ("SuffixTokenViT", "MaskTokenViT", "NestedTailMasking", "Identity", "PixelLoss", "Muon", "Photos"):
        assert f"  {name}: " in out


def test_info_lists_one_axis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(monkeypatch, "info", "components", "quantizer") == 0
    out = capsys.readouterr().out
    assert all(f"  {name}: " in out for name, _ in QUANTIZERS) and "SuffixTokenViT" not in out
    assert "dim: int = 16" in out
    assert run_tool(monkeypatch, "info", "components", "quantiser") == 2
    assert "unknown axis 'quantiser': did you mean 'quantizer'?" in capsys.readouterr().err


def test_info_tells_of_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "images", tmp_path / "lists/broken.txt"
    root.mkdir()
    Image.new("RGB", (30, 20)).save(root / "a.png")
    command = ["data", root, "--workers", "0", "--decode", "5", "--out", out]
    assert run_tool(monkeypatch, "info", *command) == 0
    assert "decoded: 1 of 1" in capsys.readouterr().out and out.read_text() == ""
    (root / "b.png").touch()
    assert run_tool(monkeypatch, "info", *command) == 1
    assert "broken images: 1\n  the file is empty: 1 (b.png)" in capsys.readouterr().out
    assert out.read_text() == "b.png\tthe file is empty\n"
    assert run_tool(monkeypatch, "info", "data", tmp_path / "nowhere") == 2
    assert f"the folder {tmp_path}/nowhere does not exist" in capsys.readouterr().err


# benchmark.py


def test_loading_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "cat/a.png")
    sizes = ["--image-size", "16", "--batch", "2", "--rounds", "1"]
    assert run_tool(monkeypatch, "benchmark", "data", "--root", tmp_path, *sizes, "--workers", "0", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0 workers, 16x16, ") and lines[6].startswith("1 workers, 16x16, ")
    assert "1 alternating rounds of 8 images" in lines[1]
    for table in (lines[3:6], lines[9:12]):
        assert [line[:14].strip() for line in table] == ["decode only", "Stream", "torchvision"]
    assert run_tool(monkeypatch, "benchmark", "data", "--root", tmp_path / "nowhere") == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_policies_are_compared(
    tiny_policy: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "comparison"
    arguments = ("evaluate", "--run", tiny_policy, tiny_policy, "--out", out, "--limit", "8")
    assert run_tool(monkeypatch, *arguments) == 0
    assert f"| {tiny_policy} | " in (out / "comparison.md").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert run_tool(monkeypatch, *arguments, "--lengths", "4") == 2
    assert "the policy chooses the lengths" in capsys.readouterr().err
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_policy, tiny_run, "--out", out) == 2
    assert "only runs of one kind are compared" in capsys.readouterr().err


def test_several_runs_are_compared(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    out = tmp_path / "comparison"
    arguments = ("--lengths", "1", "4", "--limit", "8")
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_run, copy, "--out", out, *arguments) == 0
    rows = [line.split(" | ") for line in (out / "comparison.md").read_text().splitlines()]
    assert rows[2][0] == f"| {tiny_run}" and rows[3][0] == f"| {copy}" and rows[2][1:] == rows[3][1:]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "comparison.png") in capsys.readouterr().out
    assert run_tool(monkeypatch, "evaluate", "--run", tiny_run, copy) == 2
    assert "say where the results go: --out DIR" in capsys.readouterr().err
