"""One torch thread a process: pytest's workers share the cores."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import framework.components  # noqa: F401 - law tests run over every registered component
from framework.data.interface import ImageData
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

    def report(
        task: TrainTokenizer,
        data: ImageData,
        train_data: ImageData,
        folder: Path,
        record: Mapping[str, object],
        lengths: Sequence[int] | None = None,
        limit: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, object]:
        assert not task.training and not torch.is_grad_enabled()
        asked = {"weights": record, "lengths": lengths, "limit": limit, "split": data.protocol()["split"]}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(asked))
        (folder / "table.md").write_text("| a table |\n")
        return asked

    monkeypatch.setattr(TrainTokenizer, "report", report)
