"""Checkpoints: directories that are either whole and verified, or not taken for checkpoints at all.

``checkpoints/step_00001200/`` holds ``model.safetensors`` (the task's state without frozen parts), ``ema.safetensors``
(the model's averaged weights), ``trainer.pt`` (optimizers, generators, data position: tensors and plain containers) and
``manifest.json`` with the size and SHA-256 of each. It is written under a name that ends in ``.partial``, the manifest
last, and then renamed. The latest is found by looking, so there is no pointer that could be wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from framework.engine.frozen import live_state
from framework.runtime import files

FORMAT = "framework checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "trainer.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, with what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were compared with its manifest.

    Args:
        folder: where it is.
        step: steps taken when it was saved.
        frozen: digests of the frozen parts that it was trained with, by name.
    """

    folder: Path
    step: int
    frozen: Mapping[str, str]

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``model`` or ``ema``, on the CPU.

        Raises:
            CheckpointError: if the checkpoint holds none of that name.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            held = ", ".join(sorted(file.stem for file in self.folder.glob("*.safetensors")))
            raise CheckpointError(f"{self.folder} holds no weights named {name}, only {held}")
        return safetensors.torch.load_file(path)

    def state(self) -> dict[str, Any]:
        """The trainer's state.

        Raises:
            CheckpointError: if reading it would run code that the file brings along.
        """
        path = self.folder / STATE
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} holds more than tensors and plain containers; not read: {error}") from error

    def check_frozen(self, here: Mapping[str, str]) -> None:
        """Compare frozen parts, as ``frozen_digests`` describes them, with those that the checkpoint was trained with.

        Raises:
            CheckpointError: if a part is missing, new, or has other weights.
        """
        for name in sorted(here.keys() | self.frozen.keys()):
            if here.get(name) != self.frozen.get(name):
                then, now = self.frozen.get(name, "not frozen"), here.get(name, "not frozen")
                raise CheckpointError(
                    f"{self.folder} was trained with other weights in the frozen part {name!r}: "
                    f"SHA-256 {then[:12]} then, {now[:12]} now; give it the weights of that run"
                )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint: manifest, sizes, digests.

    Raises:
        CheckpointError: saying what is wrong with it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not completely written") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not readable JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} is not one of this framework's")
    body = manifest.get("body", {})
    if manifest.get("sha256") != _json_digest(body):
        raise CheckpointError(f"{folder / MANIFEST} does not have the SHA-256 that it states: it was damaged")
    if body["version"] > VERSION:
        raise CheckpointError(
            f"{folder} has format version {body['version']}, and this framework reads up to {VERSION}: update it"
        )
    for name, expected in body["files"].items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}: truncated?")
        if files.digest(path) != expected["sha256"]:
            raise CheckpointError(f"{path} does not have the SHA-256 of its manifest: its content was damaged")
    return Checkpoint(folder, body["step"], body["frozen"])


def checkpoint_folders(folder: Path) -> list[Path]:
    """The directories in ``folder`` that are named as checkpoints, oldest step first, sound or not."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())


def latest_checkpoint(folder: Path, warn: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
    """The newest sound checkpoint in ``folder``, or ``None`` where there are no checkpoints.

    Args:
        folder: the run's ``checkpoints``.
        warn: told about each newer one that is skipped, and why.

    Raises:
        CheckpointError: if there are checkpoints and none is sound: to start anew is not for a program to decide.
    """
    found = checkpoint_folders(folder)
    for path in reversed(found):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warn(f"checkpoint skipped: {error}")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} can be used (see the warnings before this); "
            "restore one, or move the run directory aside to start anew"
        )
    return None


class CheckpointStore:
    """Writes a run's checkpoints and keeps the newest ones.

    Args:
        folder: the run's ``checkpoints``.
        keep_last: how many verified checkpoints stay.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._verified: set[Path] = set()

    def remove_partial(self) -> None:
        """Remove what kills left half-written; only the process that trains in the run directory may."""
        files.remove_partial(self.folder)

    def save(
        self,
        step: int,
        weights: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        frozen: Mapping[str, str],
    ) -> Path:
        """Write one checkpoint, read it back, then remove those that are too old.

        Args:
            step: steps taken.
            weights: tensors by file (``model``, ``ema``) and name.
            state: of the trainer; tensors and plain containers.
            frozen: digests of the frozen parts.

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
                entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            body = {"version": VERSION, "step": step, "files": entries, "frozen": dict(frozen)}
            manifest = {"format": FORMAT, "body": body, "sha256": _json_digest(body)}
            files.write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            files.publish_folder(partial, target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk, leave room
            raise
        read_checkpoint(target)
        self._verified.add(target)
        self._retain()
        return target

    def _retain(self) -> None:
        """Remove everything older than the ``keep_last`` newest verified checkpoints."""
        sound = 0
        for path in reversed(checkpoint_folders(self.folder)):
            if sound == self.keep_last:
                files.remove_folder(path)
            elif self._is_sound(path):
                sound += 1

    def _is_sound(self, path: Path) -> bool:
        if path not in self._verified:
            try:
                read_checkpoint(path)
            except CheckpointError:
                return False
            self._verified.add(path)
        return True


def _contents(weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The files before the manifest, one at a time, since each takes as much memory as it has bytes."""
    for name, tensors in weights.items():
        # Clones, since safetensors refuses tied weights and views.
        copies = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        yield f"{name}.safetensors", safetensors.torch.save(copies)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    yield STATE, buffer.getvalue()


def _json_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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
