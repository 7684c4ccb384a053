"""Trained models and their parts, loaded from run directories, exported folders and the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import framework.components  # noqa: F401 - registers every part
from framework.config import Config, build, load_config, resolve
from framework.config.find import config_of_run
from framework.config.yaml import inline
from framework.engine.checkpoint import (
    Best,
    Checkpoint,
    CheckpointError,
    best_checkpoint,
    latest_checkpoint,
    load_weights,
    read_weights,
)
from framework.engine.experiment import Experiment
from framework.engine.frozen import frozen_digests, live_state, remove_unread
from framework.engine.run_directory import RunError
from framework.models.exported import Exported, is_exported, read_exported
from framework.models.hub import find_model
from framework.tasks.interface import Task

Weights = Literal["ema", "model"]
Which = Literal["latest", "best"]
LOSSES, EVALUATION = ("task", "losses"), ("evaluation",)


def experiment_from(config: Config, device: str = "cpu", unread: Sequence[tuple[str, ...]] = ()) -> Experiment:
    """Build a run's parts, with initial weights that depend on the run's seed alone.

    On the ``meta`` device nothing is allocated and no weights are read: enough to count and to catch shapes. Places
    that are ``unread`` are made so, and have no part in what is used.
    """
    seed = resolve(config, Experiment)["run"]["seed"]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        return build(config, Experiment, _skip if device == "meta" else load_part, unread)


def load(
    path: str | Path, weights: Weights | None = None, checkpoint: Which = "latest", trust_code: bool = False
) -> nn.Module:
    """A trained model, in eval mode on the CPU; the run that trains it may still go on.

    Args:
        path: a run directory; a folder that ``tools/convert.py export`` has written; or the id of one in the Hugging
            Face hub, ``owner/name`` or ``owner/name@revision``, where no such folder is here. What the hub's local
            cache holds is used as it is, and only what it lacks is downloaded.
        weights: of a run: ``ema`` for averaged weights, ``model`` for those of the last step; unless given, averaged
            ones where there are some.
        checkpoint: of a run: the latest, or the best as ``train.best`` says.
        trust_code: let an exported folder import the modules that it names. Runs import theirs in any case.

    Raises:
        RunError: if there is no model yet, an exported folder asks for code, or the hub cannot be reached.
        CheckpointError: if files are damaged, or the weights do not fit the configuration.
        ConfigError: if the configuration does not describe a model of this framework.
    """
    folder = find_model(path)
    if is_exported(folder):
        if weights is not None or checkpoint != "latest":
            raise RunError(f"{folder} is an exported model, which has one set of weights: say neither which weights "
                           "nor which checkpoint")  # fmt: skip
        return read_exported(folder, lambda module: trust_code).model
    experiment = experiment_from(run_config(folder), unread=[LOSSES, EVALUATION])
    restore(experiment, folder, weights, checkpoint)
    return experiment.task.model.eval()


def load_part(module: nn.Module, source: str, path: str) -> None:
    """Load a part's weights, strictly, for a node ``weights: source`` at the dotted ``path`` of a configuration.

    Args:
        module: the part.
        source: what ``load`` takes, whose part of the same path is taken, with averaged weights where there are some;
            or a ``.safetensors`` file with the names of the part's own state. Code that an exported folder needs must
            stand in the configuration's own ``imports``.
        path: such as ``tokenizer.encoder``.

    Raises:
        RunError: if the source is neither, or as ``load``.
        CheckpointError: if names or shapes differ, or the file is damaged or of another format.
    """
    if Path(source).is_file():
        load_weights(module, read_weights(Path(source)), source)
        return
    if source.endswith(".safetensors"):
        raise RunError(f"{path}: there is no file {source} to take weights from")
    donor = _donor(find_model(source))
    try:
        part = donor.get_submodule(path.removeprefix("task."))
    except AttributeError:
        part = donor.model  # such as an autoencoder that becomes an input space
        if type(part) is not type(module):
            kind = "exported model" if isinstance(donor, Exported) else "run"
            kinds = f"its model is {type(part).__name__}, and not {type(module).__name__}"
            raise RunError(f"{path}: the {kind} {source} has no such part to take weights from; {kinds}") from None
    # All of the donor's part, what is frozen there too; but what is frozen inside this one has its own source.
    kept = module.state_dict().keys() - live_state(module).keys()
    weights = {name: value for name, value in part.state_dict().items() if name not in kept}
    load_weights(module, weights, f"{source}, {path}")


def _donor(folder: Path) -> Task | Exported:
    if is_exported(folder):
        return read_exported(folder, sys.modules.__contains__)
    donor = experiment_from(run_config(folder), unread=[LOSSES, EVALUATION])
    restore(donor, folder, None)
    return donor.task


def _skip(module: nn.Module, source: str, path: str) -> None:
    """On the meta device there is nothing to load into."""


def run_config(folder: Path, evaluation: Mapping[str, object] | None = None) -> Config:
    """A run's configuration, with other values in its node ``evaluation`` where they are given.

    Raises:
        RunError: if the folder holds no run.
    """
    file = folder / "config.yaml"
    if is_exported(folder):
        raise RunError(f"{folder} is an exported model, which comes without data and losses: name a run directory")
    if not file.is_file():
        maker = config_of_run(folder, [Path("projects"), Path(__file__).parents[2] / "projects"])
        train_it = f" with: python tools/train_net.py --config {maker}\n" if maker else ", or check the path"
        raise RunError(f"{folder} holds no run: it has no config.yaml. Train it first{train_it}".rstrip())
    return load_config(file, [f"evaluation.{key}={inline(value)}" for key, value in (evaluation or {}).items()])


def run_checkpoint(folder: Path, best: Best | None = None) -> Checkpoint:
    """The latest checkpoint of a run, or the best.

    Raises:
        RunError: if there is none yet.
    """
    checkpoints = folder / "checkpoints"
    checkpoint = latest_checkpoint(checkpoints) if best is None else best_checkpoint(checkpoints, best)
    if checkpoint is None:
        which = "checkpoint" if best is None else f"checkpoint with {best.metric}"
        raise RunError(f"{folder} has no {which} yet: its training has not come that far")
    return checkpoint


def restore(
    experiment: Experiment, folder: Path, weights: Weights | None, which: Which = "latest"
) -> dict[str, object]:
    """Load a run's weights into its model and say which they are."""
    model, best = experiment.task.model, experiment.train.best if which == "best" else None
    if which == "best" and best is None:
        raise RunError(f"{folder} keeps no best checkpoint: its configuration has no train.best")
    chosen = weights or ("model" if experiment.train.ema_decay is None else "ema")
    while True:
        checkpoint = run_checkpoint(folder, best)
        try:
            read = {name: checkpoint.weights(name) for name in {"model", chosen}}
            break
        except CheckpointError:
            if checkpoint.folder.exists():
                raise  # else the run goes on, and has just removed it for a newer one
    left_out = remove_unread(experiment.task)
    checkpoint.check_frozen(frozen_digests(experiment.task), left_out)
    load_weights(experiment.task, read["model"], checkpoint.folder)
    if chosen == "ema":
        load_weights(model, read["ema"], checkpoint.folder)
    return {"run": str(folder), "step": checkpoint.step, "weights": chosen, "seed": experiment.run.seed}
