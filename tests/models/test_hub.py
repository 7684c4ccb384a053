"""Ids of the Hugging Face hub, with its local cache laid out by hand and no network."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import nn

import framework
from framework import runs
from framework.config import Config, Source, build
from framework.engine.checkpoint import CheckpointError
from framework.models.exported import Exported
from framework.models.hub import find_model
from framework.runs import RunError
from framework.runtime.weights import weights_digest
from tests.models.exports import TREE, exported
from tests.tiny_run import ROOT, run_tool

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, an empty cache, and whoever opens a connection fails the test."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *given: pytest.fail(f"a connection to {given[1:]}"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: pytest.fail(f"asked for {given}"))


def cached(cache: Path, commit: str = COMMIT, **refs: str) -> Path:
    """``me/small`` as the hub's client leaves it after a download; returns its snapshot."""
    repository = cache / "models--me--small"
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = repository / "snapshots" / commit
    exported(snapshot, TREE)
    for file in list(snapshot.iterdir()):  # which are links, there
        blob = repository / "blobs" / f"{commit[:4]}-{file.name}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    for ref, target in refs.items():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(target)
    return snapshot


def digest_of(model: nn.Module) -> str:
    return weights_digest(model.state_dict())


def test_a_cached_model_loads_without_a_network(tmp_path: Path) -> None:
    main, other = cached(tmp_path / "cache", main=COMMIT), cached(tmp_path / "cache", OTHER, v2=OTHER)
    digests = [digest_of(framework.load(folder)) for folder in (main, other)]
    assert digests[0] != digests[1]
    for source, digest in (
        ("me/small", digests[0]), ("me/small@main", digests[0]), (f"me/small@{COMMIT}", digests[0]),
        ("me/small@v2", digests[1]), (f"me/small@{OTHER}", digests[1]), (Path("me/small"), digests[0]),
    ):  # fmt: skip
        assert digest_of(framework.load(source)) == digest


def test_a_cached_model_is_a_source_of_weights(tmp_path: Path) -> None:
    encoder = framework.load(cached(tmp_path / "cache", main=COMMIT)).get_submodule("encoder")
    tree = deepcopy(TREE)
    tree["tokenizer"]["encoder"]["weights"] = "me/small@main"
    taken = build(Config(tree, {(): Source("a test")}), Exported, runs.load_part).model
    assert digest_of(taken.get_submodule("encoder")) == digest_of(encoder)


def test_what_is_not_in_the_cache_is_told_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(tmp_path / "cache", main=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source, command in (
        ("you/other", "hf download you/other --local-dir FOLDER"),
        ("me/small@v3", "hf download me/small --revision v3 --local-dir FOLDER"),
        (f"me/small@{OTHER}", f"hf download me/small --revision {OTHER} --local-dir FOLDER"),
    ):
        with pytest.raises(RunError) as caught:
            framework.load(source)
        told = str(caught.value)
        assert told.startswith(f"{source} holds no run: there is no such folder here") and command in told
        assert str(tmp_path / "cache") in told and "\n" not in told
    config = str(ROOT / "projects/adatok/ntm.yaml")
    assert run_tool(monkeypatch, "train_net", "--config", config, "tokenizer.weights=you/other", "run.dir=run") == 2
    assert "hf download you/other" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["config.yaml", "model.safetensors", "manifest.json"])
def test_a_half_downloaded_model_is_not_taken(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached(tmp_path / "cache", main=COMMIT) / missing).unlink()
    asked: list[dict[str, Any]] = []

    def download(name: str, **given: Any) -> str:
        if given.get("local_files_only"):
            return original(name, **given)
        asked.append(given)
        raise ConnectionError("no route to host\nand more")

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RunError, match=r"it cannot be downloaded: no route to host \(ConnectionError\)"):
        framework.load("me/small")
    assert len(asked) == 1 and asked[0]["revision"] is None


def test_what_the_cache_lacks_is_downloaded_and_what_it_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **given: Any) -> str:
        if given.get("local_files_only"):
            return original(name, **given)
        asked.append((name, given))
        return str(cached(tmp_path / "cache", v1=COMMIT))

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    digests = {digest_of(framework.load("me/small@v1")) for _ in range(2)}
    assert len(digests) == 1
    ((name, given),) = asked
    assert (name, given["revision"]) == ("me/small", "v1")
    assert set(given["allow_patterns"]) == {"config.yaml", "model.safetensors", "manifest.json", "README.md"}


def test_what_is_not_an_export_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory of somebody else, whose imports runs of one's own would have imported."""
    snapshot = cached(tmp_path / "cache", main=COMMIT)
    for file in snapshot.iterdir():
        file.unlink()
    (snapshot / "config.yaml").write_text("imports: [antigravity]\nrun: {dir: x}\n")
    (snapshot / "checkpoints").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: str(snapshot))
    with pytest.raises(RunError, match="me/small is not a model that this framework has exported"):
        framework.load("me/small")
    assert "antigravity" not in sys.modules


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache", main=COMMIT)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors has .* bytes instead of .*truncated"):
        framework.load("me/small")


def test_a_folder_here_comes_before_the_hub(tmp_path: Path) -> None:
    cached(tmp_path / "cache", main=COMMIT)
    Path("me").mkdir()
    with pytest.raises(RunError, match="me/small holds no run: it has no config.yaml"):
        framework.load("me/small")
    model = exported(Path("me/small"), TREE)
    assert digest_of(framework.load("me/small")) == digest_of(model)


@pytest.mark.parametrize("source", ["runs/adatok/ntm", "./me/small", "/me/small", "small", "me/", "me/a b", "me/../x"])
def test_what_is_no_id_is_a_path(source: str) -> None:
    assert find_model(source) == Path(source)


def test_another_process_loads_it_with_the_hubs_own_variables(tmp_path: Path) -> None:
    repository = cached(tmp_path / "cache", main=COMMIT).parents[1]
    shutil.copytree(repository, tmp_path / "home/hub" / repository.name, symlinks=True)
    code = "import framework; print(framework.load('me/small').encode(__import__('torch').zeros(1, 3, 8, 8)).latents)"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    expected = framework.load("me/small").encode(torch.zeros(1, 3, 8, 8)).latents
    assert done.returncode == 0 and done.stdout == f"{expected}\n", done.stderr
