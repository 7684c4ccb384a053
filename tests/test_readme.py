"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import framework.evaluation.report
from framework.data.photos import Photos
from framework.tokenizers.interface import QUANTIZERS
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import ROOT, TINY, files_of, run_tool

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [
    line[line.index("python tools/") :]
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if "python tools/" in line
]


def python_block(*, holding: str) -> str:
    """The one block of Python with these words."""
    (found,) = [text for language, text in BLOCKS if language == "python" and holding in text]
    return str(found)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, with the README's own part in it; what importing that part changes is undone."""
    (tmp_path / "my_parts.py").write_text(python_block(holding="# my_parts.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(QUANTIZERS, "_obj_map", dict(QUANTIZERS._obj_map))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    return tmp_path


def arguments_of(command: str) -> tuple[str, list[str]]:
    """A tool's name and its arguments, without what stands behind ``#``."""
    _, script, *arguments = shlex.split(command, comments=True)
    return Path(script).stem, arguments


def test_every_block_is_accounted_for() -> None:
    python = [text for language, text in BLOCKS if language == "python"]
    assert python == [python_block(holding=words) for words in ("framework.load", "# my_parts.py", "fit()")]
    assert {arguments_of(command)[0] for command in COMMANDS} == {"train_net", "evaluate", "info"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train_net.py" in command])
def test_training_commands_pass_the_check(
    command: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments = arguments_of(command)
    kept = [argument for argument in arguments if argument not in ("--check", "--dry-run")]
    assert run_tool(monkeypatch, name, *kept, "--check") == 0, capsys.readouterr().err
    assert run_tool(monkeypatch, name, *arguments, "--check", "run.no_such_key=1") == 2  # it is the check that passes


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train_net.py" not in command])
def test_other_commands_work(
    command: str,
    tiny_run: Path,
    elsewhere: Path,
    quick_report: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_run, "runs/adatok/ntm")
    name, arguments = arguments_of(command)
    assert run_tool(monkeypatch, name, *arguments) == 0, capsys.readouterr().err
    assert len(capsys.readouterr().out) > 50


def test_a_part_of_ones_own_trains(
    elsewhere: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [command for command in COMMANDS if "my_parts" in command]
    name, arguments = arguments_of(command)
    assert run_tool(monkeypatch, name, *arguments, *TINY, "train.max_steps=2") == 0, capsys.readouterr().err
    tokenizer = framework.load("runs/noisy")
    assert isinstance(tokenizer, Tokenizer) and type(tokenizer.quantizer).__name__ == "NoisyIdentity"
    assert sys.modules["my_parts"].__file__ == str(elsewhere / "my_parts.py")
    latents = torch.randn(2, 3, 16)
    assert torch.equal(tokenizer.quantizer(latents).latents, latents.tanh())
    assert not torch.equal(tokenizer.quantizer.train()(latents).latents, latents.tanh())


def test_a_trained_model_is_used(tiny_run: Path, elsewhere: Path) -> None:
    shutil.copytree(tiny_run, "runs/adatok/ntm")
    shown = python_block(holding="framework.load")
    code = shown.replace("3, 32, 32", "3, 16, 16")
    assert code != shown
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["rebuilt"].shape == (2, 3, 16, 16) and 0 <= names["rebuilt"].min() <= names["rebuilt"].max() <= 1
    assert names["tokens"].lengths.tolist() == [4, 16]


def test_training_without_yaml(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = python_block(holding="fit()").replace("24_000", "200")
    code, replaced = re.subn(r"\bmax_steps=[\d_]+", "max_steps=2", code)
    assert replaced
    crops, *others = Photos.__init__.__defaults__ or ()
    assert crops == 24_000
    monkeypatch.setattr(Photos.__init__, "__defaults__", (200, *others))
    monkeypatch.setattr(framework.evaluation.report, "MAX_VALUES", 0)  # no principal components, which take seconds
    (elsewhere / "plain.py").write_text(code)
    before = set(files_of(elsewhere))
    exec(compile(code, "plain.py", "exec"), {"__name__": "__main__"})
    left = {Path(name).name for name in set(files_of(elsewhere)) - before}
    assert {"metrics.jsonl", "model.safetensors", "ema.safetensors"} <= left
    assert list(elsewhere.rglob("step_00000002"))
