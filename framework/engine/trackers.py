"""Dashboards that a run's numbers also go to; each needs a package of its own."""

from __future__ import annotations

import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from framework.config.registry import Registry
from framework.runtime import files
from framework.runtime.records import Destination, Record


class Tracker(Destination):
    """A dashboard. Messages for people stay in the run's log.

    It opens with ``rewind``, which tells where the run goes on; before that it touches no file and no network.

    Attributes:
        package: what must be installed, by the name that pip and Python know it by.

    Args:
        folder: the run directory.

    Raises:
        ValueError: if the package is not installed.
    """

    package: ClassVar[str]

    def __init__(self, *, folder: Path) -> None:
        self.require()
        self.folder = folder
        self.board: Any = None

    @classmethod
    def require(cls) -> None:
        """Raise a ValueError if the package is not installed."""
        if find_spec(cls.package) is None:
            raise ValueError(
                f"{cls.__name__} needs the package {cls.package}, which is not installed: pip install {cls.package}, "
                "or remove it from run.trackers"
            )


TRACKERS = Registry("tracker", Tracker)


@TRACKERS.register()
class TensorBoard(Tracker):
    """TensorBoard's event files, in ``tensorboard/`` of the run directory: ``tensorboard --logdir runs``.

    What a killed run wrote after its last checkpoint is purged when it goes on.
    """

    package = "tensorboard"

    def write(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self.board.add_scalar(name, value, record.step)

    def rewind(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def sync(self) -> None:
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


@TRACKERS.register()
class WandB(Tracker):
    """Weights & Biases; a run that goes on stays the same run there, by the id in ``wandb_id.txt`` of its directory.

    The charts' axis is the metric ``step``. W&B forgets nothing, so the steps between a kill and the last checkpoint
    are drawn twice, with the same values.

    Args:
        project: the project there.
        mode: ``offline`` writes below ``wandb/`` of the run directory, for ``wandb sync`` to upload later.
    """

    package = "wandb"

    def __init__(self, project: str, mode: Literal["online", "offline"] = "online", *, folder: Path) -> None:
        super().__init__(folder=folder)
        self.project = project
        self.mode = mode

    def write(self, record: Record) -> None:
        self.board.log({"step": record.step, **_numbers(record)})

    def rewind(self, step: int) -> None:
        import wandb

        file = self.folder / "wandb_id.txt"
        if not file.exists():
            files.write_text(file, uuid.uuid4().hex[:8])
        try:
            self.board = wandb.init(
                project=self.project, mode=self.mode, dir=str(self.folder), name=self.folder.name,
                id=file.read_text(), resume="allow",
            )
        except wandb.Error as error:
            reason = str(error).rstrip(".")
            raise OSError(f"Weights & Biases: {reason}. Log in with `wandb login`, or set mode: offline") from error
        self.board.define_metric("*", step_metric="step")

    def close(self) -> None:
        if self.board is not None:
            self.board.finish()


def _numbers(record: Record) -> dict[str, float]:
    return dict(record.values) | {f"timing/{name}": value for name, value in record.timings.items()}
