"""Which configuration makes a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from framework.config.errors import ConfigError
from framework.config.load import load_config


def config_of_run(run_dir: Path, folders: Iterable[Path]) -> str | None:
    """The first configuration below the folders whose ``run.dir`` is ``run_dir``, by its path from here, if any."""
    for file in [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]:
        with suppress(ConfigError):
            run = load_config(file).tree.get("run")
            if isinstance(run, dict) and run.get("dir") == str(run_dir):
                return os.path.relpath(file)
    return None
