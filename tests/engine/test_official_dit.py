"""The benchmark beside DiT's own repository, with a stand-in for a checkout of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from framework.engine.official_dit import OfficialDiT
from framework.launch.benchmarks import benchmark_lines

CPU = torch.device("cpu")
MODELS = """
import torch
from torch import nn
from framework.interop.dit import import_dit, latents_of, patches_of
from tests.interop.golden import read

class DiT(nn.Module):
    num_heads = 4

    def __init__(self, input_size, num_classes):
        super().__init__()
        tables = {"pos_embed": (1, (input_size // 2) ** 2, 32)}
        tables["y_embedder.embedding_table.weight"] = num_classes + 1, 32
        for name, value in read("dit")[0].items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            shape = tables.get(name, value.shape)
            initial = torch.zeros(shape) if name.startswith("final_layer") else torch.randn(shape)
            setattr(module, last, nn.Parameter(initial))

    def forward(self, x, t, y):
        ours = import_dit(self.state_dict(), self.num_heads).build().eval()
        patches = patches_of(x)
        outputs = ours(patches, t, y, torch.full_like(y, patches.shape[1]))
        return torch.cat([latents_of(half) for half in outputs.chunk(2, -1)], 1) OTHER

    def forward_with_cfg(self, x, t, y, cfg_scale):
        assert len(x) == len(y) and cfg_scale == 2.0 and y[len(y) // 2 :].eq(1000).all()
        return self(x, t, y)

DiT_models = {"DiT-S/2": DiT}
"""
DIFFUSION = """
class Diffusion:
    def __init__(self, steps):
        self.steps = int(steps)

    def p_sample_loop(self, model, shape, noise, clip_denoised, model_kwargs, progress, device):
        assert tuple(shape) == tuple(noise.shape) and not clip_denoised and not progress
        for step in range(self.steps):
            noise = noise - model(noise, noise.new_full((len(noise),), 10.0 * step), **model_kwargs)[:, :4]
        return noise

create_diffusion = Diffusion
"""


def checkout(folder: Path, other: str = "") -> Path:
    """What stands where the official code would: its names, and a network that is ours."""
    for name, text in {"models.py": MODELS.replace("OTHER", other), "diffusion/__init__.py": DIFFUSION}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_beside_the_official_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = ModuleType("models")
    monkeypatch.setitem(sys.modules, "models", own)
    given: dict[str, Any] = {"official": checkout(tmp_path), "steps": 3, "rounds": 2, "batch_sizes": [2]}
    machine, difference, table, ours, interval, bfloat16 = benchmark_lines("generate", **given)
    assert "DiT-S/2 with random weights, guidance 2 of three channels, 2 latents of 4x32x32, 3 steps" in machine
    assert difference == "outputs of the networks: 0.0e+00 apart, of the largest"
    assert "2 alternating rounds of 2 images" in table and ours.startswith("ours is")
    assert "guidance only from 0.2 to 0.8 is" in interval and bfloat16.startswith("autocast to bfloat16 is")
    assert sys.modules["models"] is own and "diffusion" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_other_outputs_are_told(tmp_path: Path) -> None:
    lines = benchmark_lines("generate", official=checkout(tmp_path, "* 2"), steps=2, rounds=1, batch_sizes=[2])
    assert [next(lines), next(lines)][1] == "outputs of the networks: 5.0e-01 apart, of the largest"


def test_random_weights_that_do_something(tmp_path: Path) -> None:
    """The head starts at zero, with which any two networks would agree."""
    official = OfficialDiT(checkout(tmp_path), "S/2", 2, CPU)
    assert all(weights.any() for weights in official.model.parameters())
    samples = official(torch.tensor([3, 5]), 2.0)
    assert samples.shape == (2, 4, 32, 32) and not torch.equal(samples[0], samples[1])


def test_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no DiT-Z/9; there are DiT-S/2"):
        OfficialDiT(checkout(tmp_path), "Z/9", 2, CPU)
    for option in ({"tokens": 9}, {"modes": ["eos"]}, {"run": tmp_path}):
        with pytest.raises(ValueError, match=f"--{min(option)} has no part in this beside .*DiT; what has is --size"):
            list(benchmark_lines("generate", official=tmp_path, rounds=1, **option))
    with pytest.raises(ValueError, match="one batch size"):
        list(benchmark_lines("generate", official=tmp_path, rounds=1, batch_sizes=[1, 2]))
