"""One torch thread a process: pytest's workers share the cores."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import framework.components  # noqa: F401 - law tests run over every registered component
from framework.tasks.interface import Report
from framework.tasks.train_tokenizer import TrainTokenizer
from tests.test_layering import library_size
from tests.tiny_run import train_tiny

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(library_size())


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Initial weights come from torch's global generator; tests start it equal."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its whole evaluation; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_tiny(folder)[0] == ("finished", 6)
    return folder


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations leave what they were asked for, instead of measuring and plotting for seconds."""

    def report(task: TrainTokenizer, wanted: Report) -> None:
        assert not task.training and not torch.is_grad_enabled()
        asked = {
            "weights": wanted.record,
            "lengths": wanted.lengths,
            "limit": wanted.limit,
            "split": wanted.data.protocol()["split"],
        }
        wanted.folder.mkdir(parents=True, exist_ok=True)
        (wanted.folder / "metrics.json").write_text(json.dumps(asked))
        (wanted.folder / "table.md").write_text("| a table |\n")

    monkeypatch.setattr(TrainTokenizer, "report", report)
