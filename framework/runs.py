"""Runs: start or continue one from a configuration, and evaluate it.

A run directory holds ``config.yaml`` (every default written), ``run.json`` (command, versions, commit, host), metrics,
``checkpoints/`` and ``evaluation/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from framework.config import Config, dump_yaml, resolve
from framework.config.find import find_config as find_config
from framework.engine import run_directory
from framework.engine.checkpoint import checkpoint_folders
from framework.engine.experiment import Experiment
from framework.engine.plan import plan
from framework.engine.profiler import profile_training
from framework.engine.run_directory import RunError as RunError
from framework.engine.trackers import TRACKERS
from framework.engine.trainer import Outcome, Trainer
from framework.evaluation.evaluation import named
from framework.models.loading import LOSSES, Which, restore, run_checkpoint, run_config
from framework.models.loading import experiment_from as experiment_from
from framework.models.loading import load as load
from framework.models.loading import load_part as load_part
from framework.runtime.files import write_text
from framework.runtime.json_lines import read_lines
from framework.runtime.progress import Stages
from framework.runtime.ranks import Ranks
from framework.tasks.interface import Report

Split = Literal["train", "validation", "test"]
METRICS = "metrics.jsonl"


def check(config: Config) -> None:
    """Find what is wrong with a run without building anything.

    Raises:
        ConfigError: with all that is wrong in the configuration.
        RunError: if a tracker's package is not installed.
    """
    for tracker in resolve(config, Experiment)["run"]["trackers"]:
        try:
            TRACKERS.get(tracker["name"]).require()
        except ValueError as error:
            raise RunError(f"run.trackers: {error}") from error


def dry_run(config: Config) -> str:
    """The plan of a run, from parts built without memory for weights.

    Raises:
        ConfigError: if the configuration is wrong, or parts do not fit each other.
        RunError: as ``check``; or if the optimizers do not fit what is trained.
        CheckpointError: if the weights of ``train.init_from`` do not fit.
    """
    check(config)
    experiment = experiment_from(config, device="meta")
    try:
        return plan(experiment)
    except ValueError as error:
        raise RunError(str(error)) from error


def train(
    config: Config, say: Callable[[str], None], fresh: bool = False, ranks: Ranks | None = None
) -> Outcome:
    """Train as the configuration says, from the start or from where the same run stopped, and evaluate the result.

    Args:
        config: checked here, and its parts built, before anything is written.
        say: told where things are.
        fresh: move an older run of that directory aside instead of continuing it.
        ranks: the processes that train together, of which the main one writes and evaluates.

    Raises:
        ConfigError: if the configuration is wrong, or a tracker's package is not installed.
        CheckpointError: if there are checkpoints that cannot be continued, or the weights of ``train.init_from`` do
            not fit.
        RunError: if the directory holds a run of another configuration or another process trains there, if the
            optimizers do not fit what is trained, or if files cannot be read or written, such as on a full disk.
    """
    ranks = ranks or Ranks()
    say = say if ranks.is_main else _say_nothing
    text = dump_yaml(resolve(config, Experiment))
    folder = Path(config.tree["run"]["dir"])
    if not fresh:
        run_directory.refuse_another(folder, text)
        if run_directory.is_finished(folder):
            step = run_checkpoint(folder).step
            say(f"{folder} is finished: {step} steps. Train longer or anew in another run.dir, or with --fresh.")
            _say_results(folder / "evaluation", say)
            return Outcome("finished", step)
    experiment = experiment_from(config)
    _use_threads(experiment)
    try:
        trainer = experiment.trainer(ranks)
        starts = fresh or not checkpoint_folders(folder / "checkpoints")
        inheritance = trainer.take_over() if starts else None
    except ValueError as error:
        raise RunError(str(error)) from error
    ranks.wait()  # all have seen the directory as it was
    if not ranks.is_main:
        ranks.wait()
        _prepare(experiment, trainer)
        return trainer.fit()
    if fresh and folder.exists():
        with run_directory.hold(folder, say):
            say(f"moved the older run to {run_directory.move_aside(folder)}")
    with run_directory.hold(folder, say):
        write_text(folder / "config.yaml", text)
        more = {"precision": str(experiment.train.dtype(trainer.device))}
        run_directory.record_start(folder, more | ({} if inheritance is None else {"init_from": inheritance.record}))
        _prepare(experiment, trainer)
        ranks.wait()  # the others find what was prepared
        outcome = trainer.fit()
        if outcome.status == "finished":
            _evaluate(experiment, folder, "validation", folder / "evaluation", say)
        else:
            said = "stopped and saved at step" if outcome.status == "stopped" else "preempted, and saved at step"
            say(f"{said} {outcome.step} of {experiment.train.max_steps}; the same command continues")
        run_directory.record_end(folder, outcome.status, outcome.step)
    return outcome


def profile(config: Config, say: Callable[[str], None]) -> Path:
    """Profile a few training steps; returns ``profile/`` in the run directory, where nothing else is written.

    Raises:
        ConfigError, RunError: as ``train``.
    """
    folder = Path(config.tree["run"]["dir"])
    run_directory.refuse_another(folder, dump_yaml(resolve(config, Experiment)))
    experiment = experiment_from(config)
    _use_threads(experiment)
    try:
        results = profile_training(experiment)
    except ValueError as error:
        raise RunError(str(error)) from error
    say((results / "table.txt").read_text().partition("\n\n")[0])
    say(f"results: {results / 'table.txt'} {results / 'trace.json'}")
    return results


def is_finished(config: Config) -> bool:
    """Whether the run of a configuration has come to its end, evaluation included, so that nothing is left to do.

    Raises:
        ConfigError: if the configuration is wrong.
        RunError: if the directory holds a run of another configuration.
    """
    folder = Path(config.tree["run"]["dir"])
    run_directory.refuse_another(folder, dump_yaml(resolve(config, Experiment)))
    return run_directory.is_finished(folder)


def evaluate(
    folder: Path,
    say: Callable[[str], None],
    split: Split = "validation",
    out: Path | None = None,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    checkpoint: Which = "latest",
    distances: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
) -> Path:
    """Evaluate a run's averaged weights on a split of its data; returns the folder of the results.

    Args:
        folder: the run directory.
        say: told where things are.
        split: which images.
        out: where results go; ``evaluation_SPLIT`` of the run unless given, beside its own ``evaluation``.
        lengths: kept tokens to measure, in place of ``evaluation.lengths``.
        limit: measure a fixed random subset of so many images.
        checkpoint: the latest, or the best as ``train.best`` says.
        distances: names of extractors, in place of those of the configuration's ``evaluation.distances``.
        features: names of networks, in place of those of ``evaluation.features``.
    """
    experiment = experiment_from(run_config(folder, _measures(lengths, distances, features)), unread=[LOSSES])
    _use_threads(experiment)
    out = out or folder / f"evaluation_{split}{'' if checkpoint == 'latest' else '_best'}"
    _evaluate(experiment, folder, split, out, say, limit, checkpoint)
    return out


def compare(
    folders: Sequence[Path],
    say: Callable[[str], None],
    out: Path,
    split: Split = "validation",
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    distances: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
) -> None:
    """Measure several runs' models on the images of the first run; leave one table and one plot in ``out``.

    Args:
        folders: run directories.
        say: told where things are.
        out: where results go.
        split: which images.
        lengths: kept tokens to measure, in place of the first run's ``evaluation.lengths``.
        limit: measure a fixed random subset of so many images.
        distances: names of extractors, in place of those of the first run's ``evaluation.distances``.
        features: names of networks, in place of those of the first run's ``evaluation.features``.

    Raises:
        RunError: if the runs have trained different kinds of models, or some that are not compared.
    """
    other = _measures(lengths, distances, features)
    experiments = {folder: experiment_from(run_config(folder, other), unread=[LOSSES]) for folder in folders}
    first = experiments[folders[0]]
    for folder, experiment in experiments.items():
        restore(experiment, folder, None)
        if type(experiment.task).compare.__qualname__ != type(first.task).compare.__qualname__:
            kinds = f"{type(first.task).__name__}, and {folder} of {type(experiment.task).__name__}"
            raise RunError(f"only runs of one kind are compared: {folders[0]} is one of {kinds}")
        experiment.task.to(experiment.run.torch_device()).eval()
    _use_threads(first)
    tasks = {str(folder): experiment.task for folder, experiment in experiments.items()}
    histories = {str(folder): read_lines(folder / METRICS, "step") for folder in folders}
    with torch.no_grad(), Stages() as progress:
        measures = first.evaluation.to(first.run.torch_device())
        wanted = Report(getattr(first.data, split), first.data.train, out, {}, measures, limit, progress, histories)
        type(first.task).compare(tasks, wanted)
    say((out / "comparison.md").read_text().strip())
    say("results: " + " ".join(sorted(str(path) for path in out.iterdir())))


def _measures(
    lengths: Sequence[int] | None, distances: Sequence[str] | None, features: Sequence[str] | None
) -> dict[str, object]:
    return ({} if lengths is None else {"lengths": list(lengths)}) | named(distances, features)


def _prepare(experiment: Experiment, trainer: Trainer) -> None:
    try:
        with Stages() as progress:
            trainer.train_on(experiment.task.prepare(experiment.data.train, experiment.run.cache, progress))
    except ValueError as error:
        raise RunError(str(error)) from error


def _say_nothing(text: str) -> None:
    """What the main process says need not be said twice."""


def _evaluate(
    experiment: Experiment,
    folder: Path,
    split: Split,
    out: Path,
    say: Callable[[str], None],
    limit: int | None = None,
    which: Which = "latest",
) -> None:
    record = restore(experiment, folder, None, which)
    data = experiment.data
    task = experiment.task.to(experiment.run.torch_device()).eval()
    with torch.no_grad(), Stages() as progress:
        histories = {str(folder): read_lines(folder / METRICS, "step")}
        measures = experiment.evaluation.to(experiment.run.torch_device())
        held_out, cache = getattr(data, split), experiment.run.cache
        task.report(Report(held_out, data.train, out, record, measures, limit, progress, histories, cache))
    _say_results(out, say)


def _say_results(folder: Path, say: Callable[[str], None]) -> None:
    say((folder / "table.md").read_text().strip())
    say("results: " + " ".join(sorted(str(path) for path in folder.iterdir())))


def _use_threads(experiment: Experiment) -> None:
    if experiment.run.threads is not None:
        torch.set_num_threads(experiment.run.threads)
