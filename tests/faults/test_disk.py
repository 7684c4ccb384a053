"""A full, failing or read-only disk: the run ends in words, what is good stays, and it goes on when there is room."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework import runs
from framework.engine.checkpoint import CheckpointStore, checkpoint_folders, latest_checkpoint, read_checkpoint
from framework.engine.run_directory import RunError, hold
from framework.engine.trainer import Outcome
from framework.runtime import files
from tests.engine.fakes import trainer
from tests.faults.inject import disk_full, failing_disk, faults, read_only
from tests.faults.test_kills import SHORT, Undisturbed, left, undisturbed
from tests.tiny_run import files_of, tiny_config

__all__ = ["undisturbed"]
KINDS: dict[str, Callable[[], BaseException]] = {"full": disk_full, "failing": failing_disk, "read-only": read_only}


def train(folder: Path) -> Outcome:
    """Train as ``runs.train`` does, with its words."""
    with hold(folder, pytest.fail):
        return trainer(folder, **SHORT).fit()


def clean(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in left(folder).items() if name != "run.lock"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_at_any_operation(tmp_path: Path, undisturbed: Undisturbed, kind: str) -> None:
    folder = tmp_path / "run"
    first = list(KINDS).index(kind)  # the kinds take turns; each operation fails in one way
    for at, operation in list(enumerate(undisturbed.operations))[first :: len(KINDS)]:
        removal = operation.startswith("_remove") or operation in ("_replace step_00000002", "_replace step_00000004")
        shutil.rmtree(folder, ignore_errors=True)
        with faults(KINDS[kind], at, half=True, from_then_on=not removal) as done:
            try:
                outcome: object = train(folder)
            except RunError as error:
                outcome = str(error)
        text = os.strerror(KINDS[kind]().errno)  # type: ignore[attr-defined]
        sound = [read_checkpoint(path) for path in checkpoint_folders(folder / "checkpoints")]
        if isinstance(outcome, str):
            file = operation.split()[1].removesuffix(".partial")
            assert f"{text}: '{folder}" in outcome and file in outcome, operation
            kept = f"{sound[-1].folder} is kept, and the same command continues from it" if sound else "nothing was"
            assert kept in outcome, operation
            assert len(done) - at <= 4  # it does not go on for long
        else:  # what could not be removed is told, and training goes on
            assert removal, operation
            assert text in (folder / "log.txt").read_text()
        with faults():
            train(folder)
        assert clean(folder) == undisturbed.left, operation


def test_one_failing_operation_is_enough(tmp_path: Path, undisturbed: Undisturbed) -> None:
    # A run that cannot save does not go on for hours.
    saving = [at for at, name in enumerate(undisturbed.operations) if "step_00000003" in name or "ema" in name]
    for at in saving:
        shutil.rmtree(tmp_path, ignore_errors=True)
        with faults(failing_disk, at), pytest.raises(RunError, match="Input/output error"):
            train(tmp_path)


def operations_of_a_run(folder: Path) -> list[str]:
    with faults() as done:
        runs.train(tiny_config(folder, *TINY), lambda text: None)
    return done


TINY = ["train.max_steps=4", "train.checkpoint_every=2", "train.log_every=2", "data.test.num_crops=1"]


def test_a_whole_run_on_a_full_disk(tmp_path: Path, quick_report: None) -> None:
    whole = tmp_path / "whole"
    done = operations_of_a_run(whole)
    folder = tmp_path / "run"
    for name in ("config.yaml.partial", "run.json.partial", "metrics.jsonl", "manifest.json.partial"):
        at = max(i for i, operation in enumerate(done) if operation == f"_write {name}")
        if name == "config.yaml.partial":
            assert at == 0
        shutil.rmtree(folder, ignore_errors=True)
        with faults(disk_full, at, half=True, from_then_on=True), pytest.raises(RunError) as caught:
            runs.train(tiny_config(folder, *TINY), lambda text: None)
        assert str(caught.value).startswith(f"[Errno {errno.ENOSPC}] No space left on device: '{folder}/")
        with faults():
            assert runs.train(tiny_config(folder, *TINY), lambda text: None) == ("finished", 4)
        own = ("config.yaml", "log.txt", "timing.jsonl", "run.json", "evaluation/metrics.json")  # paths and times
        expected, found = files_of(whole), files_of(folder)
        assert expected.keys() == found.keys()
        assert [key for key in found if key not in own and found[key] != expected[key]] == [], name


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"'{tmp_path}/file/run'. The run stops here; nothing was saved yet"):
        runs.train(tiny_config(tmp_path / "file/run"), lambda text: None)


def test_a_checkpoint_that_reads_back_wrong_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files._write

    def lie(file: Any, content: bytes) -> None:
        real(file, content[:-1] + b"\0" if "step_00000004" in file.name else content)

    monkeypatch.setattr(files, "_write", lie)
    with pytest.raises(RuntimeError, match="step_00000004"):
        train(tmp_path)
    monkeypatch.undo()
    found = latest_checkpoint(tmp_path / "checkpoints", lambda text: None)
    assert found is not None and found.step == 3
    train(tmp_path)
    assert [read_checkpoint(path).step for path in checkpoint_folders(tmp_path / "checkpoints")] == [3, 5]


def test_errors_that_name_no_file_get_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    with faults(disk_full, 0), pytest.raises(OSError) as caught:
        store.save(1, {}, {}, {})
    assert caught.value.filename == str(tmp_path / "step_00000001.partial/trainer.pt")
