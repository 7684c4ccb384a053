"""A kill at any operation on the disk: the run continues and ends bit for bit like one that nothing disturbed."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from framework.engine.checkpoint import Best, checkpoint_folders, read_checkpoint
from tests.engine.fakes import FakeTask, TwoTurnTask, differences, tensors, trainer
from tests.faults.inject import Killed, faults
from tests.tiny_run import files_of

# Epochs end; checkpoints are removed, once at the very end; the third stays as the best (the highest error).
SHORT: dict[str, Any] = {
    "max_steps": 5,
    "checkpoint_every": 2,
    "log_every": 2,
    "validate_every": 3,
    "keep_last": 1,
    "best": Best("validation/mse", higher=True),
}


class Kill(NamedTuple):
    at: int
    half: bool = False


class Undisturbed(NamedTuple):
    left: dict[str, bytes]
    operations: list[str]


def run(folder: Path, kill: Kill | None = None, task: FakeTask | None = None) -> list[str]:
    """Train until the end or the kill; returns the operations on the disk."""
    with faults(at=kill and kill.at, half=bool(kill and kill.half)) as done:
        try:
            trainer(folder, task or FakeTask(), **SHORT).fit()
        except Killed:
            pass
    return done


def left(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, without wall-clock times and the log. The manifests hold digests of weights, averages,
    optimizers, generators, data position and means."""
    return {name: content for name, content in files_of(folder).items() if name not in ("timing.jsonl", "log.txt")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    operations = run(folder)
    return Undisturbed(left(folder), operations)


def wrong_after(folder: Path, kills: Sequence[Kill], expected: dict[str, bytes]) -> list[str]:
    """What differs after a run that was killed so often, and then ran to its end."""
    shutil.rmtree(folder, ignore_errors=True)
    for kill in kills:
        run(folder, kill)
        for path in checkpoint_folders(folder / "checkpoints"):
            read_checkpoint(path)  # what has a checkpoint's name is whole at any time
    run(folder)
    found = left(folder)
    if "skipped" in (folder / "log.txt").read_text():
        return ["a checkpoint was skipped"]
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


def wrong(folder: Path, histories: Sequence[Sequence[Kill]], undisturbed: Undisturbed) -> list[str]:
    return [
        f"{[(*kill, undisturbed.operations[kill.at % len(undisturbed.operations)]) for kill in kills]}: {name}"
        for kills in histories
        for name in wrong_after(folder, kills, undisturbed.left)
    ]


def every_kill(operations: Sequence[str]) -> list[Kill]:
    """Before each operation, and in the middle of those that have one."""
    halves = [at for at, name in enumerate(operations) if name.startswith(("_write", "_remove"))]
    return [*map(Kill, range(len(operations))), *(Kill(at, True) for at in halves)]


def test_the_short_run_does_what_there_is_to_disturb(undisturbed: Undisturbed) -> None:
    kinds = {name.split()[0] for name in undisturbed.operations}
    assert kinds == {"_write", "_fsync", "_replace", "_remove"} and len(undisturbed.operations) > 50
    for before, operation in itertools.pairwise(undisturbed.operations):
        kind, name = operation.split()
        if kind == "_replace" and name.endswith(".partial"):  # nothing takes its name before it is on the disk
            assert before == f"_fsync {name}"
    folders = {Path(name).parts[1] for name in undisturbed.left if name.startswith("checkpoints")}
    assert folders == {"step_00000003", "step_00000005"}
    assert undisturbed.operations[-1].startswith("_remove")
    assert undisturbed.left["metrics.jsonl"].count(b"\n") == 3 + 2


def test_a_kill_at_every_operation(tmp_path: Path, undisturbed: Undisturbed) -> None:
    kills = every_kill(undisturbed.operations)
    assert wrong(tmp_path / "run", [[kill] for kill in kills], undisturbed) == []


def test_a_second_kill_while_the_run_goes_on(tmp_path: Path, undisturbed: Undisturbed) -> None:
    generator = random.Random(0)
    kills = every_kill(undisturbed.operations)
    # A continued run begins with removing, rewinding and saying so; most second kills come there.
    histories = [[kill, Kill(generator.choice([0, 1, 2, 3, generator.randrange(40)]))] for kill in kills]
    assert wrong(tmp_path / "run", generator.sample(histories, 30), undisturbed) == []


@pytest.mark.slow
def test_two_thousand_pairs_of_kills(tmp_path: Path, undisturbed: Undisturbed) -> None:
    kills = every_kill(undisturbed.operations)
    pairs = random.Random(1).sample(list(itertools.product(kills, kills)), 2000)
    assert wrong(tmp_path / "run", pairs, undisturbed) == []


def test_kills_again_and_again(tmp_path: Path, undisturbed: Undisturbed) -> None:
    at = 2 * len(undisturbed.operations) // 3
    lives = [len(run(tmp_path, Kill(at))) for _ in range(4)]
    assert lives[0] == at + 1 and lives[-1] < at  # it came through, though no life was long enough
    assert left(tmp_path) == undisturbed.left


def test_two_turns_in_memory_too(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", TwoTurnTask(), **SHORT)
    with faults() as done:
        whole.fit()
    for at in range(0, len(done), 9):
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        run(tmp_path / "parts", Kill(at), TwoTurnTask())
        resumed = trainer(tmp_path / "parts", TwoTurnTask(), **SHORT)
        with faults():
            resumed.fit()
        assert differences(tensors(whole), tensors(resumed)) == [], done[at]
        generators = whole.generators.state_dict(), resumed.generators.state_dict()
        assert differences(*generators) == [] and whole.stream.state_dict() == resumed.stream.state_dict()
