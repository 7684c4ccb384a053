"""Ways to damage files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.engine.checkpoint import MANIFEST, STATE
from framework.engine.manifest import json_digest

Harm = Callable[[Path], object]
"""Damages a file, or a checkpoint's folder."""


class RunsCode:
    """Pickled, it asks its reader to run a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def cut_within_line(number: int) -> Harm:
    """Keep what stands before a line, counted from 1, and the first word of it but for its end."""

    def harm(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: number - 1]) + lines[number - 1].partition(":")[0][:-1])

    return harm


def truncate(share: float) -> Harm:
    """Keep the first part of a file, and never all of it."""

    def harm(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: min(len(content) - 1, int(share * len(content)))])

    return harm


def flip(place: float) -> Harm:
    """Flip one bit, at a share of the file's length."""

    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(len(content) - 1, int(place * len(content)))] ^= 16
        path.write_bytes(content)

    return harm


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def write(content: bytes) -> Harm:
    return lambda path: path.write_bytes(content)


def of_file(name: str, harm: Harm) -> Harm:
    """The harm to one file of a checkpoint."""
    return lambda folder: harm(folder / name)


def forge(change: Callable[[Any], object]) -> Harm:
    """Change the manifest's body in place, or into what ``change`` returns, with a digest that fits."""

    def harm(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        changed = change(manifest["body"])
        manifest["body"] = manifest["body"] if changed is None else changed
        manifest["sha256"] = json_digest(manifest["body"])
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return harm


def forge_key(value: object, *keys: str) -> Harm:
    """Another value of one key of the manifest's body, with a digest that fits; ``...`` for no such key."""

    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value
        if value is ...:
            del body[keys[-1]]

    return forge(change)


def replace_file(name: str, content: bytes) -> Harm:
    """Another content of one file, under a manifest that agrees with it."""

    def harm(folder: Path) -> None:
        (folder / name).write_bytes(content)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        forge_key(entry, "files", name)(folder)

    return harm


def safetensors_bytes(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


PARTS = ("model.safetensors", "ema.safetensors", STATE, MANIFEST)
