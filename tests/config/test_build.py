"""Resolving, building and describing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from framework.config import ConfigError, build, component_list, describe, dump_yaml, load_config, resolve
from tests.config.parts import Experiment, PixelLoss, Schedule, ViT

TEXT = """\
model:
  encoder: {name: ViT, width: 64}
  quantizer: {name: VQ, dim: 6}
train: {max_steps: 10, lr: 1}
losses: {pixel: {name: PixelLoss, weight: 2}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(TEXT)
    return tmp_path


def no_weights(module: nn.Module, source: str, path: str) -> None:
    raise AssertionError("no node has weights")


def test_resolve_writes_every_default_and_loading_it_is_the_identity() -> None:
    tree = resolve(load_config("a.yaml", ["title='on'"]), Experiment)
    assert tree == {
        "model": {
            "encoder": {"name": "ViT", "width": 64, "depth": 2, "norm": "layer"},
            "quantizer": {"name": "VQ", "dim": 6, "codebook_size": 1024, "decay": 0.99},
            "teacher": None,
        },
        "train": {
            "max_steps": 10, "lr": 1.0, "amp": False, "precision": "auto",
            "schedule": {"warmup": 0, "betas": [0.9, 0.95]}, "lengths": [],
        },
        "losses": {"pixel": {"name": "PixelLoss", "weight": 2.0, "frozen": False}},
        "extras": None,
        "folder": "runs",
        "title": "on",
    }  # fmt: skip
    Path("config.yaml").write_text(dump_yaml(tree))
    again = load_config("config.yaml")
    assert again.tree == tree
    assert dump_yaml(resolve(again, Experiment)) == dump_yaml(tree)


@pytest.mark.parametrize("title", ["on", "1e-4", "null", "", "$x", "漢字", "a\nb", "{}"])
def test_strings_survive(title: str) -> None:
    Path("a.yaml").write_text(TEXT + dump_yaml({"title": title, "extras": []}))
    tree = resolve(load_config("a.yaml"), Experiment)
    assert tree["title"] == title
    Path("config.yaml").write_text(dump_yaml(tree))
    assert resolve(load_config("config.yaml"), Experiment) == tree


def test_build_makes_the_objects() -> None:
    experiment = build(load_config("a.yaml", ["extras=[{name: PixelLoss}]", "folder=x/y"]), Experiment, no_weights)
    assert isinstance(experiment.model.encoder, ViT)
    assert (experiment.model.encoder.width, experiment.model.encoder.out_dim) == (64, 6)
    assert type(experiment.train.lr) is float and experiment.train.lr == 1.0
    assert experiment.train.lengths == () and experiment.train.schedule.betas == (0.9, 0.95)
    assert isinstance(experiment.train.schedule, Schedule)
    assert experiment.losses is not None and isinstance(experiment.losses["pixel"], PixelLoss)
    assert experiment.extras is not None and len(experiment.extras) == 1
    assert experiment.folder == Path("x/y") and experiment.title is None


def test_changing_the_quantizer_is_one_override() -> None:
    config = load_config("a.yaml", ["model.quantizer.levels=[8, 8, 8]", "model.quantizer.name=FSQ"])
    assert build(config, Experiment, no_weights).model.encoder.out_dim == 3


def test_weights_and_frozen_are_the_builders_business() -> None:
    loaded: list[tuple[Any, str, str]] = []
    overrides = [
        "model.quantizer.weights=runs/vq",
        "model.teacher={name: ViT, width: 4, weights: teacher.safetensors, frozen: true}",
        "losses.pixel.frozen=true",
    ]
    config = load_config("a.yaml", overrides)
    experiment: Any = build(config, Experiment, lambda *call: loaded.append(call))
    model = experiment.model
    assert loaded == [
        (model.quantizer, "runs/vq", "model.quantizer"),
        (model.teacher, "teacher.safetensors", "model.teacher"),
    ]
    assert model.teacher.is_frozen and not model.teacher.training
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert model.quantizer.training and all(parameter.requires_grad for parameter in model.quantizer.parameters())
    assert experiment.losses["pixel"].frozen is True, "its own argument of that name is left to the component"
    assert resolve(config, Experiment)["model"]["teacher"] == {
        "name": "ViT", "width": 4, "depth": 2, "norm": "layer", "weights": "teacher.safetensors", "frozen": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantizer.dim=2000",
         "a.yaml:3: model.quantizer: VQ refuses its arguments: dim 2000 exceeds codebook_size 1024"),
        ("model.encoder.depth=99", "a.yaml:2: model.encoder: ViT refuses its arguments: width is smaller than depth"),
        ("model.encoder={name: Stubborn}", "command line: model.encoder={name: Stubborn}: model.encoder: "
         "Stubborn does not take 'out_dim' from Model: add it to its signature after `*`"),
    ],
)  # fmt: skip
def test_a_constructor_that_refuses_names_its_node(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(load_config("a.yaml", [override]), Experiment, no_weights)
    assert str(error.value).splitlines() == ["1 error in the configuration:", message]
    assert isinstance(error.value.__cause__, ValueError) == ("refuses" in message)


def test_describe_names_what_the_parent_gives() -> None:
    description = describe(ViT)
    assert (description.name, description.summary) == ("ViT", "A vision transformer.")
    assert [(a.name, a.text, a.required, a.from_parent) for a in description.arguments] == [
        ("width", "int", False, False),
        ("depth", "int", False, False),
        ("norm", "Literal['layer', 'rms']", False, False),
        ("out_dim", "int", True, True),
    ]


def test_the_list_of_components() -> None:
    text = component_list("quantizer")
    assert "\n  VQ: A codebook.\n      dim: int\n      codebook_size: int = 1024\n      decay: float = 0.99" in text
    assert "\nencoder (" not in text
    assert "\n      norm: Literal['layer', 'rms'] = layer\n      out_dim: int  (from the parent)" in component_list()
    with pytest.raises(LookupError, match="unknown axis 'quantiser': did you mean 'quantizer'?"):
        component_list("quantiser")
