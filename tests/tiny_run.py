"""Runs that take a second: 16x16 photographs, one block of 32 channels, a few steps."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from framework import runs
from framework.config import Config, load_config
from framework.engine.trainer import Outcome

ROOT = Path(__file__).parents[1]
TINY = [
    "data.image_size=16",
    "data.train.num_crops=200",
    "data.validation.num_crops=40",
    "data.test.num_crops=40",
    "tokenizer.encoder.width=32",
    "tokenizer.encoder.depth=1",
    "tokenizer.decoder.width=32",
    "tokenizer.decoder.depth=1",
    "train.max_steps=6",
    "train.batch_size=4",
    "train.log_every=2",
    "train.validate_every=4",
    "train.validate_images=8",
]


def tiny_config(folder: Path, *overrides: str) -> Config:
    """AdaTok's first stage, made tiny, in a run directory."""
    return load_config(ROOT / "projects/adatok/ntm.yaml", [*TINY, f"run.dir={folder}", *overrides])


def tiny_policy_config(folder: Path, tokenizer: Path, *overrides: str, config: str = "ata") -> Config:
    """AdaTok's second stage on such a run."""
    own = [f"run.dir={folder}", f"run.cache={folder.parent / 'cache'}", f"tokenizer.weights={tokenizer}"]
    return load_config(ROOT / f"projects/adatok/{config}.yaml", [*TINY, *own, *overrides])


def train_tiny(folder: Path, *overrides: str, fresh: bool = False) -> tuple[Outcome, str]:
    """Train it; returns the outcome and what was said."""
    said: list[str] = []
    return runs.train(tiny_config(folder, *overrides), said.append, fresh), "\n".join(said)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Any) -> int:
    """``python tools/NAME.py ARGUMENTS`` inside this process; returns the exit code."""
    script = str(ROOT / "tools" / f"{name}.py")
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def generator_config(folder: Path, *overrides: str) -> Config:
    """A configuration, the first of these, made small enough for seconds, with changes."""
    small = [
        "data.image_size=16", "data.train.num_images=80", "data.validation.num_images=40", "data.test.num_images=40",
        "train.max_steps=6", "train.batch_size=8", "train.log_every=2", "train.validate_every=3",
        "train.validate_images=16", "evaluation.judge_images=0",
    ]  # fmt: skip
    width = ["tokenizer.encoder.width=32", "tokenizer.encoder.depth=1", "tokenizer.decoder.width=32"]
    return load_config(
        ROOT / overrides[0], [*small, *width, "tokenizer.decoder.depth=1", f"run.dir={folder}", *overrides[1:]]
    )
