from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import framework
from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import Config, ConfigError, Source, build
from framework.engine.checkpoint import CheckpointError
from framework.engine.experiment import Experiment
from framework.generators.image_generator import ImageGenerator
from framework.models.card import _without_folders
from framework.models.export import export
from framework.models.exported import Exported, is_exported
from framework.runs import RunError
from framework.runtime import files
from framework.runtime.weights import weights_digest
from framework.tasks.train_allocation import TrainAllocation
from framework.tokenizers.autoencoders.autoencoder_kl import AutoencoderKL
from framework.tokenizers.interface import QUANTIZERS
from tests.models.exports import SPACE, TREE, assert_same_uses, exported, uses
from tests.tasks.test_latent_path import SHAPE, vae_config
from tests.tiny_run import files_of, run_tool, tiny_config, tiny_policy_config, train_tiny

FILES = {"README.md", "config.yaml", "manifest.json", "model.safetensors"}
DISCRETE = "tokenizer.quantizer={name: FiniteScalarQuantizer}"
MODULE = """
import torch
from pathlib import Path
from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer

@QUANTIZERS.register()
class OfMyOwn(Quantizer):
    "Tokens between -1 and 1."

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> Quantized:
        return Quantized(latents.tanh())
"""


@contextmanager
def away(*folders: Path) -> Iterator[None]:
    """Runs are nowhere meanwhile."""
    for folder in folders:
        folder.rename(folder.with_name(f"{folder.name}.away"))
    try:
        yield
    finally:
        for folder in folders:
            folder.with_name(f"{folder.name}.away").rename(folder)


def text_of(folder: Path) -> str:
    return "\n".join((folder / name).read_text() for name in sorted(FILES - {"model.safetensors"}))


def model_of(folder: Path, *overrides: str) -> nn.Module:
    return runs.experiment_from(tiny_config(folder, *overrides)).task.model.eval()


# What is exported loads by itself


@pytest.fixture
def discrete_run(tmp_path: Path, quick_report: None) -> Path:
    train_tiny(tmp_path / "discrete", DISCRETE)
    return tmp_path / "discrete"


def assert_exported(run: Path, out: Path, others: Sequence[Path] = ()) -> nn.Module:
    original = framework.load(run)
    before, expected, state = files_of(run), uses(original), original.state_dict()
    assert export(run, out, license="Apache-2.0") == weights_digest(state)
    assert {path.name for path in out.iterdir()} == FILES and files_of(run) == before
    with away(run, *others):
        random = torch.get_rng_state()
        loaded = framework.load(out)
        assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in loaded.modules())
    assert type(loaded) is type(original)
    assert weights_digest(loaded.state_dict()) == weights_digest(state)
    assert_same_uses(uses(loaded), expected)
    return loaded


def test_a_continuous_tokenizer(tiny_run: Path, tmp_path: Path) -> None:
    assert_exported(tiny_run, tmp_path / "out")


def test_a_discrete_tokenizer(discrete_run: Path, tmp_path: Path) -> None:
    loaded = assert_exported(discrete_run, tmp_path / "out")
    tokens = loaded.encode(torch.rand(2, 3, 16, 16), [3, 16])
    assert tokens.codes is not None
    same = loaded.codes_to_tokens(tokens.codes, tokens.lengths)
    assert torch.equal(loaded.decode(same), loaded.decode(tokens))


def test_a_policy_brings_its_frozen_tokenizer(tiny_policy: Path, tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"), away(tiny_run):
        framework.load(tiny_policy)  # a run needs what it was built on
    loaded = assert_exported(tiny_policy, tmp_path / "out", [tiny_run])
    assert isinstance(loaded, AdaptiveTokenizer)
    assert weights_digest(loaded.tokenizer.state_dict()) == weights_digest(framework.load(tiny_run).state_dict())


def test_a_fine_tuned_decoder(tiny_policy: Path, tiny_run: Path, tmp_path: Path, quick_report: None) -> None:
    kind = f"{{name: FineTuneDecoder, losses: {{pixel: {{name: PixelLoss}}}}, reward: {{name: ContinuousReward}}, " \
           f"policy: {{name: LearnedPolicy, weights: {tiny_policy}}}}}"  # fmt: skip
    run = tmp_path / "tuned"
    config = tiny_policy_config(run, tiny_run, f"task={kind}", "tokenizer.frozen=false", "train.max_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.tasks.fine_tune_decoder.FineTuneDecoder.report", quick)
        runs.train(config, lambda text: None)
    assert_exported(run, tmp_path / "out", [tiny_run, tiny_policy])


def quick(task: nn.Module, wanted: Any) -> None:
    wanted.folder.mkdir(parents=True)
    (wanted.folder / "table.md").write_text("| a table |\n")


def test_an_autoencoder(tmp_path: Path, quick_report: None) -> None:
    runs.train(vae_config(tmp_path / "vae", "train.max_steps=2"), lambda text: None)
    loaded = assert_exported(tmp_path / "vae", tmp_path / "out")
    assert isinstance(loaded, AutoencoderKL)
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["space"]["width"] == 32 and config["tokenizer"] is None
    assert "4 channels, one position for 2x2 pixels" in (tmp_path / "out/README.md").read_text()


def test_averaged_weights_where_there_are_some_and_the_best_where_it_is_asked_for(
    tmp_path: Path, quick_report: None
) -> None:
    run = tmp_path / "run"
    best = ["train.best={metric: validation/mse@16, higher: true}", "train.keep_last=1", "train.validate_every=2"]
    train_tiny(run, *best, "train.checkpoint_every=2", "train.max_steps=8")
    for which in ("latest", "best"):
        export(run, tmp_path / which, which)  # type: ignore[arg-type]
        expected = framework.load(run, "ema", which).state_dict()  # type: ignore[arg-type]
        assert weights_digest(framework.load(tmp_path / which).state_dict()) == weights_digest(expected)
    manifests = [(tmp_path / which / "manifest.json").read_text() for which in ("latest", "best")]
    made = [json.loads(manifest)["body"]["made"] for manifest in manifests]
    assert made[0]["step"] == 8 and made[1]["step"] < 8 and made[0]["weights"] == "ema"

    train_tiny(tmp_path / "last", "train.ema_decay=null", "train.max_steps=2")
    export(tmp_path / "last", tmp_path / "plain")
    assert "weights of the last step" in (tmp_path / "plain/README.md").read_text()


# What is in the folder


def test_the_configuration_is_that_of_the_model_alone(tiny_policy: Path, tiny_run: Path, tmp_path: Path) -> None:
    export(tiny_policy, tmp_path / "out")
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    whole = yaml.safe_load((tiny_policy / "config.yaml").read_text())
    assert whole["tokenizer"].pop("weights") == str(tiny_run) and whole["tokenizer"].pop("frozen") is True
    expected = {"tokenizer": whole["tokenizer"], "image_size": 16, "policy": whole["task"]["policy"]}
    expected |= dict.fromkeys(("generator", "num_classes", "budgets", "space"))
    assert config == expected
    told = text_of(tmp_path / "out")
    assert str(tmp_path) not in told and str(tiny_run.parent) not in told


def test_the_card_tells_what_was_measured(tiny_run: Path, tmp_path: Path) -> None:
    digest = export(tiny_run, tmp_path / "out", license="Apache-2.0")
    card = (tmp_path / "out/README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "apache-2.0" and yaml.safe_load(header)["library_name"] == "adatok"
    table = (tiny_run / "evaluation/table.md").read_text().splitlines()
    assert all(line in body for line in table if line.startswith("|"))
    (protocol,) = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(protocol.*?)```", body, re.DOTALL)]
    metrics = json.loads((tiny_run / "evaluation/metrics.json").read_text())
    measured = metrics["rate_distortion"]["protocol"]
    measured.pop("weights")
    assert protocol == {"protocol": measured, "definitions": metrics["definitions"]}
    for fact in (digest, "6 steps of 4 images", "averaged weights", "16x16 pixels", "up to 16 an image, each 16 floats",
                 "| licence | Apache-2.0 |", "photographs inside scikit-image"):  # fmt: skip
        assert fact in body
    parameters = sum(parameter.numel() for parameter in framework.load(tiny_run).parameters())
    assert f"| parameters | {parameters:,} |" in body
    # The three lines under the imports work where the folder is.
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        found: dict[str, Any] = {}
        exec(code, found)  # noqa: S102 - what a reader would copy
    finally:
        os.chdir(here)
    assert found["rebuilt"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("key", "other"), [("step", 5), ("weights", "model"), ("seed", 1)])
def test_numbers_of_other_weights_are_not_told(key: str, other: object, tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    metrics["rate_distortion"]["protocol"]["weights"][key] = other
    (run / "evaluation/metrics.json").write_text(json.dumps(metrics))
    export(run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "Not measured at these weights" in card and "MSE" not in card


def test_a_damaged_evaluation_is_none(tmp_path: Path, quick_report: None) -> None:
    train_tiny(tmp_path / "run", "train.max_steps=2")
    for number, text in enumerate(["{", "[]", '{"a": {"protocol": 3}}', '{"a": {"protocol": {"weights": [1]}}}']):
        (tmp_path / "run/evaluation/metrics.json").write_text(text)
        export(tmp_path / "run", tmp_path / f"out{number}")
        assert "Not measured at these weights" in (tmp_path / f"out{number}/README.md").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("source: /home/me/photos, 3", "source: photos, 3"),
        ("'/data/imagenet/train'", "'train'"),
        ("Fashion-MNIST in /usr/share/datasets/fashion-mnist", "Fashion-MNIST in fashion-mnist"),
        ("https://me:secret@host/shards/a", "https://host/shards/a"),
        ("1/2 of runs/x and a/b/c, and/or", "1/2 of runs/x and a/b/c, and/or"),
    ],
)
def test_folders_of_this_machine_are_not_told(text: str, told: str) -> None:
    assert _without_folders(text) == told


def test_a_part_at_two_places_is_stored_once(tmp_path: Path) -> None:
    tokenizer = {**TREE["tokenizer"], "input_space": SPACE}
    tokenizer["encoder"] = {**tokenizer["encoder"], "patch_size": 2}
    model = exported(tmp_path / "out", {**TREE, "tokenizer": tokenizer})
    state, stored = model.state_dict(), load_file(tmp_path / "out/model.safetensors")
    assert any(name.startswith("output_space.") for name in state)
    assert {name for name in state if not name.startswith("output_space.")} == stored.keys()
    loaded = framework.load(tmp_path / "out")
    assert_same_uses(uses(loaded), uses(model))
    assert loaded.get_submodule("input_space") is loaded.get_submodule("output_space")


# Writing


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_not_touched(kind: str, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="out exists: an export goes into a new folder"):
        export(tiny_run, out)
    assert list(tmp_path.iterdir()) == [out] and (not out.is_dir() or not list(out.iterdir()))


@pytest.mark.parametrize("write", range(1, 5))
def test_a_full_disk_leaves_nothing(write: int, tiny_run: Path, tmp_path: Path) -> None:
    writes, original = iter(range(1, 10)), files._write

    def full(file: Any, content: bytes) -> None:
        if next(writes) == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(OSError, match="No space left on device"):
            export(tiny_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_has_left_is_replaced(tiny_run: Path, tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"torn")
    (left / "other").write_bytes(b"")
    export(tiny_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_model_that_cannot_stand_alone_is_refused(
    tiny_run: Path, tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainAllocation, "validate", lambda task, batches: {})
    scores = tmp_path / "scores.csv"
    scores.write_text("key,score\na,1\n")
    lookup = f"task.policy={{name: ComplexityLookup, edges: [1.5], budgets: [2, 16], table: {scores}}}"
    config = tiny_policy_config(tmp_path / "run", tiny_run, lookup, "task.objective=null", "train.max_steps=1")
    runs.train(config, lambda text: None)
    with pytest.raises(RunError, match="the model reads the file .*scores.csv: an exported model has no files"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RunError, match="keeps no best checkpoint"):
        export(tiny_run, tmp_path / "out", "best")
    with pytest.raises(RunError, match="nowhere holds no run"):
        export(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_with_a_model_of_another_kind_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(experiment: Experiment, *given: object) -> dict[str, object]:
        monkeypatch.setattr(type(experiment.task), "model", nn.Linear(1, 1))
        return {"step": 1, "weights": "model", "seed": 0}

    monkeypatch.setattr("framework.models.export.restore", other)
    with pytest.raises(RunError, match="autoencoders are exported, and this run trains Linear"):
        export(tiny_run, tmp_path / "out")


def test_a_generator_comes_with_its_tokenizer(
    generator_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert run_tool(monkeypatch, "convert", "export", generator_run, out, "--license", "MIT") == 0
    ours, theirs = framework.load(out), framework.load(generator_run)
    assert isinstance(ours, ImageGenerator) and isinstance(theirs, ImageGenerator)
    assert ours.generator.space == theirs.generator.space
    labels = torch.arange(6)
    tokens, same = (model.generate(labels, seed=1) for model in (ours, theirs))
    assert torch.equal(tokens.latents, same.latents) and torch.equal(tokens.lengths, same.lengths)
    assert torch.equal(ours.decode(tokens), theirs.decode(same))
    card = (out / "README.md").read_text()
    assert f"| model | {type(ours.generator).__name__} |" in card and "| makes | of 10 classes, in " in card
    assert "model.decode(model.generate(torch.arange(8), seed=0))" in card
    assert "### On validation images" in card and "| samples, guidance 1 |" in card and "length_kl" in card

    pixels = []
    for source in (out, generator_run):
        folder = tmp_path / f"samples of {source.name}"
        assert run_tool(monkeypatch, "generate", "--run", source, "--num", 3, "--out", folder) == 0
        pixels.append(np.load(folder / "samples.npz")["arr_0"])
    assert (pixels[0] == pixels[1]).all()
    assert json.loads((tmp_path / "samples of made/record.json").read_text())["run"]["exported"] == str(out)
    exported(tmp_path / "tokenizer", TREE)
    assert run_tool(monkeypatch, "generate", "--run", tmp_path / "tokenizer", "--out", tmp_path / "none") == 2
    assert "is no exported generator: its model is Tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [{"num_classes": 3}, {"budgets": [2]}, {"generator": {"name": "DiT", "size": "S"}}])
def test_parts_of_a_generator_that_is_not_whole(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a generator comes with its num_classes and budgets"):
        build(Config(TREE | extra, {(): Source("a test")}), Exported, lambda module, source, path: None)


# As the source of weights


def test_weights_of_parts_come_from_an_exported_folder(tiny_policy: Path, tiny_run: Path, tmp_path: Path) -> None:
    export(tiny_policy, tmp_path / "adaptive")
    tokenizer = framework.load(tiny_run).state_dict()
    whole = model_of(tmp_path, f"tokenizer.weights={tmp_path / 'adaptive'}").state_dict()
    assert whole.keys() == tokenizer.keys() and all(torch.equal(whole[name], tokenizer[name]) for name in whole)
    encoder = model_of(tmp_path, f"tokenizer.encoder.weights={tmp_path / 'adaptive'}").get_submodule("encoder")
    assert all(torch.equal(value, tokenizer[f"encoder.{name}"]) for name, value in encoder.state_dict().items())

    own = f"{{name: LearnedPolicy, weights: {tmp_path / 'adaptive'}}}"
    config = tiny_policy_config(tmp_path / "run", tmp_path / "adaptive", f"task.policy={own}")
    adaptive = runs.experiment_from(config).task.model
    expected = framework.load(tiny_policy).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in adaptive.state_dict().items())

    with pytest.raises(RunError, match="the exported model .*adaptive has no such part to take weights from"):
        model_of(tmp_path, f"task.losses.other={{name: PixelLoss, weights: {tmp_path / 'adaptive'}}}")
    with pytest.raises(CheckpointError, match="do not fit SuffixTokenViT"):
        model_of(tmp_path, f"tokenizer.encoder.weights={tmp_path / 'adaptive'}", "tokenizer.encoder.width=64")


def test_an_exported_autoencoder_becomes_an_input_space(tmp_path: Path) -> None:
    space = exported(tmp_path / "vae", {"space": {**SPACE, "resolution": 16}})
    node = f"{{name: AutoencoderKL, {SHAPE}, weights: {tmp_path / 'vae'}, frozen: true}}"
    taken = model_of(tmp_path, f"tokenizer.input_space={node}", "tokenizer.encoder.patch_size=2")
    assert weights_digest(taken.get_submodule("input_space").state_dict()) == weights_digest(space.state_dict())


# Code


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with a quantizer, which says when it is imported; forgotten afterwards."""
    monkeypatch.setattr(QUANTIZERS, "_obj_map", dict(QUANTIZERS._obj_map))
    monkeypatch.syspath_prepend(tmp_path)
    proof = tmp_path / "imported"
    (tmp_path / "my_quantizers.py").write_text(f"{MODULE}\nPath({str(proof)!r}).touch()\n")
    importlib.invalidate_caches()
    yield "my_quantizers"
    sys.modules.pop("my_quantizers", None)


def test_code_is_imported_only_where_it_is_trusted(own_module: str, tmp_path: Path, quick_report: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QUANTIZERS, "_obj_map", dict(QUANTIZERS._obj_map))
        train_tiny(tmp_path / "run", f"imports=[{own_module}]", "tokenizer.quantizer.name=OfMyOwn")
        export(tmp_path / "run", tmp_path / "out")
        expected = uses(framework.load(tmp_path / "run"))
    sys.modules.pop(own_module)
    (tmp_path / "imported").unlink()

    message = rf"out asks for code: importing {own_module} .* pass trust_code=True"
    with pytest.raises(RunError, match=message):
        framework.load(tmp_path / "out")
    with pytest.raises(RunError, match=message):
        model_of(tmp_path, f"tokenizer.encoder.weights={tmp_path / 'out'}")
    assert own_module not in sys.modules and not (tmp_path / "imported").exists()

    assert_same_uses(uses(framework.load(tmp_path / "out", trust_code=True)), expected)
    with pytest.raises(RunError, match=message):  # once more, whoever has imported it meanwhile
        framework.load(tmp_path / "out")
    # A configuration that imports the module itself trusts it.
    own = [f"imports=[{own_module}]", "tokenizer.quantizer.name=OfMyOwn", f"tokenizer.weights={tmp_path / 'out'}"]
    assert_same_uses(uses(model_of(tmp_path, *own)), expected)


def test_code_that_the_model_does_not_need_is_left_out(own_module: str, tmp_path: Path, quick_report: None) -> None:
    train_tiny(tmp_path / "run", f"imports=[{own_module}]", "train.max_steps=2")
    export(tmp_path / "run", tmp_path / "out")
    assert "imports" not in (tmp_path / "out/config.yaml").read_text()
    framework.load(tmp_path / "out")


# Other words


def test_what_an_exported_folder_does_not_do_is_said(tmp_path: Path) -> None:
    exported(tmp_path / "out", TREE)
    assert is_exported(tmp_path / "out")
    for options in ({"weights": "model"}, {"checkpoint": "best"}):
        with pytest.raises(RunError, match="has one set of weights"):
            framework.load(tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="is an exported model, which comes without data and losses: name a run"):
        runs.evaluate(tmp_path / "out", lambda text: None)


def test_the_tool_exports(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_tool(monkeypatch, "convert", "export", tiny_run, out, "--license", "Apache-2.0") == 0
    digest = weights_digest(framework.load(out).state_dict())
    assert capsys.readouterr().out.startswith(f"wrote {out}, weights with SHA-256 {digest}; it loads with framework.lo")
    assert run_tool(monkeypatch, "convert", "export", tiny_run, out) == 2
    assert capsys.readouterr().err.startswith(f"{out} exists: an export goes into a new folder")
    assert run_tool(monkeypatch, "convert", "export", tiny_run, tmp_path / "best", "--checkpoint", "best") == 2
    assert "keeps no best checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]
