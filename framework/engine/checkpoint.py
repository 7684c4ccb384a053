"""Checkpoints: directories that are either whole and verified, or not taken for checkpoints at all.

``checkpoints/step_00001200/`` holds ``model.safetensors`` (the task's state without frozen parts), ``ema.safetensors``
(the model's averaged weights), ``trainer.pt`` (optimizers, generators, data position: tensors and plain containers) and
``manifest.json`` with the size and SHA-256 of each, and with what was measured at that step. It is written under a name
that ends in ``.partial``, the manifest last, and then renamed. The latest and the best are found by looking, so there
is no pointer that could be wrong.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from framework.engine.frozen import live_state
from framework.engine.manifest import MANIFEST as MANIFEST
from framework.engine.manifest import CheckpointError as CheckpointError
from framework.engine.manifest import describe_file, read_manifest, write_manifest
from framework.runtime import files

FORMAT = "framework checkpoint"
VERSION = 1
STATE = "trainer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were compared with its manifest.

    Args:
        folder: where it is.
        step: steps taken when it was saved.
        frozen: digests of the frozen parts that it was trained with, by name.
        files: what it holds.
        metrics: finite numbers that were measured at this step, such as ``validation/mse``; none in older checkpoints.
    """

    folder: Path
    step: int
    frozen: Mapping[str, str]
    files: frozenset[str]
    metrics: Mapping[str, float]

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``model`` or ``ema``, on the CPU.

        Raises:
            CheckpointError: if the checkpoint holds none of that name, or they cannot be read.
        """
        if f"{name}.safetensors" not in self.files:
            held = ", ".join(sorted(Path(file).stem for file in self.files if file.endswith(".safetensors")))
            raise CheckpointError(f"{self.folder} holds no weights named {name}, only {held or 'other files'}")
        return read_weights(self.folder / f"{name}.safetensors")

    def state(self) -> dict[str, Any]:
        """The trainer's state.

        Raises:
            CheckpointError: if reading it would run code that the file brings along, or it cannot be read.
        """
        path = self.folder / STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a file that is not its own
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            told = f"it asks for {code[1]}, and more than tensors and plain containers can run code" if code else ""
            told = told or f"it is not a file of PyTorch's ({type(error).__name__})"
            raise CheckpointError(f"{path} is not read: {told}") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds a {type(state).__name__} instead of a trainer's state")
        return state

    def check_frozen(self, here: Mapping[str, str], unread: Sequence[str] = ()) -> None:
        """Compare frozen parts, as ``frozen_digests`` describes them, with those that the checkpoint was trained with.

        Args:
            unread: names of parts that were left out, which only training needs.

        Raises:
            CheckpointError: if a part is missing, new, or has other weights.
        """
        left_out = {name for name in self.frozen if any(f"{name}.".startswith(f"{part}.") for part in unread)}
        for name in sorted((here.keys() | self.frozen.keys()) - left_out):
            if here.get(name) != self.frozen.get(name):
                then, now = self.frozen.get(name, "not frozen"), here.get(name, "not frozen")
                raise CheckpointError(
                    f"{self.folder} was trained with other weights in the frozen part {name!r}: "
                    f"SHA-256 {then[:12]} then, {now[:12]} now; give it the weights of that run"
                )


class Best:
    """Which checkpoint is the best: that with the lowest value of a metric, and the earliest of equals.

    Args:
        metric: as ``metrics.jsonl`` calls it, such as ``validation/mse``.
        higher: the highest value instead.
    """

    def __init__(self, metric: str, higher: bool = False) -> None:
        self.metric = metric
        self.higher = higher

    def of(self, checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
        """The best of those that have the metric."""
        having = [found for found in checkpoints if math.isfinite(found.metrics.get(self.metric, math.nan))]
        return min(having, key=lambda found: (self._cost(found.metrics[self.metric]), found.step), default=None)

    def is_better(self, value: float, than: Checkpoint | None) -> bool:
        """Whether a value beats a checkpoint's; what is not finite beats none."""
        return math.isfinite(value) and (than is None or self._cost(value) < self._cost(than.metrics[self.metric]))

    def _cost(self, value: float) -> float:
        return -value if self.higher else value


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint: manifest, sizes, digests.

    Raises:
        CheckpointError: saying what is wrong with it.
    """
    return read_manifest(folder, FORMAT, VERSION, functools.partial(_checkpoint, folder))


def _checkpoint(folder: Path, body: Mapping[str, Any]) -> Checkpoint:
    frozen = {name: str(sha256) for name, sha256 in body["frozen"].items()}
    metrics = {name: float(value) for name, value in body.get("metrics", {}).items()}
    return Checkpoint(folder, int(body["step"]), frozen, frozenset(body["files"]), metrics)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The directories in ``folder`` that are named as checkpoints, oldest step first, sound or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def sound_checkpoints(folder: Path, warn: Callable[[str], None] = warnings.warn) -> Iterator[Checkpoint]:
    """The sound checkpoints in ``folder``, newest first; ``warn`` is told about each that is skipped, and why."""
    for path in reversed(checkpoint_folders(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            if path.exists():  # or the run that goes on has just removed it
                warn(f"checkpoint skipped: {error}")
        else:
            yield checkpoint


def latest_checkpoint(folder: Path, warn: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
    """The newest sound checkpoint in ``folder``, or ``None`` where there are no checkpoints.

    Args:
        folder: the run's ``checkpoints``.
        warn: told about each newer one that is skipped, and why.

    Raises:
        CheckpointError: if there are checkpoints and none is sound: to start anew is not for a program to decide.
    """
    for _ in range(3):  # while a run saves, a listing may miss both the checkpoint that goes and the one that comes
        while found := checkpoint_folders(folder):
            for checkpoint in sound_checkpoints(folder, warn):
                return checkpoint
            if all(path.exists() for path in found):
                raise CheckpointError(
                    f"none of the {len(found)} checkpoints in {folder} can be used (see the warnings before this); "
                    "restore one, or move the run directory aside to start anew"
                )
    return None


def best_checkpoint(folder: Path, best: Best, warn: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
    """The best sound checkpoint in ``folder``, or ``None`` where none has the metric."""
    while True:
        found = checkpoint_folders(folder)
        checkpoint = best.of(sound_checkpoints(folder, warn))
        if all(path.exists() for path in found):  # or it may have been removed for a better one
            return checkpoint


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, on the CPU.

    Raises:
        CheckpointError: if it is none, or is damaged.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a .safetensors file, and other formats can run code when they are read. Convert it: "
            f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), 'weights.safetensors')"
        )
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


class CheckpointStore:
    """Writes a run's checkpoints and keeps the newest ones, and the best.

    Args:
        folder: the run's ``checkpoints``.
        keep_last: how many verified checkpoints stay.
        best: which other one stays; none unless given.
        warn: told where an old checkpoint cannot be removed.
    """

    def __init__(
        self, folder: Path, keep_last: int, best: Best | None = None, warn: Callable[[str], None] = warnings.warn
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.best = best
        self.warn = warn
        self._verified: dict[Path, Checkpoint] = {}

    def tidy(self) -> None:
        """Remove what kills left: half-written checkpoints, and those that are too old.

        Only the process that trains in the run directory may.
        """
        try:
            files.remove_partial(self.folder)
            for path in self._too_old():
                files.remove_folder(path)
        except OSError as error:
            self.warn(f"an old checkpoint could not be removed; it is tried again after the next one: {error}")

    def save(
        self,
        step: int,
        weights: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        frozen: Mapping[str, str],
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write one checkpoint, read it back, then remove those that are too old.

        Args:
            step: steps taken.
            weights: tensors by file (``model``, ``ema``) and name.
            state: of the trainer; tensors and plain containers.
            frozen: digests of the frozen parts.
            metrics: what was measured at this step; what is not finite is left out.

        Raises:
            OSError: if it cannot be written, such as on a full disk; earlier checkpoints are then untouched.
            CheckpointError: if what was written reads back wrong; earlier checkpoints are then untouched.
        """
        target = self.folder / f"step_{step:08d}"
        partial = target.with_name(target.name + files.PARTIAL)
        try:
            entries = {}
            for name, content in _contents(weights, state):
                files.write_bytes(partial / name, content)
                entries[name] = describe_file(content)
            finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
            body = {"version": VERSION, "step": step, "files": entries, "frozen": dict(frozen), "metrics": finite}
            write_manifest(partial, FORMAT, body)
            files.publish_folder(partial, target)
        except OSError:
            with suppress(OSError):
                files.remove_partial(self.folder)  # on a full disk, leave room
            raise
        self._verified[target] = read_checkpoint(target)
        self.tidy()
        return target

    def is_better(self, value: float) -> bool:
        """Whether a value of the best's metric beats that of every verified checkpoint; never, where none is kept."""
        return self.best is not None and self.best.is_better(value, self.best.of(self._sound()))

    def _too_old(self) -> list[Path]:
        """Everything older than the ``keep_last`` newest verified checkpoints, except for the best."""
        found = checkpoint_folders(self.folder)
        if len(found) <= self.keep_last:
            return []
        sound = self._sound()
        best = None if self.best is None else self.best.of(sound)
        older = found[: found.index(sound[-self.keep_last :][0].folder)] if sound else []
        return [path for path in older if best is None or path != best.folder]

    def _sound(self) -> list[Checkpoint]:
        """The verified checkpoints, oldest first; each is verified once."""
        found = checkpoint_folders(self.folder)
        for path in found:
            if path not in self._verified:
                with suppress(CheckpointError):
                    self._verified[path] = read_checkpoint(path)
        return [self._verified[path] for path in found if path in self._verified]


def _contents(weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The files before the manifest, one at a time, since each takes as much memory as it has bytes."""
    for name, tensors in weights.items():
        # Clones, since safetensors refuses tied weights and views.
        copies = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        yield f"{name}.safetensors", safetensors.torch.save(copies)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    yield STATE, buffer.getvalue()


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load ``weights`` into everything of ``module`` that is not frozen, strictly.

    Args:
        module: on any device.
        weights: under the names of ``module.state_dict()``.
        source: named in errors.

    Raises:
        CheckpointError: listing weights that are missing, unexpected or of another shape; nothing is then loaded.
    """
    expected = live_state(module)
    both = expected.keys() & weights.keys()
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(both)
            if weights[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        told = [f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names]
        raise CheckpointError(f"the weights of {source} do not fit {type(module).__name__}; " + "; ".join(told))
    module.load_state_dict(dict(weights), strict=False)  # compared above; frozen parts are not in it


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
