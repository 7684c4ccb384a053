from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.engine.checkpoint import (
    MANIFEST,
    Best,
    CheckpointError,
    CheckpointStore,
    best_checkpoint,
    checkpoint_folders,
    latest_checkpoint,
    load_weights,
    read_checkpoint,
)
from framework.engine.frozen import live_state
from framework.engine.manifest import json_digest
from framework.runtime import files

WEIGHTS = {"model": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}}
STATE: dict[str, Any] = {
    "stream": {"samples_seen": 9},
    "generators": {"lengths": torch.arange(4)},
    "sums": {"loss": (0.5, 2)},
}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep_last=2)


def save(store: CheckpointStore, step: int, metrics: Mapping[str, float] | None = None) -> Path:
    return store.save(step, WEIGHTS, STATE, {"judge": "abc"}, metrics)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(store: CheckpointStore) -> None:
    folder = save(store, 1200)
    assert folder.name == "step_00001200"
    assert names(folder) == ["manifest.json", "model.safetensors", "trainer.pt"]
    checkpoint = latest_checkpoint(store.folder)
    assert checkpoint is not None and checkpoint.step == 1200 and checkpoint.frozen == {"judge": "abc"}
    weights = checkpoint.weights("model")
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS["model"].items())
    state = checkpoint.state()
    assert torch.equal(state["generators"]["lengths"], torch.arange(4))
    assert state["sums"] == {"loss": (0.5, 2)} and state["stream"] == {"samples_seen": 9}
    with pytest.raises(CheckpointError, match="holds no weights named ema, only model"):
        checkpoint.weights("ema")


def test_tied_weights_and_views_can_be_saved(store: CheckpointStore) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "b": whole, "view": whole.T[1:]}
    store.save(1, {"model": tensors}, {}, {})
    checkpoint = latest_checkpoint(store.folder)
    assert checkpoint is not None
    weights = checkpoint.weights("model")
    assert all(torch.equal(weights[name], value) for name, value in tensors.items())


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None], sign: bool) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if sign:
        manifest["sha256"] = json_digest(manifest["body"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "trainer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model.safetensors has \d+ bytes instead of \d+: truncated\?"),
    "flipped byte": (flip, "trainer.pt does not have the SHA-256 of its manifest: its content was damaged"),
    "missing file": (lambda folder: (folder / "trainer.pt").unlink(), "trainer.pt is missing"),
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json"),
    "torn manifest": (lambda folder: (folder / MANIFEST).write_text('{"format": "fra'), "not readable JSON"),
    "not text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not readable JSON"),
    "foreign manifest": (lambda folder: (folder / MANIFEST).write_text('["a"]'), "not one of this framework's"),
    "changed manifest": (
        lambda folder: change_manifest(folder, lambda m: m["body"].update(step=7), sign=False),
        "manifest.json does not have the SHA-256 that it states",
    ),
    "newer format": (
        lambda folder: change_manifest(folder, lambda m: m["body"].update(version=99), sign=True),
        "format version 99, and this framework reads up to 1: update it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_named_and_skipped(store: CheckpointStore, fault: str) -> None:
    save(store, 5)
    broken = save(store, 10)
    harm, message = FAULTS[fault]
    harm(broken)
    warnings: list[str] = []
    checkpoint = latest_checkpoint(store.folder, warnings.append)
    assert checkpoint is not None and checkpoint.step == 5
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint skipped: ") and str(broken) in warnings[0]
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(broken)


def test_none_is_no_error_and_all_broken_is(store: CheckpointStore) -> None:
    assert latest_checkpoint(store.folder / "none") is None
    (store.folder / "notes").mkdir()
    assert latest_checkpoint(store.folder) is None
    truncate(save(store, 5))
    with (
        pytest.warns(UserWarning, match="checkpoint skipped.*truncated"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints .* can be used"),
    ):
        latest_checkpoint(store.folder)


def test_retention_counts_only_sound_checkpoints(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        save(store, step)
    assert names(store.folder) == ["step_00000002", "step_00000003"]
    truncate(store.folder / "step_00000003")
    save(CheckpointStore(store.folder, keep_last=2), 4)
    assert names(store.folder) == ["step_00000002", "step_00000003", "step_00000004"]
    save(store, 5)
    assert names(store.folder) == ["step_00000004", "step_00000005"]


def kept(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint_folders(folder)]


def test_what_was_measured_comes_back_without_what_is_not_finite(store: CheckpointStore) -> None:
    checkpoint = read_checkpoint(save(store, 1, {"a": 0.1, "b": math.nan, "c": -math.inf}))
    assert checkpoint.metrics == {"a": 0.1}
    assert read_checkpoint(save(store, 2)).metrics == {}


def test_a_checkpoint_of_before_there_were_metrics_is_read(store: CheckpointStore) -> None:
    old = save(store, 1)
    change_manifest(old, lambda manifest: manifest["body"].pop("metrics"), sign=True)
    assert read_checkpoint(old).metrics == {} and read_checkpoint(old).step == 1


def test_the_best_stays_beside_the_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, Best("mse"))
    for step, value in [(1, 0.5), (2, 0.2), (3, math.nan), (4, 0.2), (5, 0.3)]:
        save(store, step, {"mse": value, "other": -step})
    save(store, 6)  # measured nothing
    assert kept(tmp_path) == [2, 6]  # of equals the earlier one
    found = best_checkpoint(tmp_path, Best("mse"))
    assert found is not None and found.step == 2 and found.metrics["mse"] == 0.2
    assert best_checkpoint(tmp_path, Best("none")) is None
    save(store, 7, {"mse": 0.1})
    assert kept(tmp_path) == [7]


def test_the_best_may_be_the_highest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, Best("psnr", higher=True))
    for step, value in [(1, 20.0), (2, 30.0), (3, 10.0)]:
        save(store, step, {"psnr": value})
    assert kept(tmp_path) == [2, 3]


def test_what_is_better_than_the_best_on_disk(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, Best("mse"))
    assert store.is_better(9.0) and not store.is_better(math.nan) and not store.is_better(-math.inf)
    save(store, 1, {"mse": 0.5})
    assert [store.is_better(value) for value in (0.4, 0.5, 0.6, math.nan)] == [True, False, False, False]
    again = CheckpointStore(tmp_path, 1, Best("mse"))
    assert again.is_better(0.4) and not again.is_better(0.5)
    truncate(tmp_path / "step_00000001")
    assert CheckpointStore(tmp_path, 1, Best("mse")).is_better(0.6)
    assert not CheckpointStore(tmp_path, 1).is_better(0.0)


def test_a_damaged_best_makes_room_for_the_next_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, Best("mse"))
    for step, value in [(1, 0.1), (2, 0.2), (3, 0.3)]:
        save(store, step, {"mse": value})
    truncate(tmp_path / "step_00000001")
    store = CheckpointStore(tmp_path, 1, Best("mse"))
    save(store, 4, {"mse": 0.4})
    assert kept(tmp_path) == [2, 4]


def test_steps_are_ordered_as_numbers(store: CheckpointStore) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(store, step)
    assert kept(store.folder) == [100_000_000, 100_000_001]


def test_a_link_to_a_checkpoint_is_one_and_only_the_link_is_removed(store: CheckpointStore, tmp_path: Path) -> None:
    elsewhere = CheckpointStore(tmp_path / "elsewhere", 1)
    (store.folder / "step_00000005").symlink_to(save(elsewhere, 5))
    found = latest_checkpoint(store.folder)
    assert found is not None and found.step == 5 and torch.equal(found.weights("model")["a.count"], torch.tensor(3))
    for step in (6, 7):
        save(store, step)
    assert kept(store.folder) == [6, 7]
    assert read_checkpoint(elsewhere.folder / "step_00000005").step == 5


def test_a_removal_that_fails_is_told_and_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, 1, warn=said.append)

    def fail(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_remove", fail)
        save(store, 2)
    assert kept(tmp_path) == [2] and names(tmp_path) == ["step_00000001.removed.partial", "step_00000002"]
    assert len(said) == 1 and "could not be removed" in said[0] and "step_00000001" in said[0]
    save(store, 3)
    assert names(tmp_path) == ["step_00000003"] and len(said) == 1


def test_a_broken_checkpoint_is_written_over(store: CheckpointStore) -> None:
    truncate(save(store, 5))
    save(store, 5)
    assert read_checkpoint(store.folder / "step_00000005").step == 5
    assert names(store.folder) == ["step_00000005"]


def test_what_kills_left_is_no_checkpoint_and_is_removed(store: CheckpointStore) -> None:
    save(store, 5)
    (store.folder / "step_00000010.partial").mkdir()
    (store.folder / "step_00000003.removed.partial").mkdir()
    assert [path.name for path in checkpoint_folders(store.folder)] == ["step_00000005"]
    store.tidy()
    assert names(store.folder) == ["step_00000005"]
    for step in (6, 7):
        save(CheckpointStore(store.folder, 3), step)
    store.tidy()  # a kill came between saving 7 and removing 5
    assert names(store.folder) == ["step_00000006", "step_00000007"]


def test_a_full_disk_keeps_the_last_checkpoint_and_frees_what_it_took(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 5)

    def fail(file: Any, content: bytes) -> None:
        if b"manifest" in file.name.encode():
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(content)
        file.flush()

    monkeypatch.setattr(files, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        save(store, 10)
    assert names(store.folder) == ["step_00000005"]


def test_a_write_that_reads_back_wrong_removes_no_older_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    save(store, 2)
    monkeypatch.setattr(files, "_write", lambda file, content: file.write(content[:-1] + b"\0"))
    with pytest.raises(CheckpointError):
        save(store, 3)
    assert names(store.folder)[:2] == ["step_00000001", "step_00000002"]


def test_a_state_that_would_run_code_is_refused(store: CheckpointStore) -> None:
    checkpoint = read_checkpoint(store.save(1, WEIGHTS, {"settings": Path("a")}, {}))
    with pytest.raises(CheckpointError, match="trainer.pt is not read: it asks for pathlib.PosixPath, and more than"):
        checkpoint.state()


def model() -> nn.Module:
    made = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    made[3].is_frozen = True  # type: ignore[assignment]
    return made


def test_loading_leaves_frozen_parts_alone() -> None:
    source, target = model(), model()
    frozen = target[3].weight.clone()  # type: ignore[index]
    load_weights(target, live_state(source), "there")
    assert all(torch.equal(value, live_state(target)[name]) for name, value in live_state(source).items())
    assert torch.equal(target[3].weight, frozen) and "3.weight" not in live_state(source)  # type: ignore[index]


def test_loading_is_strict_and_lists_what_does_not_fit() -> None:
    target = model()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    weights: dict[str, Tensor] = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(2)}
    weights |= {f"extra{i}": torch.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, weights, "runs/a")
    assert str(caught.value) == (
        "the weights of runs/a do not fit Sequential; "
        "4 missing: 1.bias, 1.weight, 2.bias, 2.weight; "
        "7 unexpected: extra0, extra1, extra2, extra3, extra4 and 2 more; "
        "1 of another shape: 0.weight (3, 2) instead of (2, 2)"
    )
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
