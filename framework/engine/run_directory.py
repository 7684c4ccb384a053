"""What a run directory says of its run: ``config.yaml`` (what runs there), ``run.json`` (each start), and the lock."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from framework.config import ConfigError, load_config
from framework.engine.checkpoint import latest_checkpoint
from framework.runtime.files import write_text
from framework.runtime.lock import RunLock


class RunError(Exception):
    """A run cannot go on; the text says why, and what to do."""


@contextmanager
def hold(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Nobody else trains in the run directory meanwhile; what cannot be read or written ends the run in words."""
    try:
        with RunLock(folder, say):
            yield
    except BlockingIOError as error:
        raise RunError(str(error)) from error
    except OSError as error:
        last = latest_checkpoint(folder / "checkpoints", lambda warning: None)
        kept = f"{last.folder} is kept, and the same command continues from it" if last else "nothing was saved yet"
        raise RunError(f"{error}. The run stops here; {kept}") from error


def refuse_another(folder: Path, text: str) -> None:
    """Raise if the directory holds a run of another configuration than ``text``, in what decides its training."""
    file = folder / "config.yaml"
    old = file.read_text(errors="replace") if file.exists() else text
    if _without_what_may_change(old) == _without_what_may_change(text):
        return
    try:
        load_config(file)
    except ConfigError as error:
        raise RunError(
            f"{file} is damaged. If this configuration is that of the run, remove the file, and the same command "
            f"continues; else choose another run.dir, or --fresh, which moves the old run aside. {error}"
        ) from error
    changes = difflib.unified_diff(
        old.splitlines(), text.splitlines(), f"{file} (what runs there)", "this configuration", lineterm="", n=0
    )
    raise RunError(
        f"{folder} holds a run of another configuration. Choose another run.dir, or start anew with --fresh, which "
        "moves the old run aside:\n" + "\n".join(changes)
    )


def _without_what_may_change(text: str) -> str:
    return re.sub(r"^(launch|evaluation):.*\n( .*\n)*", "", text, flags=re.MULTILINE)


def move_aside(folder: Path) -> Path:
    """Give the directory a name with the time in it; returns that."""
    target = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(target)
    return target


def is_finished(folder: Path) -> bool:
    """Whether training came to its end and its evaluation, after which nothing is left to do."""
    starts = _starts(folder)
    return bool(starts) and starts[-1].get("outcome") == "finished" and (folder / "evaluation/table.md").exists()


def circumstances() -> dict[str, object]:
    """What is worth knowing about this process: when, command, versions, commit, host and threads."""
    names = ("torch", "torchvision", "numpy", "einops", "fvcore")
    return {
        "started": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "git": _git_commit(),
        "host": platform.node(),
        "threads": torch.get_num_threads(),
    }


def record_start(folder: Path, more: Mapping[str, object]) -> None:
    """Add the circumstances of this start to ``run.json``, and ``more``."""
    _record(folder, [*_starts(folder), {**circumstances(), **more}])


def record_end(folder: Path, outcome: str, step: int) -> None:
    """Add to the last start how it ended."""
    *others, last = _starts(folder) or [{}]
    _record(folder, [*others, last | {"ended": _now(), "outcome": outcome, "step": step}])


def _starts(folder: Path) -> list[dict[str, object]]:
    file = folder / "run.json"
    try:
        return [dict(start) for start in json.loads(file.read_bytes())["sessions"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{file} is damaged: {error!r}. It only lists the run's starts: remove it, and the same command continues"
        ) from error


def _record(folder: Path, starts: list[dict[str, object]]) -> None:
    write_text(folder / "run.json", json.dumps({"sessions": starts}, indent=1) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _git_commit() -> str | None:
    """The commit of the framework's checkout, with a mark where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
