"""The top of every configuration: what a run is made of, and how its parts are put together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from framework.config.registry import Factory
from framework.data.data import Data
from framework.engine.trackers import Tracker
from framework.engine.trainer import Trainer
from framework.engine.training import Training
from framework.evaluation.evaluation import Evaluation
from framework.launch.options import Launch
from framework.runtime.ranks import Ranks
from framework.runtime.records import Records, run_records
from framework.tasks.interface import Task
from framework.tokenizers.tokenizer import Tokenizer


class RunOptions:
    """Where a run lives and what makes it repeatable: the YAML node ``run:``.

    Args:
        dir: the run directory, relative to where the command runs.
        seed: of initial weights, data order, augmentation and drawn lengths.
        device: ``auto`` takes CUDA where there is one.
        threads: CPU threads; ``null`` for all cores. Another number changes the last bits of results.
        trackers: dashboards that the numbers also go to, such as ``[{name: TensorBoard}]``.
        cache: folder for what several runs may share, such as error tables; removed, it is computed anew.
    """

    def __init__(
        self,
        dir: str,
        seed: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int | None = None,
        trackers: tuple[Factory[Tracker], ...] = (),
        cache: str = "runs/cache",
    ) -> None:
        self.dir = Path(dir)
        self.seed = seed
        self.device = device
        self.threads = threads
        self.trackers = trackers
        self.cache = Path(cache)

    def torch_device(self) -> torch.device:
        """The device, with ``auto`` decided.

        Raises:
            ValueError: if CUDA is asked for and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("run.device is cuda, but torch sees no CUDA device here: use run.device=cpu or auto")
        chosen = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        return torch.device(chosen)


class Experiment:
    """A run's data, models, task and training settings, built from one configuration.

    Args:
        run: where the run lives, its seed and device.
        data: the image sets.
        task: what one training step computes.
        train: steps, batch, optimizer, schedule, checkpoints.
        tokenizer: the tokenizer to train or to use; none where an autoencoder is trained.
        evaluation: what evaluations measure; it may change while a run goes on, and after it.
        launch: on how many processes and machines; who launches reads it, and it may change while a run goes on.
    """

    def __init__(
        self,
        run: RunOptions,
        data: Factory[Data],
        task: Factory[Task],
        train: Training,
        tokenizer: Factory[Tokenizer] | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - read only
        launch: Launch = Launch(),  # noqa: B008 - read only
    ) -> None:
        self.run = run
        self.launch = launch
        self.train = train
        self.evaluation = evaluation
        self.data: Data = data(seed=run.seed)
        given = {} if tokenizer is None else {"tokenizer": tokenizer(image_size=self.data.image_size)}
        self.task: Task = task(**given)

    def trainer(self, ranks: Ranks | None = None) -> Trainer:
        """The engine over this experiment's parts; the models move to the run's device.

        Args:
            ranks: the processes that train together, this one alone unless given.

        Raises:
            ConfigError: if a tracker's package is not installed.
            ValueError: as ``Trainer``.
        """
        return Trainer(
            self.task,
            self.data.train,
            self.data.validation,
            self.train,
            seed=self.run.seed,
            folder=self.run.dir,
            num_workers=self.data.num_workers,
            device=self.run.torch_device(),
            records=self._records(ranks or Ranks()),
            ranks=ranks,
        )

    def _records(self, ranks: Ranks) -> Records:
        if not ranks.is_main:
            return Records([])
        return run_records(self.run.dir, [tracker(folder=self.run.dir) for tracker in self.run.trackers])
