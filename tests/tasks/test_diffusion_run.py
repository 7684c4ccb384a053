"""Runs of generators that learn from the data before they learn from steps: DiT and MaskGIT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import framework
from framework import runs
from framework.allocation.learned_policy import LearnedPolicy
from framework.data.token_file import TokenFile
from framework.data.token_statistics import TokenStatistics
from framework.generators.dit import DiT
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator
from framework.generators.latent_scale import LatentScale
from framework.generators.length_prior import PredictedLength
from framework.generators.masked import MaskGIT
from framework.models.export import export
from tests.tiny_run import generator_config

SMALL = {
    "dit": ("scenes/ntm.yaml", 8, ["task.generator.width=16", "task.generator.sampler={name: Euler, steps: 3}"]),
    "maskgit": ("discrete/ntm_mhlora.yaml", 16, ["task.generator.width=16", "task.generator.steps=3"]),
}


def train(name: str, folder: Path, *more: str) -> Path:
    """A run of six steps at three lengths, by an untrained policy."""
    base, num_tokens, small = SMALL[name]
    experiment = runs.experiment_from(generator_config(folder, f"projects/adatok/{base}"))
    save_file(experiment.task.model.state_dict(), folder / "tokenizer.safetensors")
    budgets = [2, 5, num_tokens]
    policy = f"{{name: LearnedPolicy, width: 8, depth: 1, budgets: {budgets}, frozen: true"
    torch.manual_seed(0)
    feature_dim = experiment.task.model.encoder.feature_dim
    made = LearnedPolicy(width=8, depth=1, budgets=budgets, num_tokens=num_tokens, feature_dim=feature_dim)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    save_file(made.state_dict(), folder / "policy.safetensors")
    own = [
        f"run.cache={folder / 'cache'}", f"tokenizer.weights={folder / 'tokenizer.safetensors'}", "task.samples=40",
        f"task.policy={policy}, weights: {folder / 'policy.safetensors'}}}", "task.generator.depth=1",
        "task.guidance={scale: 2.0}", "train.ema_decay=0.999",
    ]  # fmt: skip
    runs.train(generator_config(folder / "run", f"projects/adatok/{name}.yaml", *own, *small, *more), lambda text: None)
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_a_run_keeps_what_it_has_learned_from_the_data(name: str, tmp_path: Path) -> None:
    folder = train(name, tmp_path)
    model = framework.load(folder / "run")
    assert isinstance(model, ImageGenerator)
    generator = model.generator
    assert isinstance(generator, DiT | MaskGIT)
    file = TokenFile(next((folder / "cache").glob("*.tokens")))
    assert file.labels is not None
    expected = torch.zeros_like(generator.prior.counts)
    budgets = list(generator.space.budgets)
    for label, length in zip(file.labels.tolist(), file.lengths.tolist(), strict=True):
        expected[label, budgets.index(length)] += 1
    assert torch.equal(generator.prior.counts, expected) and (expected.sum(0) > 0).sum() > 1
    labels = torch.arange(20) % 10
    tokens = model.generate(labels, seed=3, guidance=Guidance(2.0))
    some = model.generate(labels[7:9], seed=3, guidance=Guidance(2.0), sample_ids=torch.tensor([7, 8]))
    torch.testing.assert_close(some.latents, tokens.latents[7:9], rtol=1e-4, atol=1e-4)
    assert model.decode(tokens).shape == (20, 3, 16, 16)
    export(folder / "run", folder / "exported")
    again = framework.load(folder / "exported")
    assert isinstance(again, ImageGenerator)
    assert torch.equal(again.generate(labels, seed=3, guidance=Guidance(2.0)).latents, tokens.latents)
    if isinstance(generator, DiT):
        assert file.statistics is not None
        scale = LatentScale(generator.space, generator.scale.shrinkage)
        scale.learn(file.statistics)
        # Averages of weights begin with it, or it would be some way between 1 and what was learned.
        torch.testing.assert_close(generator.scale.std, scale.std, rtol=1e-6, atol=0)
        torch.testing.assert_close(generator.scale.mean, scale.mean, rtol=1e-6, atol=1e-7)
        kept = TokenStatistics.of(generator.scale.normalise(tokens.latents), tokens.mask)
        assert 0.1 < float(kept.std[0].mean()) < 3, "an untrained flow of a known scale stays near it"
    metrics = json.loads((folder / "run" / "evaluation" / "metrics.json").read_text())
    assert all(value > 0 for value in metrics["held_out"].values())
    assert sum(metrics["samples"]["samples, guidance 2 constant"]["lengths"].values()) == 40


def test_a_run_whose_lengths_are_predicted(tmp_path: Path) -> None:
    """It needs no count, and its prior is trained, kept and exported like any other part."""
    folder = train("dit", tmp_path, "task.generator.length_prior={name: PredictedLength, width: 4}")
    model = framework.load(folder / "run")
    assert isinstance(model, ImageGenerator) and isinstance(model.generator, DiT)
    prior = model.generator.prior
    assert isinstance(prior, PredictedLength) and prior.class_embedding.shape == (10, 4)
    chances = prior.chances
    assert (chances != chances[:, :1]).any(), "it began with equal ones"
    metrics = json.loads((folder / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["held_out"]["budget"] > 0 and metrics["held_out"]["length"] > 1
    export(folder / "run", folder / "exported")
    again = framework.load(folder / "exported")
    assert isinstance(again, ImageGenerator) and isinstance(again.generator, DiT)
    assert torch.equal(again.generator.prior.chances, chances)
