from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from framework.runtime import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file.txt"
    files.write_text(path, "first")
    files.write_text(path, "zweite ä")
    assert path.read_text(encoding="utf-8") == "zweite ä"
    assert names(path.parent) == ["file.txt"]
    assert files.digest(path) == hashlib.sha256("zweite ä".encode()).hexdigest()


@pytest.mark.parametrize("operation", ["_write", "_fsync", "_replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, operation, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("operation", ["_write", "_fsync", "_replace"])
def test_a_kill_leaves_the_old_file_and_the_next_write_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def kill(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, operation, kill)
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    files.write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer" and names(tmp_path) == ["file"]


def test_appending(tmp_path: Path) -> None:
    files.append_text(tmp_path / "logs" / "log", "one\n")
    files.append_text(tmp_path / "logs" / "log", "two\n")
    assert (tmp_path / "logs" / "log").read_text() == "one\ntwo\n"


def test_publishing_a_folder_replaces_the_one_of_that_name(tmp_path: Path) -> None:
    files.write_text(tmp_path / "it" / "old", "old")
    files.write_text(tmp_path / "it.partial" / "new", "new")
    files.publish_folder(tmp_path / "it.partial", tmp_path / "it")
    assert names(tmp_path) == ["it"] and names(tmp_path / "it") == ["new"]


def test_a_removal_that_is_killed_leaves_only_partial_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "it" / "a", "a")

    def kill(*arguments: object, **options: object) -> None:
        if not options:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", kill)
        files.remove_folder(tmp_path / "it")
    assert [name.endswith(files.PARTIAL) for name in names(tmp_path)] == [True]
    (tmp_path / "file.partial").touch()
    files.remove_partial(tmp_path)
    assert names(tmp_path) == []
