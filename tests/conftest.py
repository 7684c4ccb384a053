"""One torch thread a process: pytest's workers share the cores. No test reaches for a network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import save_file

import framework.components  # noqa: F401 - law tests run over every registered component
from framework import runs
from framework.config import load_config
from framework.tasks.interface import Report, Task
from framework.tasks.train_allocation import TrainAllocation
from framework.tasks.train_autoencoder import TrainAutoencoder
from framework.tasks.train_tokenizer import TrainTokenizer
from tests.test_layering import library_size
from tests.tiny_run import ROOT, TINY, generator_config, tiny_policy_config, train_tiny

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


@pytest.fixture(scope="session")
def tiny_policy(tiny_run: Path) -> Path:
    """A finished run of a policy on top of that, with its whole evaluation; to be read only."""
    folder = tiny_run.with_name("tiny_policy")
    runs.train(tiny_policy_config(folder, tiny_run), print)
    return folder


@pytest.fixture(scope="session")
def finished_on_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a discrete tokenizer on labelled images, with its whole evaluation; to be read only."""
    folder = tmp_path_factory.mktemp("labelled") / "scenes"
    few = [f"data.{split}.num_images={count}" for split, count in (("train", 120), ("validation", 40), ("test", 40))]
    sizes = [change for change in TINY if "num_crops" not in change]
    runs.train(load_config(ROOT / "projects/adatok/discrete/ntm.yaml", [*sizes, *few, f"run.dir={folder}"]), print)
    return folder


@pytest.fixture(scope="session")
def generator_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished generator on a tokenizer, with a policy that chooses one length; to be read only."""
    folder = tmp_path_factory.mktemp("generator")
    tokenizer = runs.experiment_from(generator_config(folder, "projects/adatok/discrete/ntm_mhlora.yaml")).task.model
    save_file(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    own = [
        f"run.cache={folder / 'cache'}", f"tokenizer.weights={folder / 'tokenizer.safetensors'}", "task.samples=40",
        "task.policy={name: FixedLength, length: 5}", "task.generator.width=32", "task.generator.depth=1",
        "task.guidance={scale: 2.0, interval: [0.0, 0.5]}",
    ]  # fmt: skip
    runs.train(generator_config(folder / "ar", "projects/adatok/ar.yaml", *own), lambda text: None)
    return folder / "ar"


@pytest.fixture
def run_on_scenes(finished_on_scenes: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished_on_scenes, tmp_path / "scenes"))


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations leave what they were asked for, instead of measuring and plotting for seconds."""

    def report(task: Task, wanted: Report) -> None:
        assert not task.training and not torch.is_grad_enabled()
        asked = {
            "weights": wanted.record,
            "lengths": wanted.measures.lengths,
            "limit": wanted.limit,
            "split": wanted.data.protocol()["split"],
        }
        wanted.folder.mkdir(parents=True, exist_ok=True)
        (wanted.folder / "metrics.json").write_text(json.dumps(asked))
        (wanted.folder / "table.md").write_text("| a table |\n")

    for task in (TrainTokenizer, TrainAllocation, TrainAutoencoder):
        monkeypatch.setattr(task, "report", report)
