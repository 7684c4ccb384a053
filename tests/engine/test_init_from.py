"""Starting from another run's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from framework import runs
from framework.engine.checkpoint import CheckpointError, CheckpointStore, latest_checkpoint
from framework.engine.frozen import live_state
from framework.engine.init_from import InitFrom
from tests.engine.fakes import FakeModel, FakeTask, differences, trainer
from tests.tiny_run import files_of, tiny_config, train_tiny


class OtherModel(FakeModel):
    """The fakes' matrix in another place, and a head that donors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.blocks
        del self.blocks
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers[0](images.flatten(1)) + self.positions


class OtherTask(FakeTask):
    def __init__(self) -> None:
        super().__init__()
        self.net = OtherModel()


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("donor")
    trainer(folder).fit()
    return folder


def weights(run: Path, name: str) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.weights(name)


def test_averaged_weights_start_the_weights_and_the_average(tmp_path: Path, donor: Path) -> None:
    run = trainer(tmp_path, max_steps=1, init_from=InitFrom(donor))
    before = run.task.state_dict()["net.positions"].clone()
    inheritance = run.take_over()
    assert inheritance is not None and run.average is not None
    average = weights(donor, "ema")
    for name, value in average.items():
        assert torch.equal(run.task.state_dict()[f"net.{name}"], value)
        assert torch.equal(run.average.average[name], value)
    assert not torch.equal(average["positions"], before)
    assert not torch.equal(average["positions"], weights(donor, "model")["net.positions"])
    assert inheritance.text == (
        f"starting from the weights of {donor}/checkpoints/step_00000010\n"
        "  net.positions -> net.positions: 1 weights\n  net.mean -> net.mean: 1 weights\n"
        "  net.count -> net.count: 1 weights\n  net.blocks -> net.blocks: 2 weights"
    )


def test_a_donor_without_averages_gives_its_weights(tmp_path: Path) -> None:
    trainer(tmp_path / "donor", ema_decay=None).fit()
    run = trainer(tmp_path / "run", init_from=InitFrom(tmp_path / "donor"))
    run.take_over()
    expected = weights(tmp_path / "donor", "model")
    assert all(torch.equal(value, expected[name]) for name, value in run.task.state_dict().items())


def test_what_went_where_is_said(tmp_path: Path, donor: Path) -> None:
    task = OtherTask()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    init_from = InitFrom(
        donor, rename={"net.blocks": "net.layers"}, fresh=("net.head.*", "net.pos*"), drop=("net.positions",)
    )
    trainer(tmp_path, task, max_steps=1, freeze=("net.head.*", "net.layers.*"), init_from=init_from).fit()
    after = task.state_dict()
    assert torch.equal(after["net.head.weight"], before["net.head.weight"])
    assert torch.equal(after["net.layers.0.weight"], weights(donor, "ema")["blocks.0.weight"])
    log = (tmp_path / "log.txt").read_text()
    assert "  net.blocks -> net.layers: 2 weights\n" in log
    assert "  fresh: net.positions, net.head.weight, net.head.bias\n  dropped: net.positions\n" in log


def test_a_run_with_a_checkpoint_needs_its_donor_no_more(tmp_path: Path, donor: Path) -> None:
    donated = shutil.copytree(donor, tmp_path / "donor")
    whole = trainer(tmp_path / "whole", init_from=InitFrom(donated))
    whole.fit()
    trainer(tmp_path / "parts", init_from=InitFrom(donated), checkpoint_every=5).fit()
    shutil.rmtree(tmp_path / "parts/checkpoints/step_00000010")
    shutil.rmtree(donated)
    resumed = trainer(tmp_path / "parts", init_from=InitFrom(donated))
    resumed.fit()
    assert differences(live_state(whole.task), live_state(resumed.task)) == []
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    assert (tmp_path / "parts/log.txt").read_text().count("starting from the weights") == 1


def test_all_errors_at_once_with_the_nearest_names(donor: Path) -> None:
    task = OtherTask()
    task.net.positions = nn.Parameter(torch.zeros(1, 7))
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        InitFrom(donor, rename={"net.block": "net.layer"}, fresh=("net.heads.*",), drop=("net.counts",)).apply(task)
    title, *problems = str(caught.value).splitlines()
    assert title.startswith(f"{donor}/checkpoints/step_00000010 does not fit OtherTask; list under train.init_from")
    assert problems == [
        "  fresh: 'net.heads.*' matches nothing: did you mean 'net.head.*'? among the task's weights",
        "  drop: 'net.counts' matches nothing: did you mean 'net.count'? among the donor's weights",
        "  rename: the donor has no part 'net.block': did you mean 'net.blocks'?",
        "  the donor has no net.layers.0.weight: did you mean 'net.blocks.0.weight'?",
        "  the donor has no net.layers.0.bias: did you mean 'net.blocks.0.bias'?",
        "  the donor has no net.head.weight: did you mean 'net.blocks.0.weight'?",
        "  the donor has no net.head.bias: did you mean 'net.blocks.0.bias'?",
        "  the donor's net.blocks.0.bias is not used: did you mean 'net.layers.0.bias'?",
        "  the donor's net.blocks.0.weight is not used: did you mean 'net.layers.0.weight'?",
        "  net.positions is (1, 7), the donor's (1, 48)",
    ]
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_two_weights_may_not_become_one(donor: Path) -> None:
    with pytest.raises(CheckpointError, match="rename: net.count and net.mean would all become net.mean"):
        InitFrom(donor, rename={"net.count": "net.mean"}).match(FakeTask())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    many = {f"net.extra.{i}": torch.zeros(1) for i in range(30)}
    CheckpointStore(tmp_path / "checkpoints", 1).save(1, {"model": FakeTask().state_dict() | many}, {}, {})
    with pytest.raises(CheckpointError, match="and 20 more such weights") as caught:
        InitFrom(tmp_path).match(FakeTask())
    assert str(caught.value).count("is not used") == 10
    InitFrom(tmp_path, drop=("net.extra.*",)).match(FakeTask())


def test_averages_whose_place_is_not_clear_are_refused(tmp_path: Path) -> None:
    twice = {f"{part}.{name}": value for part in ("net", "copy") for name, value in FakeTask().net.state_dict().items()}
    store = CheckpointStore(tmp_path / "checkpoints", 1)
    store.save(1, {"model": twice, "ema": FakeTask().net.state_dict()}, {}, {})
    with pytest.raises(CheckpointError, match=r"averaged weights fit 2 of the model's parts, \['copy.', 'net.'\]"):
        InitFrom(tmp_path).match(FakeTask())


def test_a_donor_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"train.init_from.run: {tmp_path} has no checkpoint to start from"):
        InitFrom(tmp_path).match(FakeTask())


# In a run


def test_a_run_records_its_donor(tmp_path: Path, tiny_run: Path, quick_report: None) -> None:
    before = files_of(tiny_run)
    start = [f"train.init_from.run={tiny_run}", "train.max_steps=2"]
    for fresh in (False, True):
        folder = tmp_path / "run"
        train_tiny(folder, *start, fresh=fresh)
        (session,) = json.loads((folder / "run.json").read_text())["sessions"]
        manifest = json.loads((tiny_run / "checkpoints/step_00000006/manifest.json").read_text())["body"]["files"]
        names = ("ema.safetensors", "model.safetensors")
        assert session["init_from"] == {
            "checkpoint": f"{tiny_run}/checkpoints/step_00000006",
            "step": 6,
            "sha256": {name: manifest[name]["sha256"] for name in names},
        }
        assert "starting from the weights of" in (folder / "log.txt").read_text()
    assert files_of(tiny_run) == before


def test_another_width_is_found_before_anything_is_written(tmp_path: Path, tiny_run: Path) -> None:
    wider = [f"train.init_from.run={tiny_run}", "tokenizer.encoder.width=64"]
    with pytest.raises(CheckpointError, match=r"tokenizer.encoder.latent_tokens is \(16, 64\), the donor's"):
        train_tiny(tmp_path / "run", *wider)
    with pytest.raises(CheckpointError, match=r"tokenizer.encoder.latent_tokens is \(16, 64\), the donor's"):
        runs.dry_run(tiny_config(tmp_path / "run", *wider))
    assert not (tmp_path / "run").exists()
    runs.dry_run(tiny_config(tmp_path / "run", f"train.init_from.run={tiny_run}"))
