from __future__ import annotations

from pathlib import Path

import pytest

from framework.config.find import config_of_run


def test_the_configuration_of_a_run_is_found_and_wrong_files_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deep = Path("projects/mine/deep")
    deep.mkdir(parents=True)
    (deep / "a_broken.yaml").write_text("run: {dir: runs/x")
    (deep / "grid.yaml").write_text("run: 3")
    (deep / "base.yaml").write_text("run: {dir: runs/y}")
    (deep / "x.yaml").write_text("_base_: base.yaml\nrun: {dir: runs/x}")
    assert config_of_run(Path("runs/x"), [Path("nowhere"), Path("projects")]) == "projects/mine/deep/x.yaml"
    assert config_of_run(Path("runs/y"), [Path("projects").absolute()]) == "projects/mine/deep/base.yaml"
    assert config_of_run(Path("runs/z"), [Path("projects")]) is None
