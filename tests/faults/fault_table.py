"""Each fault, what the user reads, and what survives: injects them all and prints the table of docs/reliability.md.

    python -m tests.faults.fault_table --write

The texts are those of the errors and log lines themselves; only paths, process ids, hosts and times are made general.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import save

from framework import runs
from framework.engine.checkpoint import MANIFEST, STATE, CheckpointError, checkpoint_folders, read_checkpoint
from framework.engine.run_directory import RunError, hold
from framework.engine.turns import NonFiniteError
from framework.runtime.lock import RunLock
from tests.engine.fakes import FakeTask, trainer
from tests.faults.damage import (
    Harm,
    RunsCode,
    cut_within_line,
    empty_folder,
    flip,
    forge_key,
    of_file,
    remove,
    replace_file,
    truncate,
    write,
)
from tests.faults.inject import Killed, disk_full, failing_disk, faults, kill, read_only
from tests.tiny_run import ROOT, tiny_config

DOCUMENT = ROOT / "docs/reliability.md"
START, END = "<!-- fault table: start -->\n", "<!-- fault table: end -->\n"
SHORT: dict[str, Any] = {"max_steps": 4, "checkpoint_every": 2, "log_every": 1, "keep_last": 2}
TINY = ["train.max_steps=2"]


class Row(NamedTuple):
    """One fault.

    Args:
        fault: in words.
        inject: does it in a new folder, asserts that what should survive does, and returns what the user reads.
        survives: in words.
    """

    fault: str
    inject: Callable[[Path], str]
    survives: str


def train(folder: Path, task: FakeTask | None = None) -> str:
    """Train or continue, as ``runs.train`` does it; returns what was logged, or the error."""
    log = folder / "log.txt"
    before = log.read_text() if log.exists() else ""
    try:
        with hold(folder, print):
            trainer(folder, task, **SHORT).fit()
    except (RunError, CheckpointError, NonFiniteError) as error:
        return str(error)
    lines = log.read_text().removeprefix(before).splitlines()
    return "\n".join(line for line in lines if not line.startswith("step "))


def steps(folder: Path) -> list[int]:
    """The sound checkpoints."""
    found = []
    for path in checkpoint_folders(folder / "checkpoints"):
        with suppress(CheckpointError):
            found.append(read_checkpoint(path).step)
    return found


def continues(folder: Path) -> None:
    """What is left can be continued, without a word about damage, to the end that undisturbed runs come to."""
    said = train(folder)
    assert said == "" or said.startswith("continuing from"), said
    whole = folder.with_name("whole")
    if not whole.exists():
        train(whole)
    for name in ("metrics.jsonl", "checkpoints/step_00000004/manifest.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def at(operation: str, error: Callable[[], BaseException], kept: Sequence[int]) -> Callable[[Path], str]:
    """An error of the disk at the last operation whose name has this in it, and at all later ones."""

    def inject(folder: Path) -> str:
        with faults() as done:
            train(folder.with_name("whole"))
        number = max(i for i, name in enumerate(done) if operation in name)
        with faults(error, number, half=True, from_then_on=True):
            said = train(folder)
        assert steps(folder) == list(kept)
        with faults():
            continues(folder)
        return said

    return inject


def killed(folder: Path) -> str:
    with faults(kill, 40), suppress(Killed):
        train(folder)
    assert steps(folder) == [2]
    said = train(folder)
    continues(folder)
    return said


def cannot_remove(folder: Path) -> str:
    short = SHORT | {"keep_last": 1}
    with faults() as done:
        trainer(folder.with_name("one"), **short).fit()
    with faults(failing_disk, next(i for i, name in enumerate(done) if name.startswith("_remove"))):
        trainer(folder, **short).fit()
    assert steps(folder) == [4]
    (said,) = [line for line in (folder / "log.txt").read_text().splitlines() if not line.startswith("step ")]
    trainer(folder, **short).fit()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000004"]
    return said


def damaged(harm: Harm) -> Callable[[Path], str]:
    """Harm to the newer of two checkpoints."""

    def inject(folder: Path) -> str:
        with faults():
            train(folder)
            harm(folder / "checkpoints/step_00000004")
            assert steps(folder) == [2]
            said = train(folder)
            assert steps(folder) == [2, 4]
            continues(folder)
        return said.splitlines()[0]

    return inject


def refused(harm: Harm) -> Callable[[Path], str]:
    """Harm to the newer checkpoint that its manifest agrees with."""

    def inject(folder: Path) -> str:
        with faults():
            train(folder)
            harm(folder / "checkpoints/step_00000004")
            before = sorted(folder.rglob("*"))
            said = train(folder)
            assert sorted(folder.rglob("*")) == before
        return said

    return inject


def all_damaged(folder: Path) -> str:
    with faults():
        train(folder)
        for path in checkpoint_folders(folder / "checkpoints"):
            truncate(0.5)(path / "model.safetensors")
        return train(folder)


def with_code(folder: Path) -> None:
    torch.save({"optimizers": RunsCode(folder / "proof")}, folder / STATE)
    replace_file(STATE, (folder / STATE).read_bytes())(folder)


def other_shape(folder: Path) -> None:
    weights = read_checkpoint(folder).weights("model")
    weights["net.positions"] = torch.zeros(1, 64)
    replace_file("model.safetensors", save(weights))(folder)


def other_images(folder: Path) -> None:
    state = read_checkpoint(folder).state()
    state["stream"]["num_images"] = 9
    torch.save(state, folder / STATE)
    replace_file(STATE, (folder / STATE).read_bytes())(folder)


def frozen_elsewhere(folder: Path) -> None:
    forge_key("0" * 64, "frozen", "task.judge")(folder)


def not_finite(folder: Path) -> str:
    task = FakeTask()
    task.poison = lambda step, loss: loss * torch.nan if step == 3 else loss
    with faults():
        said = train(folder, task)
        assert steps(folder) == [2]
        continues(folder)
    return said


def metrics_damaged(folder: Path) -> str:
    with faults():
        train(folder)
        truncate(0.5)(folder / "checkpoints/step_00000004" / STATE)
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 5, "tokenizer/lo')
        train(folder)
        continues(folder)
    return ""


def run_tiny(folder: Path, *overrides: str) -> str:
    said: list[str] = []
    try:
        runs.train(tiny_config(folder, *TINY, *overrides), said.append)
    except (RunError, CheckpointError) as error:
        return str(error)
    return "\n".join(said)


def run_file(name: str, harm: Harm) -> Callable[[Path], str]:
    """Harm to a file of the run directory."""

    def inject(folder: Path) -> str:
        run_tiny(folder)
        harm(folder / name)
        said = run_tiny(folder)
        (folder / name).unlink()
        assert "continues" in said and "results:" in run_tiny(folder)
        return said

    return inject


def in_use(folder: Path) -> str:
    code = "import sys, time; from pathlib import Path; from framework.runtime.lock import RunLock\n"
    code += "with RunLock(Path(sys.argv[-1]), print): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        said = run_tiny(folder)
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with RunLock(folder, print):  # the kill has freed it
        pass
    return said


def no_locks(folder: Path) -> str:
    said: list[str] = []
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with patch("fcntl.lockf", side_effect=error), RunLock(folder, said.append):
        pass
    return "\n".join(said)


def given_weights(name: str, content: bytes) -> Callable[[Path], str]:
    def inject(folder: Path) -> str:
        folder.mkdir()
        (folder / name).write_bytes(content)
        said = run_tiny(folder.with_name("started"), f"tokenizer.encoder.weights={folder / name}")
        assert not folder.with_name("started").exists()
        return said

    return inject


OLDER = "the older checkpoint, from which the run comes to the same end"
ROOM = "the last checkpoint; the run continues from it when the disk is in order"
ALL = "everything; nothing is touched"
ROWS = [
    Row("`kill -9`, crash, at any moment", killed, "all up to the last checkpoint; the same end, bit for bit"),
    Row("full disk, in a checkpoint", at("_write trainer.pt", disk_full, [2]), ROOM),
    Row("full disk, between checkpoints", at("_write metrics.jsonl", disk_full, [2]), ROOM),
    Row("disk error when forcing data to the disk", at("_fsync model", failing_disk, [2]), ROOM),
    Row("disk turned read-only", at("_replace step_00000004", read_only, [2]), ROOM),
    Row("an old checkpoint cannot be removed", cannot_remove, "everything; training goes on"),
    Row("loss is not finite", not_finite, "the last checkpoint, and no weight is touched"),
    Row("file cut short", damaged(of_file("model.safetensors", truncate(0.5))), OLDER),
    Row("empty file", damaged(of_file("ema.safetensors", write(b""))), OLDER),
    Row("flipped bit", damaged(of_file(STATE, flip(0.5))), OLDER),
    Row("flipped bit in the manifest", damaged(of_file(MANIFEST, flip(0.5))), OLDER),
    Row("missing part", damaged(of_file("ema.safetensors", remove)), OLDER),
    Row("missing manifest", damaged(of_file(MANIFEST, remove)), OLDER),
    Row("empty folder", damaged(empty_folder), OLDER),
    Row("binary manifest", damaged(of_file(MANIFEST, write(b"\xff\xfe"))), OLDER),
    Row("another program's manifest", damaged(of_file(MANIFEST, write(b'{"format": "pt"}'))), OLDER),
    Row("manifest of wrong types", damaged(forge_key([1, 2], "files")), OLDER),
    Row("newer format", damaged(forge_key(2, "version")), OLDER),
    Row("all checkpoints damaged", all_damaged, "what there is: nothing is started anew by itself"),
    Row("state that brings code", refused(with_code), ALL + ", and the code is not run"),
    Row("state that is no state", refused(replace_file(STATE, b"text")), ALL),
    Row("another architecture's weights", refused(other_shape), ALL),
    Row("another frozen part", refused(frozen_elsewhere), ALL),
    Row("another number of images", refused(other_images), ALL),
    Row("safetensors with a lying header", refused(replace_file("model.safetensors", b"\0" * 7 + b"\1{}")), ALL),
    Row("weights from a pickle", given_weights("encoder.bin", b"\x80\2}."), "no run is started, no code is run"),
    Row("weights from a damaged file", given_weights("encoder.safetensors", b"{}"), "no run is started"),
    Row("`config.yaml` cut short", run_file("config.yaml", cut_within_line(3)), ALL),
    Row("`run.json` damaged", run_file("run.json", truncate(0.5)), ALL),
    Row("torn or damaged line in `metrics.jsonl`", metrics_damaged, "all other lines; later ones come again"),
    Row("directory in use", in_use, "the live run; its lock goes when it dies, also by `kill -9`"),
    Row("file system without locks", no_locks, "training goes on without a lock"),
]  # fmt: skip


# What differs from machine to machine, and what other libraries say.
GENERAL = {
    r"process \d+ on host \S+ since \S+ \(.*?\)": "process 4711 on host node1 since TIME (COMMAND)",
    r"has \d+ bytes instead of \d+": "has N bytes instead of M",
    r"(as safetensors|readable JSON|asks for): .*": r"\1: REASON",
    r"(run.json is damaged): .*\)\. It": r"\1: REASON. It",
    r"(not valid YAML): .*": r"\1: REASON",
    r"PyTorch's \(\w+\)": "PyTorch's (REASON)",
}


def text_of(row: Row) -> str:
    """What the user reads, with general paths, processes, times and reasons."""
    with tempfile.TemporaryDirectory() as folder:
        text = row.inject(Path(folder) / "x").replace(folder, "runs").replace("\n", " ")
    for special, general in GENERAL.items():
        text = re.sub(special, general, text)
    return text.replace("|", "\\|")


def line_of(row: Row) -> str:
    text = text_of(row)
    return f"| {row.fault} | {f'`{text}`' if text else 'nothing'} | {row.survives} |"


def table() -> str:
    return "\n".join(["| fault | what the user reads | what survives |", "|---|---|---|", *map(line_of, ROWS)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    made = table()
    if arguments.write:
        head, _, rest = DOCUMENT.read_text().partition(START)
        DOCUMENT.write_text(head + START + "\n" + made + "\n" + END + rest.partition(END)[2])
    else:
        print(made, end="")


if __name__ == "__main__":
    main()
