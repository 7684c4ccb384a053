"""Manifests: what a folder holds, with the size and SHA-256 of each file, and a SHA-256 of all that.

A manifest is written last, so that a folder without one was not completely written.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from framework.runtime import files

MANIFEST = "manifest.json"
MAX_BYTES = 1 << 26
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint or an exported model that cannot be used, with what is wrong and what to do."""


def describe_file(content: bytes) -> dict[str, object]:
    """What a manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_manifest(folder: Path, form: str, body: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose other files are written.

    Args:
        folder: what it describes.
        form: which kind of folder it is.
        body: plain JSON values; ``version`` and ``files``, a description of each by its name, and whatever else.
    """
    manifest = {"format": form, "body": body, "sha256": json_digest(body)}
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path, form: str, version: int, convert: Callable[[dict[str, Any]], T]) -> T:
    """Verify a folder: its manifest, then sizes and digests.

    Args:
        folder: which.
        form: which kind of folder it should be.
        version: the newest one that is understood, from 1.
        convert: called with the body before any file is looked at; what it takes exception to is told.

    Returns:
        What ``convert`` returns.

    Raises:
        CheckpointError: saying what is wrong with it.
    """
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_BYTES} bytes: it is no manifest")
        manifest = json.loads(content)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not completely written") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise CheckpointError(f"{path} is not one of this framework's")
    body: Any = manifest.get("body")
    if manifest.get("sha256") != json_digest(body):
        raise CheckpointError(f"{path} does not have the SHA-256 that it states: it was damaged")
    try:
        if (found := int(body["version"])) > version:
            raise CheckpointError(
                f"{folder} has format version {found}, and this framework reads up to {version}: update it"
            )
        converted = convert(body)
        for name, expected in body["files"].items():
            _verify(folder / name, int(expected["bytes"]), expected["sha256"])
        return converted
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} does not hold what format version {version} asks for: {error!r}") from error


def _verify(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a file")
        if found.st_size != size:
            raise CheckpointError(f"{path} has {found.st_size} bytes instead of {size}: truncated?")
        if files.digest(path) != sha256:
            raise CheckpointError(f"{path} does not have the SHA-256 of its manifest: its content was damaged")
    except OSError as error:
        told = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(f"{path} {told}") from error


def json_digest(body: Any) -> str:
    """The SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
