"""Runs: start or continue one from a configuration, evaluate it, and load what it has trained.

A run directory holds ``config.yaml`` (every default written), ``run.json`` (command, versions, commit, host), metrics,
``checkpoints/`` and ``evaluation/``.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn

import framework.components  # noqa: F401 - registers every part
from framework.config import Config, build, dump_yaml, load_config, resolve
from framework.engine.checkpoint import Checkpoint, latest_checkpoint, load_weights
from framework.engine.experiment import Experiment
from framework.engine.frozen import frozen_digests, live_state
from framework.engine.plan import plan
from framework.engine.trainer import Outcome
from framework.evaluation.report import compare_tokenizers
from framework.runtime.files import write_text
from framework.runtime.progress import Stages
from framework.tasks.interface import Report
from framework.tokenizers.tokenizer import Tokenizer

Weights = Literal["ema", "model"]
Split = Literal["train", "validation", "test"]


class RunError(Exception):
    """A run cannot go on; the text says why, and what to do."""


def find_config(path: str) -> Path:
    """A configuration by its path: from here, or else from where the framework is installed.

    Raises:
        RunError: if neither place has it; the text lists what is near.
    """
    installed = Path(__file__).parents[1] / path
    for candidate in (Path(path), installed):
        if candidate.is_file():
            return candidate
    folder = Path(path).parent if Path(path).parent.is_dir() else installed.parent
    there = sorted(str(file) for file in folder.glob("*.yaml"))
    raise RunError(f"there is no configuration {path}" + (f"; {folder} holds {', '.join(there)}" if there else ""))


def experiment_from(config: Config, device: str = "cpu") -> Experiment:
    """Build a run's parts, with initial weights that depend on the run's seed alone.

    On the ``meta`` device nothing is allocated and no weights are read: enough to count and to catch shapes.
    """
    seed = resolve(config, Experiment)["run"]["seed"]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        return build(config, Experiment, load_weights=_skip if device == "meta" else load_part)


def dry_run(config: Config) -> str:
    """The plan of a run, from parts built without memory for weights.

    Raises:
        ConfigError: if the configuration is wrong, or parts do not fit each other.
        RunError: if the optimizers do not fit what is trained.
    """
    experiment = experiment_from(config, device="meta")
    try:
        return plan(experiment)
    except ValueError as error:
        raise RunError(str(error)) from error


def train(config: Config, say: Callable[[str], None], fresh: bool = False) -> Outcome:
    """Train as the configuration says, from the start or from where the same run stopped, and evaluate the result.

    Args:
        config: checked here, and its parts built, before anything is written.
        say: told where things are.
        fresh: move an older run of that directory aside instead of continuing it.

    Raises:
        ConfigError: if the configuration is wrong.
        RunError: if the directory holds a run of another configuration, or the optimizers do not fit what is trained.
    """
    text = dump_yaml(resolve(config, Experiment))
    folder = Path(config.tree["run"]["dir"])
    if not fresh:
        _refuse_another(folder, text)
        if _is_finished(folder):
            step = _checkpoint(folder).step
            say(f"{folder} is finished: {step} steps. Train longer or anew in another run.dir, or with --fresh.")
            _say_results(folder / "evaluation", say)
            return Outcome("finished", step)
    experiment = experiment_from(config)
    _use_threads(experiment)
    try:
        trainer = experiment.trainer
    except ValueError as error:
        raise RunError(str(error)) from error
    if fresh and folder.exists():
        say(f"moved the older run to {_move_aside(folder)}")
    write_text(folder / "config.yaml", text)
    sessions = [*_sessions(folder), _session()]
    _record(folder, sessions)
    outcome = trainer.fit()
    if outcome.status == "stopped":
        say(f"stopped and saved at step {outcome.step} of {experiment.train.max_steps}; the same command continues")
    else:
        _evaluate(experiment, folder, "validation", folder / "evaluation", say)
    sessions[-1] |= {"ended": _now(), "outcome": outcome.status, "step": outcome.step}
    _record(folder, sessions)
    return outcome


def evaluate(
    folder: Path,
    say: Callable[[str], None],
    split: Split = "validation",
    out: Path | None = None,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
) -> Path:
    """Evaluate a run's averaged weights on a split of its data; returns the folder of the results.

    Args:
        folder: the run directory.
        say: told where things are.
        split: which images.
        out: where results go; ``evaluation_SPLIT`` of the run unless given, beside its own ``evaluation``.
        lengths: kept tokens to measure; a spread of them unless given.
        limit: measure a fixed random subset of so many images.
    """
    experiment = experiment_from(_config(folder))
    _use_threads(experiment)
    out = out or folder / f"evaluation_{split}"
    _evaluate(experiment, folder, split, out, say, lengths, limit)
    return out


def compare(
    folders: Sequence[Path],
    say: Callable[[str], None],
    out: Path,
    split: Split = "validation",
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
) -> None:
    """Measure several runs' tokenizers on the images of the first run; leave one table and one plot in ``out``.

    Args:
        folders: run directories.
        say: told where things are.
        out: where results go.
        split: which images.
        lengths: kept tokens to measure; a spread of them unless given.
        limit: measure a fixed random subset of so many images.

    Raises:
        RunError: if a run has trained something else than a tokenizer.
    """
    experiments = {folder: experiment_from(_config(folder)) for folder in folders}
    tokenizers = {}
    for folder, experiment in experiments.items():
        _restore(experiment, folder, None)
        model = experiment.task.model.eval()
        if not isinstance(model, Tokenizer):
            raise RunError(f"{folder} has trained a {type(model).__name__}; only tokenizers are compared")
        tokenizers[str(folder)] = model.to(experiment.run.torch_device())
    first = experiments[folders[0]]
    _use_threads(first)
    with torch.no_grad(), Stages() as progress:
        compare_tokenizers(tokenizers, getattr(first.data, split), out, first.data.train, lengths, limit, progress)
    say((out / "comparison.md").read_text().strip())
    say(f"results: {out / 'comparison.md'} {out / 'comparison.png'}")


def load(path: str | Path, weights: Weights | None = None) -> nn.Module:
    """The model that a run has trained, in eval mode on the CPU.

    Args:
        path: a run directory.
        weights: ``ema`` for averaged weights, ``model`` for those of the last step; unless given, averaged ones where
            there are some.

    Raises:
        RunError: if the directory holds no run or no checkpoint yet.
        CheckpointError: if the weights do not fit the configuration.
    """
    folder = Path(path)
    experiment = experiment_from(_config(folder))
    _restore(experiment, folder, weights)
    return experiment.task.model.eval()


def load_part(module: nn.Module, source: str, path: str) -> None:
    """Load a part's weights, strictly, for a node ``weights: source`` at the dotted ``path`` of a configuration.

    Args:
        module: the part.
        source: a run directory, whose part of the same path is taken with averaged weights where there are some, or a
            ``.safetensors`` file with the names of the part's own state.
        path: such as ``tokenizer.encoder``.

    Raises:
        RunError: if the source is neither.
        CheckpointError: if names or shapes differ.
    """
    if source.endswith(".safetensors"):
        if not Path(source).is_file():
            raise RunError(f"{path}: there is no file {source} to take weights from")
        load_weights(module, load_file(source), source)
        return
    donor = experiment_from(_config(Path(source)))
    _restore(donor, Path(source), None)
    try:
        part = donor.task.get_submodule(path)
    except AttributeError:
        raise RunError(f"{path}: the run {source} has no such part to take weights from") from None
    # All of the donor's part, what is frozen there too; but what is frozen inside this one has its own source.
    kept = module.state_dict().keys() - live_state(module).keys()
    weights = {name: value for name, value in part.state_dict().items() if name not in kept}
    load_weights(module, weights, f"{source}, {path}")


def _skip(module: nn.Module, source: str, path: str) -> None:
    """On the meta device there is nothing to load into."""


def _config(folder: Path) -> Config:
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunError(f"{folder} holds no run: it has no config.yaml. Train it first, or check the path")
    return load_config(file)


def _checkpoint(folder: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise RunError(f"{folder} has no checkpoint yet: its training has not come that far")
    return checkpoint


def _restore(experiment: Experiment, folder: Path, weights: Weights | None) -> dict[str, object]:
    """Load a run's weights into its model and say which they are."""
    checkpoint = _checkpoint(folder)
    model = experiment.task.model
    checkpoint.check_frozen(frozen_digests(experiment.task))
    load_weights(experiment.task, checkpoint.weights("model"), checkpoint.folder)
    chosen = weights or ("model" if experiment.train.ema_decay is None else "ema")
    if chosen == "ema":
        load_weights(model, checkpoint.weights("ema"), checkpoint.folder)
    return {"run": str(folder), "step": checkpoint.step, "weights": chosen, "seed": experiment.run.seed}


def _evaluate(
    experiment: Experiment,
    folder: Path,
    split: Split,
    out: Path,
    say: Callable[[str], None],
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
) -> None:
    record = _restore(experiment, folder, None)
    data = experiment.data
    experiment.task.to(experiment.run.torch_device()).eval()
    with torch.no_grad(), Stages() as progress:
        experiment.task.report(Report(getattr(data, split), data.train, out, record, lengths, limit, progress))
    _say_results(out, say)


def _say_results(folder: Path, say: Callable[[str], None]) -> None:
    say((folder / "table.md").read_text().strip())
    say("results: " + " ".join(sorted(str(path) for path in folder.iterdir())))


def _use_threads(experiment: Experiment) -> None:
    if experiment.run.threads is not None:
        torch.set_num_threads(experiment.run.threads)


def _refuse_another(folder: Path, text: str) -> None:
    """Raise if the directory holds a run of another configuration than ``text``."""
    file = folder / "config.yaml"
    old = file.read_text() if file.exists() else text
    if old != text:
        changes = difflib.unified_diff(
            old.splitlines(), text.splitlines(), f"{file} (what runs there)", "this configuration", lineterm="", n=0
        )
        raise RunError(
            f"{folder} holds a run of another configuration. Choose another run.dir, or start anew with --fresh, which "
            "moves the old run aside:\n" + "\n".join(changes)
        )


def _move_aside(folder: Path) -> Path:
    target = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(target)
    return target


def _is_finished(folder: Path) -> bool:
    """Whether training came to its end and its evaluation, after which nothing is left to do."""
    sessions = _sessions(folder)
    return bool(sessions) and sessions[-1].get("outcome") == "finished" and (folder / "evaluation/table.md").exists()


def _sessions(folder: Path) -> list[dict[str, object]]:
    """The starts of the run that ``run.json`` tells of."""
    file = folder / "run.json"
    return json.loads(file.read_text())["sessions"] if file.exists() else []


def _record(folder: Path, sessions: list[dict[str, object]]) -> None:
    write_text(folder / "run.json", json.dumps({"sessions": sessions}, indent=1) + "\n")


def _session() -> dict[str, object]:
    """What is worth knowing about this start of the run."""
    names = ("torch", "torchvision", "numpy", "einops", "fvcore")
    return {
        "started": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "git": _git_commit(),
        "host": platform.node(),
        "threads": torch.get_num_threads(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _git_commit() -> str | None:
    """The commit of the framework's checkout, with a mark where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
