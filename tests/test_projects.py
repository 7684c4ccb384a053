"""Every configuration that ships is right: it passes the check, fits together, and has a plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from framework import runs
from framework.ablation.grid import load_grid
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import Config, ConfigError, check, load_config, resolve
from framework.engine.experiment import Experiment
from framework.engine.init_from import Inheritance, InitFrom
from framework.generators.image_generator import ImageGenerator
from framework.nn.transformer import SelfAttention, Transformer
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import ROOT

RUNS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "projects").rglob("*.yaml")
    if "run" in yaml.safe_load(path.read_text())
)
GRIDS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "projects").glob("*/ablations/*.yaml"))
FEW = {"Photos": ["data.train.num_crops=200"], "DigitScenes": ["data.train.num_images=200"]}
TITOK = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}  # width, depth, heads


@pytest.fixture(autouse=True)
def donors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that others start from are not there; what becomes of their weights is tested in test_init_from.py."""
    monkeypatch.setattr(InitFrom, "match", lambda self, task: ({}, Inheritance("", {})))


def prepared(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The configuration, with a folder of one image under each environment variable that it reads, and few crops."""
    Image.new("RGB", (256, 256)).save(folder / "image.png")
    texts = [path.read_text() for path in (ROOT / "projects").rglob("*.yaml")]
    for variable in {variable for text in texts for variable in re.findall(r"\$env:(\w+)", text)}:
        monkeypatch.setenv(variable, str(folder))
    config = load_config(ROOT / name)
    return load_config(ROOT / name, FEW.get(config.tree["data"]["train"]["name"], []))


def bases(file: Path) -> list[Path]:
    """A configuration and all that it builds on."""
    listed = yaml.safe_load(file.read_text()).get("_base_", [])
    names = [listed] if isinstance(listed, str) else listed
    return [file, *(base for name in names for base in bases((file.parent / name).resolve()))]


def test_runs_are_found() -> None:
    assert {"projects/adatok/ntm.yaml", "projects/adatok/imagenet/ntm.yaml"} <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_fits_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = prepared(name, tmp_path, monkeypatch)
    check(config, Experiment)
    plan = runs.dry_run(config)
    tree = resolve(config, Experiment)
    size = tree["data"]["image_size"]
    if tree["tokenizer"] is not None:
        tokens = tree["tokenizer"]["encoder"]["num_tokens"]
        assert f"multiply-adds per image of {size}x{size} at {tokens} tokens" in plan
        has_more = bool({"policy", "generator"} & tree["task"].keys())
        assert (", of the tokenizer alone" in plan) == has_more
    assert f"training: {tree['train']['max_steps']:,} steps of {tree['train']['batch_size']} images" in plan


def test_runs_write_to_directories_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [prepared(name, tmp_path, monkeypatch).tree["run"]["dir"] for name in RUNS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", RUNS)
def test_a_draw_of_lengths_fits_the_encoder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runs.experiment_from(prepared(name, tmp_path, monkeypatch), device="meta").task.model
    if isinstance(model, ImageSpace):
        return  # an autoencoder draws none
    tokenizer = model.tokenizer if isinstance(model, AdaptiveTokenizer | ImageGenerator) else model
    assert isinstance(tokenizer, Tokenizer)
    lengths = tokenizer.draw_lengths(64, 0.5, torch.Generator().manual_seed(0))
    assert 1 <= lengths.min() and lengths.max() <= tokenizer.num_tokens


def test_grids_are_found() -> None:
    assert "projects/adatok/ablations/masking.yaml" in GRIDS


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_of_a_grid_fits_together(name: str) -> None:
    start = load_config((ROOT / name).parent / yaml.safe_load((ROOT / name).read_text())["config"])
    grid, cells = load_grid(ROOT / name, FEW[start.tree["data"]["train"]["name"]])
    assert len(cells) == len(grid.seeds) * len({cell.labels for cell in cells}) > 1
    for cell in cells[: len(cells) // len(grid.seeds)]:
        assert str(cell.folder) in runs.dry_run(cell.config)


def test_the_imagenet_run_is_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = resolve(prepared("projects/adatok/imagenet/ntm.yaml", tmp_path, monkeypatch), Experiment)
    assert tree["data"]["image_size"] == 256 and tree["tokenizer"]["encoder"]["num_tokens"] == 256
    assert tree["train"]["max_steps"] == 500_000 and tree["train"]["batch_size"] == 256
    for part in ("encoder", "decoder"):  # TiTok's blocks, whatever the small run has
        blocks = tree["tokenizer"][part]["blocks"]
        assert (blocks["mlp"], blocks["mlp_ratio"]) == ("gelu", 4.0)


def test_the_imagenet_run_asks_for_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IMAGENET_TRAIN", "IMAGENET_VAL"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError) as caught:
        check(load_config(ROOT / "projects/adatok/imagenet/ntm.yaml"), Experiment)
    assert {problem.keys for problem in caught.value.problems} == {
        ("data", split, "root") for split in ("train", "validation", "test")
    }
    assert "IMAGENET_TRAIN" in str(caught.value)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_in_the_comment_sets_what_the_run_reads(name: str) -> None:
    text = (ROOT / name).read_text()
    commands = re.findall(r"^# +python tools/train_net.py --config (\S+)$", text, re.MULTILINE)
    assert set(commands) <= {name}
    if needed := {name for file in bases(ROOT / name) for name in re.findall(r"\$env:(\w+)", file.read_text())}:
        comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        assert set(re.findall(r"(\w+)=", comment)) == needed


@pytest.mark.parametrize("size", TITOK)
def test_sizes_are_titoks(size: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"_base_: [{ROOT}/projects/adatok/ntm.yaml, {ROOT}/projects/_base_/vit_{size}.yaml]\n")
    model = runs.experiment_from(load_config(file), device="meta").task.model
    for part in ("encoder", "decoder"):
        transformer = model.get_submodule(f"{part}.transformer")
        assert isinstance(transformer, Transformer)
        width = transformer.norm.get_parameter("weight").numel()
        heads = {module.num_heads for module in transformer.modules() if isinstance(module, SelfAttention)}
        assert (width, len(transformer.blocks), *heads) == TITOK[size]
