"""Where configurations are, and which of them makes a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from framework.config.errors import ConfigError
from framework.config.load import load_config


def find_config(path: str) -> Path:
    """A configuration by its path: from here, or else from where the framework is installed.

    Raises:
        FileNotFoundError: if neither place has it; the text lists what is near.
    """
    installed = Path(__file__).parents[2] / path
    for candidate in (Path(path), installed):
        if os.path.isfile(candidate):  # which takes names that are too long, too
            return candidate
    folder = Path(path).parent if os.path.isdir(Path(path).parent) else installed.parent
    there = sorted(str(file) for file in folder.glob("*.yaml"))
    holds = f"; {folder} holds {', '.join(there)}" if there else ""
    raise FileNotFoundError(f"there is no configuration {path}{holds}")


def config_of_run(run_dir: Path, folders: Iterable[Path]) -> str | None:
    """The first configuration below the folders whose ``run.dir`` is ``run_dir``, by its path from here, if any."""
    for file in [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]:
        with suppress(ConfigError):
            run = load_config(file).tree.get("run")
            if isinstance(run, dict) and run.get("dir") == str(run_dir):
                return os.path.relpath(file)
    return None
