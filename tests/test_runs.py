from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import framework
from framework import runs
from framework.config import ConfigError, dump_yaml, load_config, resolve
from framework.data.interface import Batch
from framework.engine.checkpoint import CheckpointError, latest_checkpoint
from framework.engine.experiment import Experiment
from framework.tasks.interface import Context, StepOutput, Task
from framework.tasks.train_tokenizer import TrainTokenizer
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import files_of, tiny_config, train_tiny


def weights_of(run: Path, name: str) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.weights(name)


def prefixed(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 0
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, task_class: type[Task] = TrainTokenizer) -> None:
    """Press Ctrl-C in the middle of a training step."""
    forward, presses = task_class.forward, iter([True])

    def interrupted(task: Task, batch: Batch, turn: str, context: Context) -> StepOutput:
        if context.step == step and next(presses, False):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(task, batch, turn, context)

    monkeypatch.setattr(task_class, "forward", interrupted)


def stopped_run(folder: Path, *overrides: str, after: int = 3) -> str:
    """A run that Ctrl-C stopped; returns what was said."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, after - 1)
        outcome, said = train_tiny(folder, *overrides)
    assert outcome == ("stopped", after)
    return said


# What a run leaves


def test_what_a_finished_run_leaves(tiny_run: Path) -> None:
    left = set(files_of(tiny_run))
    assert left == {
        "config.yaml",
        "run.json",
        "run.lock",
        "metrics.jsonl",
        "timing.jsonl",
        "log.txt",
        *(f"checkpoints/step_00000006/{name}.safetensors" for name in ("model", "ema")),
        "checkpoints/step_00000006/trainer.pt",
        "checkpoints/step_00000006/manifest.json",
        *(f"evaluation/{name}" for name in ("metrics.json", "per_image.csv", "table.md")),
        *(f"evaluation/{name}.png" for name in ("rate_distortion", "reconstructions", "photograph")),
    }
    steps = [json.loads(line)["step"] for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4, 6, 6]  # log lines and validations

    metrics = json.loads((tiny_run / "evaluation/metrics.json").read_text())
    protocol = metrics["rate_distortion"]["protocol"]
    assert protocol["weights"] == {"run": str(tiny_run), "step": 6, "weights": "ema", "seed": 0}
    assert protocol["data"]["split"] == "validation" and protocol["images"] == 40
    per_length = [row["length"] for row in metrics["rate_distortion"]["per_length"]]
    assert per_length == [1, 2, 4, 8, 12, 16]
    rows = list(csv.DictReader((tiny_run / "evaluation/per_image.csv").open()))
    columns = {f"{metric}@{length}" for metric in ("mse", "ssim") for length in per_length}
    assert len(rows) == 40 and set(rows[0]) == {"key", "group"} | columns
    for name in ("rate_distortion", "reconstructions", "photograph"):
        assert (tiny_run / f"evaluation/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_run_json_tells_each_start(tmp_path: Path, quick_report: None) -> None:
    folder = tmp_path / "run"
    stopped_run(folder)
    train_tiny(folder)
    first, second = json.loads((folder / "run.json").read_text())["sessions"]
    assert (first["outcome"], first["step"]) == ("stopped", 3)
    assert (second["outcome"], second["step"]) == ("finished", 6)
    assert torch.__version__.startswith(second["versions"]["torch"])
    assert second["threads"] == torch.get_num_threads() and second["started"] <= second["ended"]
    assert isinstance(second["command"], list) and second["python"].startswith("3.") and second["host"]


def test_config_yaml_is_whole_and_loads_as_itself(tiny_run: Path) -> None:
    text = (tiny_run / "config.yaml").read_text()
    config = load_config(tiny_run / "config.yaml")
    assert dump_yaml(resolve(config, Experiment)) == text
    tree = yaml.safe_load(text)
    assert tree["train"]["keep_last"] == 2 and tree["tokenizer"]["masking"]["full_share"] == 0.0  # defaults, written
    assert tree["tokenizer"]["encoder"]["width"] == 32


# The same command again


def test_the_same_command_again_prints_the_results_and_trains_nothing(tiny_run: Path) -> None:
    before = files_of(tiny_run)
    times = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    outcome, said = train_tiny(tiny_run)
    assert outcome == ("finished", 6)
    assert f"{tiny_run} is finished: 6 steps" in said and "--fresh" in said
    assert (tiny_run / "evaluation/table.md").read_text().strip() in said
    assert f"{tiny_run}/evaluation/photograph.png" in said
    assert files_of(tiny_run) == before
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == times


def test_a_stopped_run_ends_like_one_that_was_not(tiny_run: Path, tmp_path: Path, quick_report: None) -> None:
    folder = tmp_path / "run"
    said = stopped_run(folder)  # between two log lines, checkpoints and validations
    assert said == "stopped and saved at step 3 of 6; the same command continues"
    assert not (folder / "evaluation").exists()
    torch.manual_seed(99)  # nothing may hang on torch's own generator
    assert train_tiny(folder)[0] == ("finished", 6)
    whole, parts = files_of(tiny_run), files_of(folder)
    for name in ("model.safetensors", "ema.safetensors"):
        assert whole[f"checkpoints/step_00000006/{name}"] == parts[f"checkpoints/step_00000006/{name}"]
    assert whole["metrics.jsonl"] == parts["metrics.jsonl"]
    assert whole["timing.jsonl"] != parts["timing.jsonl"]


@pytest.mark.parametrize(
    "quantizer", ["VectorQuantizer, num_codes: 16, dim: 4, warmup_steps: 4", "FiniteScalarQuantizer, levels: [4, 3]"]
)
def test_what_is_learned_between_steps_goes_on(quantizer: str, tmp_path: Path, quick_report: None) -> None:
    options = [f"tokenizer.quantizer={{name: {quantizer}}}", "tokenizer.decoder.lora={ranges: 2, rank: 2}"]
    stopped_run(tmp_path / "parts", *options)
    for folder in ("parts", "whole"):
        assert train_tiny(tmp_path / folder, *options)[0] == ("finished", 6)
    whole, parts = (files_of(tmp_path / folder) for folder in ("whole", "parts"))
    names = [f"checkpoints/step_00000006/{name}.safetensors" for name in ("model", "ema")] + ["metrics.jsonl"]
    assert [name for name in names if whole[name] != parts[name]] == []
    steps = load_file(tmp_path / "parts" / names[0])["tokenizer.quantizer.usage.steps"].item()
    assert steps == (2 if "Vector" in quantizer else 6)  # codes are not counted before they are placed


def test_evaluating_a_stopped_run_does_not_finish_it(tmp_path: Path, quick_report: None) -> None:
    stopped_run(tmp_path / "run")
    runs.evaluate(tmp_path / "run", lambda text: None)
    assert (tmp_path / "run/evaluation_validation/metrics.json").exists()
    outcome, said = train_tiny(tmp_path / "run")
    assert outcome == ("finished", 6) and "is finished" not in said
    assert json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["weights"]["step"] == 6


def test_an_interrupted_evaluation_is_made_up_for(
    tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(task: TrainTokenizer, *arguments: object) -> None:
        (tmp_path / "run/evaluation").mkdir()
        (tmp_path / "run/evaluation/metrics.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainTokenizer, "report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "run")
    before = files_of(tmp_path / "run/checkpoints")
    outcome, said = train_tiny(tmp_path / "run")
    assert outcome == ("finished", 6) and "| a table |" in said
    assert files_of(tmp_path / "run/checkpoints") == before


def test_another_configuration_is_refused_with_a_diff(tiny_run: Path) -> None:
    before = files_of(tiny_run)
    with pytest.raises(runs.RunError) as caught:
        train_tiny(tiny_run, "train.ema_decay=0.5")
    lines = str(caught.value).splitlines()
    assert f"{tiny_run} holds a run of another configuration" in lines[0] and "--fresh" in lines[0]
    assert [line.strip() for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")] == [
        "-  ema_decay: 0.999",
        "+  ema_decay: 0.5",
    ]
    assert files_of(tiny_run) == before


def test_fresh_moves_the_old_run_aside(tmp_path: Path, quick_report: None) -> None:
    folder = tmp_path / "run"
    stopped_run(folder)
    before = files_of(folder)
    outcome, said = train_tiny(folder, "run.seed=1", fresh=True)
    assert outcome == ("finished", 6)
    (aside,) = [path for path in tmp_path.iterdir() if path != folder]
    assert f"moved the older run to {aside}" in said
    assert files_of(aside) == before
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["seed"] == 1
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 1


WRONG = {
    "an unknown key": ("train.batchsize=3", ConfigError, "did you mean 'batch_size'"),
    "parts that do not fit": ("tokenizer.encoder.patch_size=5", ConfigError, "patch_size must divide the input grid"),
    "an optimizer of no turn": ("train.turn_optimizers={critic: {name: AdamW, lr: 1}}", runs.RunError, "critic"),
    "nothing to train": ("tokenizer.frozen=true", runs.RunError, "trains nothing"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_wrong_configuration_leaves_the_directory_alone(tmp_path: Path, case: str, fresh: bool) -> None:
    # So that the corrected command is not refused as "another configuration", and no run is moved aside for nothing.
    override, error, message = WRONG[case]
    folder = tmp_path / "run"
    if fresh:
        folder.mkdir()
        (folder / "config.yaml").write_text("run: {dir: the older run}\n")
    before = files_of(tmp_path)
    with pytest.raises(error, match=message):
        train_tiny(folder, override, fresh=fresh)
    assert files_of(tmp_path) == before and folder.exists() == fresh


# Weights


def test_load_gives_averaged_weights_unless_asked_otherwise(tiny_run: Path) -> None:
    averaged, raw = framework.load(tiny_run), framework.load(str(tiny_run), weights="model")
    assert_equal(averaged.state_dict(), weights_of(tiny_run, "ema"))
    assert_equal(prefixed("tokenizer", raw), weights_of(tiny_run, "model"))
    assert not torch.equal(averaged.state_dict()["encoder.latent_tokens"], raw.state_dict()["encoder.latent_tokens"])
    for tokenizer in (averaged, raw):
        assert isinstance(tokenizer, Tokenizer)
        assert not any(module.training for module in tokenizer.modules())
        images = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            rebuilt = tokenizer.decode(tokenizer.encode(images, length=[4, 16]))
        assert rebuilt.shape == images.shape and 0 <= rebuilt.min() and rebuilt.max() <= 1 and rebuilt.std() > 0


def test_a_run_without_averages_gives_its_last_weights(tmp_path: Path, quick_report: None) -> None:
    train_tiny(tmp_path / "run", "train.ema_decay=null", "train.max_steps=2")
    loaded = framework.load(tmp_path / "run")
    assert_equal(prefixed("tokenizer", loaded), weights_of(tmp_path / "run", "model"))
    with pytest.raises(CheckpointError, match="holds no weights named ema, only model"):
        framework.load(tmp_path / "run", weights="ema")


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, tiny_run: Path) -> None:
    with pytest.raises(runs.RunError) as caught:
        framework.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no run: it has no config.yaml. Train it first, or check the path"
    (tmp_path / "config.yaml").write_bytes((tiny_run / "config.yaml").read_bytes())
    with pytest.raises(runs.RunError) as caught:
        framework.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} has no checkpoint yet: its training has not come that far"


def model_of(*overrides: str) -> nn.Module:
    return runs.experiment_from(tiny_config(Path("nowhere"), *overrides)).task.model


def test_initial_weights_hang_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = model_of().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert_equal(first, model_of("train.max_steps=9", "train.optimizer={name: AdamW, lr: 1}").state_dict())
    other = model_of("run.seed=1").state_dict()
    assert not torch.equal(first["encoder.latent_tokens"], other["encoder.latent_tokens"])


def test_threads_are_set_for_training_and_evaluating_only(
    tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    train_tiny(tmp_path / "run", "run.threads=3", "train.max_steps=2")
    assert asked == [3]
    runs.evaluate(tmp_path / "run", lambda text: None)
    assert asked == [3, 3]
    # Neither the caller of load nor a run that starts from these weights takes over their thread count.
    framework.load(tmp_path / "run")
    train_tiny(tmp_path / "other", "train.max_steps=2", f"tokenizer.encoder.weights={tmp_path / 'run'}")
    assert asked == [3, 3]


def encoder_weights(run: Path) -> dict[str, Tensor]:
    found = weights_of(run, "ema").items()
    return {name.removeprefix("encoder."): value for name, value in found if name.startswith("encoder.")}


def test_weights_of_a_part_come_from_a_run(tiny_run: Path) -> None:
    initial = model_of().state_dict()
    model = model_of(f"tokenizer.encoder.weights={tiny_run}")
    assert_equal(model.get_submodule("encoder").state_dict(), encoder_weights(tiny_run))
    assert torch.equal(model.state_dict()["decoder.mask_token"], initial["decoder.mask_token"])
    whole = model_of(f"tokenizer.weights={tiny_run}")
    assert_equal(whole.state_dict(), weights_of(tiny_run, "ema"))


def test_weights_of_a_part_come_from_a_file(tmp_path: Path, tiny_run: Path) -> None:
    save_file(encoder_weights(tiny_run), tmp_path / "encoder.safetensors")
    model = model_of(f"tokenizer.encoder.weights={tmp_path}/encoder.safetensors")
    assert_equal(model.get_submodule("encoder").state_dict(), encoder_weights(tiny_run))
    with pytest.raises(runs.RunError, match=r"^tokenizer.encoder: there is no file .*/other.safetensors"):
        model_of(f"tokenizer.encoder.weights={tmp_path}/other.safetensors")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, tiny_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"do not fit SuffixTokenViT; \d+ of another shape: .*\(16, 32\) in"):
        model_of(f"tokenizer.encoder.weights={tiny_run}", "tokenizer.encoder.width=64")
    with pytest.raises(CheckpointError, match="missing: transformer.blocks.1"):
        model_of(f"tokenizer.encoder.weights={tiny_run}", "tokenizer.encoder.depth=2")
    with pytest.raises(runs.RunError, match="holds no run: it has no config.yaml"):
        model_of(f"tokenizer.encoder.weights={tmp_path}")
    with pytest.raises(runs.RunError, match="task.losses.other: the run .* has no such part to take weights from"):
        model_of(f"task.losses.other={{name: PixelLoss, weights: {tiny_run}}}")


def test_a_frozen_part_is_not_trained_and_not_stored_and_comes_back(
    tmp_path: Path, tiny_run: Path, quick_report: None
) -> None:
    frozen = [f"tokenizer.encoder.weights={tiny_run}", "tokenizer.encoder.frozen=true"]
    folder = tmp_path / "run"
    stopped_run(folder, *frozen)
    assert train_tiny(folder, *frozen)[0] == ("finished", 6)
    for name in ("model", "ema"):
        stored = load_file(folder / f"checkpoints/step_00000006/{name}.safetensors")
        assert stored and not [key for key in stored if "encoder." in key]
    manifest = json.loads((folder / "checkpoints/step_00000006/manifest.json").read_text())
    assert list(manifest["body"]["frozen"]) == ["tokenizer.encoder"]

    for loaded in (framework.load(folder, weights="ema"), framework.load(folder, weights="model")):
        assert_equal(loaded.get_submodule("encoder").state_dict(), encoder_weights(tiny_run))
        assert not any(parameter.requires_grad for parameter in loaded.get_submodule("encoder").parameters())
    start = model_of(*frozen).state_dict()["decoder.mask_token"]
    assert not torch.equal(framework.load(folder).state_dict()["decoder.mask_token"], start)

    # Its parts, the frozen one too, may start others.
    assert_equal(
        model_of(f"tokenizer.encoder.weights={folder}").get_submodule("encoder").state_dict(), encoder_weights(tiny_run)
    )
    assert_equal(model_of(f"tokenizer.weights={folder}").state_dict(), framework.load(folder).state_dict())
    both = model_of(f"tokenizer.weights={folder}", "tokenizer.encoder.frozen=true").state_dict()
    assert_equal(both, framework.load(folder).state_dict() | prefixed("encoder", model_of().get_submodule("encoder")))


def test_a_frozen_part_whose_source_changed_is_refused(tmp_path: Path, tiny_run: Path, quick_report: None) -> None:
    file = tmp_path / "encoder.safetensors"
    save_file(encoder_weights(tiny_run), file)
    frozen = [f"tokenizer.encoder.weights={file}", "tokenizer.encoder.frozen=true"]
    train_tiny(tmp_path / "run", *frozen, "train.max_steps=2")
    save_file({name: value + 1 for name, value in encoder_weights(tiny_run).items()}, file)
    with pytest.raises(CheckpointError, match="other weights in the frozen part 'tokenizer.encoder'"):
        framework.load(tmp_path / "run")


def test_a_part_frozen_at_its_initial_weights_comes_back(tmp_path: Path, quick_report: None) -> None:
    train_tiny(tmp_path / "run", "tokenizer.decoder.frozen=true", "train.max_steps=2")
    loaded = framework.load(tmp_path / "run").get_submodule("decoder")
    assert_equal(loaded.state_dict(), model_of().get_submodule("decoder").state_dict())


# Evaluating and finding


@pytest.mark.parametrize(("split", "place"), [("validation", "evaluation_validation"), ("test", "evaluation_test")])
def test_evaluate_asks_for_what_it_was_told(tmp_path: Path, quick_report: None, split: str, place: str) -> None:
    folder = tmp_path / "run"
    train_tiny(folder, "train.max_steps=2")
    said: list[str] = []
    out = runs.evaluate(folder, said.append, split, lengths=[2, 4], limit=7)  # type: ignore[arg-type]
    assert out == folder / place and str(out / "metrics.json") in said[-1]
    asked = json.loads((out / "metrics.json").read_text())
    assert (asked["split"], asked["lengths"], asked["limit"]) == (split, [2, 4], 7)
    assert asked["weights"] == {"run": str(folder), "step": 2, "weights": "ema", "seed": 0}


def test_a_configuration_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed = runs.find_config("projects/adatok/ntm.yaml")
    assert installed.is_absolute() and installed.is_file()
    Path("projects/adatok").mkdir(parents=True)
    Path("projects/adatok/ntm.yaml").write_text("{}")
    assert runs.find_config("projects/adatok/ntm.yaml") == Path("projects/adatok/ntm.yaml")
    with pytest.raises(FileNotFoundError) as caught:
        runs.find_config("projects/adatok/nmt.yaml")
    assert str(caught.value).startswith("there is no configuration projects/adatok/nmt.yaml; projects/adatok holds")
    assert "ntm.yaml" in str(caught.value)
