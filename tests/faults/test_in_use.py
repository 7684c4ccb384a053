"""A run directory in use: one process trains in it, and others may read while checkpoints come and go."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import framework
from framework import runs
from framework.engine import checkpoint
from framework.engine.checkpoint import Checkpoint, CheckpointError, CheckpointStore, latest_checkpoint, read_checkpoint
from framework.runtime import files
from framework.runtime.lock import RunLock
from tests.tiny_run import files_of, train_tiny

NAMES = ("decoder.mask_token", "encoder.latent_tokens")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_in_use_is_left_alone(tiny_run: Path, tmp_path: Path, fresh: bool) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "run.json").unlink()  # it is not finished
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(str(tiny_run), str(folder)))
    with RunLock(folder, pytest.fail):
        before = files_of(tmp_path)
        with pytest.raises(runs.RunError, match=f"{folder} is in use by .*: wait for it, stop it, or choose"):
            train_tiny(folder, fresh=fresh)
        assert files_of(tmp_path) == before
        framework.load(folder)
        assert files_of(tmp_path) == before


def test_the_lock_is_held_through_the_evaluation_and_free_after_it(
    tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    evaluate = runs._evaluate

    def try_to_train_too(*arguments: Any) -> None:
        with pytest.raises(runs.RunError) as caught:
            train_tiny(tmp_path / "run", "train.max_steps=2")
        refused.append(str(caught.value))
        evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_evaluate", try_to_train_too)
        train_tiny(tmp_path / "run", "train.max_steps=2")
    assert len(refused) == 1 and "is in use by another thread of this process" in refused[0]
    outcome, said = train_tiny(tmp_path / "run", "train.max_steps=2")
    assert outcome == ("finished", 2) and "is finished" in said


def test_loading_survives_a_run_that_removes_checkpoints(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("ema_decay: 0.999", "ema_decay: null"))
    source = read_checkpoint(folder / "checkpoints/step_00000006")
    weights = source.weights("model")
    store = CheckpointStore(folder / "checkpoints", keep_last=1)
    stop = threading.Event()

    def train() -> None:
        step = 7
        while not stop.is_set():
            counted = {name: value + step if value.is_floating_point() else value for name, value in weights.items()}
            store.save(step, {"model": counted}, {}, source.frozen)
            step += 1

    thread = threading.Thread(target=train)
    thread.start()
    loaded: list[float] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the run removes is not damaged
            for _ in range(12):
                state = framework.load(folder).state_dict()
                added = {float((state[name] - weights[f"tokenizer.{name}"]).mean().round()) for name in NAMES}
                assert len(added) == 1  # all from one checkpoint
                loaded += added
    finally:
        stop.set()
        thread.join()
    assert loaded == sorted(loaded) and len(set(loaded)) > 1


def test_a_checkpoint_that_goes_between_finding_and_reading_is_looked_for_again(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    read = Checkpoint.weights
    asked: list[str] = []

    def vanishes(checkpoint: Checkpoint, name: str) -> Any:
        asked.append(checkpoint.folder.name)
        if len(asked) == 1:
            checkpoint.folder.rename(checkpoints / "step_00000007")
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "weights", vanishes)
    framework.load(folder)
    assert asked == ["step_00000006", "step_00000007", "step_00000007"]
    monkeypatch.undo()
    (checkpoints / "step_00000007/ema.safetensors").unlink()
    with (
        pytest.warns(match="ema.safetensors is missing"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints in"),
    ):
        framework.load(folder)


def test_a_checkpoint_that_goes_while_it_is_verified_is_no_damage(tiny_run: Path, tmp_path: Path) -> None:
    checkpoints = shutil.copytree(tiny_run / "checkpoints", tmp_path / "checkpoints")
    older = shutil.copytree(checkpoints / "step_00000006", checkpoints / "step_00000007")
    digest = files.digest

    def vanishes(path: Path) -> str:
        if path.parent == older:
            shutil.rmtree(older)
        return digest(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "digest", vanishes)
        found = latest_checkpoint(checkpoints, pytest.fail)
    assert found is not None and found.step == 6 and found.folder.name == "step_00000006"


def test_the_best_checkpoint_is_loaded_and_evaluated(tmp_path: Path, quick_report: None) -> None:
    settings = ["train.validate_every=1", "train.keep_last=1", "train.best={metric: validation/mse@16, higher: true}"]
    folder = tmp_path / "run"
    train_tiny(folder, *settings)
    found = [read_checkpoint(path) for path in sorted((folder / "checkpoints").iterdir())]
    best = max(found, key=lambda checkpoint: checkpoint.metrics["validation/mse@16"])
    assert len(found) == 2 and best.step < 6
    state = framework.load(folder, checkpoint="best").state_dict()
    saved = best.weights("ema")
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    out = runs.evaluate(folder, lambda text: None, checkpoint="best")
    assert out.name == "evaluation_validation_best"
    assert json.loads((out / "metrics.json").read_text())["weights"]["step"] == best.step


def test_the_best_of_a_run_that_keeps_none_is_refused(tiny_run: Path) -> None:
    with pytest.raises(runs.RunError, match="keeps no best checkpoint: its configuration has no train.best"):
        framework.load(tiny_run, checkpoint="best")


def test_a_listing_that_misses_all_checkpoints_is_made_again(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = iter([[]])
    found = checkpoint.checkpoint_folders
    monkeypatch.setattr(checkpoint, "checkpoint_folders", lambda folder: next(listed, None) or found(folder))
    latest = checkpoint.latest_checkpoint(tiny_run / "checkpoints")
    assert latest is not None and latest.step == 6
