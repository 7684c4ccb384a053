from __future__ import annotations

import os
from pathlib import Path

import pytest

COMMANDS = {
    "srun": "true",
    "sbatch": """if [ -e refuse ]; then cat refuse >&2; exit 1; fi
number=$((41 + $(ls sbatch_*.sh 2>/dev/null | wc -l)))
cp "$1" "sbatch_$number.sh"; echo "Submitted batch job $number\"""",
    "squeue": "cat queue",
    "scontrol": 'echo "$@" >> scontrol',
}


class FakeSlurm:
    """SLURM's commands as scripts on the files of a folder; jobs count from 41.

    ``queue`` is what squeue prints, ``refuse`` why sbatch fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "queue").touch()
        for name, code in COMMANDS.items():
            script = folder / "bin" / name
            script.write_text(f"#!/bin/bash\ncd {folder}\n{code}\n")
            script.chmod(0o755)

    @property
    def scripts(self) -> list[str]:
        """What sbatch was given."""
        return [path.read_text() for path in sorted(self.folder.glob("sbatch_*.sh"))]


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake_slurm")
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
