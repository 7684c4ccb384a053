"""The training loop: the maths is a task, the loop is code, and only the loop acts.

For each step, each due turn: losses, gradients, the check that all is finite, clipping, the schedule, the optimizer.
Then the moving average, then at the step's boundary the periodic work: log, validate, save. A stopped run goes on from
its latest checkpoint; with the same world size, thread count and kind of CPU its weights, averages, optimizers, data
order and metric lines are bit for bit those of a run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.profiler import record_function

from framework.config.errors import did_you_mean
from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential, Stream
from framework.engine.acceleration import compiled_blocks, recompute_blocks
from framework.engine.between_steps import learn_between_steps
from framework.engine.checkpoint import Best, CheckpointError, CheckpointStore, latest_checkpoint, load_weights
from framework.engine.ema import ExponentialMovingAverage
from framework.engine.frozen import frozen_digests, live_state, train_mode
from framework.engine.init_from import Inheritance
from framework.engine.meters import Means, Phase, Stopwatch
from framework.engine.stop import StopFlag
from framework.engine.training import Training
from framework.engine.turns import TurnTraining, freeze, micro_batches, share_parameters
from framework.runtime.precision import has_fast_bfloat16
from framework.runtime.ranks import Ranks
from framework.runtime.records import Destination, Record, Records, peak_memory_mib, run_records
from framework.runtime.rng import Generators, global_state, set_global_state
from framework.tasks.interface import Context, Task


class Outcome(NamedTuple):
    """How ``fit`` ended: at the last step, or earlier because a signal asked for it; and the steps taken so far.

    ``preempted`` is stopped by SIGUSR2 on any rank: the run wants to be queued again.
    """

    status: Literal["finished", "stopped", "preempted"]
    step: int


class Trainer:
    """Runs a task: on data, with optimizers, checkpoints and records in one folder.

    Args:
        task: moves to ``device``.
        train_data: what is trained on, shuffled anew each epoch.
        validation_data: held-out images.
        options: the settings of ``train:``.
        seed: of data order, the task's generators and torch's own. Initial weights were drawn before.
        folder: the run directory; a checkpoint in it is continued.
        num_workers: processes that prepare images; 0 prepares them in this one.
        device: where the models are.
        records: where numbers and messages go; the run directory's files and the terminal unless given.
        ranks: the processes that train together; each takes its share of every batch, and the main one writes files.
        phase: entered around the phases of a step: ``data``, ``forward``, ``backward``, ``communication`` where there
            are several ranks, ``optimizer``, ``average``; of several turns each has its own, ``TURN: forward``.

    Raises:
        ValueError: if the turns do not share out the trainable parameters, an optimizer's turn does not exist,
            ``train.freeze`` matches nothing, a batch cannot be shared out, or validations do not give the metric of
            ``train.best``.
    """

    def __init__(
        self,
        task: Task,
        train_data: ImageData,
        validation_data: ImageData,
        options: Training,
        seed: int,
        folder: Path,
        *,
        num_workers: int = 0,
        device: torch.device | None = None,
        records: Destination | None = None,
        ranks: Ranks | None = None,
        phase: Phase = record_function,
    ) -> None:
        self.options = options
        self.ranks = ranks or Ranks()
        share, rest = divmod(options.batch_size, self.ranks.size * options.accumulate)
        if rest:
            parts = f"{self.ranks.size} processes with train.accumulate={options.accumulate}"
            raise ValueError(
                f"train.batch_size {options.batch_size} cannot be shared out among {parts}: the nearest are "
                f"{(share or 1) * self.ranks.size * options.accumulate} images"
            )
        self.images_at_once = share  # that this process computes on, in training and in validation
        self.device = device or torch.device("cpu")
        self.task = task.to(self.device)
        self.validation_data = validation_data
        self.stream = Stream(
            train_data, share * options.accumulate, seed, self.ranks.rank, self.ranks.size, num_workers
        )
        self.generators = Generators(seed, self.ranks.rank)
        self.turns = make_turns(task, options, self.ranks, self.device)
        decay = options.ema_decay
        self.average = None if decay is None else ExponentialMovingAverage(task.model, decay)
        self.frozen = frozen_digests(task)
        self.records = records or (run_records(folder) if self.ranks.is_main else Records([]))
        self.store = CheckpointStore(folder / "checkpoints", options.keep_last, options.best, self.records.say)
        self.phase = phase
        self.means = Means()
        self.stopwatch = Stopwatch()
        self.measured: dict[str, float] = {}  # by a validation at the end of this step
        self._saved: int | None = None
        self._buffers = {name for name, _ in task.named_buffers()}
        self._inheritance: Inheritance | None = None
        self._broken_told: set[str] = set()
        self._alarms: set[str] = set()
        if options.recompute:
            recompute_blocks(task)
        if options.best is not None:
            self._check_best(options.best)
        self.periodic = [
            (options.log_every, self._log),
            (options.validate_every, self._validate),
            (options.checkpoint_every, self._save),
        ]

    def fit(self) -> Outcome:
        """Train to the last step, from the latest checkpoint where there is one.

        Raises:
            NonFiniteError: if a loss or gradient is not finite; the last checkpoint is the way back.
            CheckpointError: if there are checkpoints that this task cannot continue.
        """
        step = self._resume()
        self._tell_precision()
        train_mode(self.task)
        self.stopwatch.start(step)
        try:
            compiled = compiled_blocks(self.task) if self.options.compile else nullcontext()
            with StopFlag() as stop, compiled:
                while step < self.options.max_steps:
                    self._train(step)
                    step += 1
                    is_last = step == self.options.max_steps
                    for period, work in self.periodic:
                        if is_last or step % period == 0:
                            work(step)
                    if self.ranks.any(stop.is_set) and not is_last:
                        self._save(step)
                        return Outcome("preempted" if self.ranks.any(stop.is_preempted) else "stopped", step)
        finally:
            self.records.close()
        return Outcome("finished", step)

    def train_on(self, data: ImageData) -> None:
        """Train on as many images that were prepared for the task, in place of those that it was built with."""
        self.stream.data = data
        self._restart_average()  # preparing may have filled buffers, such as the scale of latents

    def take_over(self) -> Inheritance | None:
        """Load the weights that ``train.init_from`` names, if it does; ``fit`` calls it where there is no checkpoint.

        Raises:
            CheckpointError: if the donor's weights do not fit.
        """
        if self._inheritance is None and self.options.init_from is not None:
            self._inheritance = self.options.init_from.apply(self.task)
            self._restart_average()
        return self._inheritance

    def _restart_average(self) -> None:
        if self.average is not None:
            self.average.load_state_dict(live_state(self.task.model))

    def _tell_precision(self) -> None:
        dtype = self.options.dtype(self.device)
        if self.options.precision == "auto":
            self.records.say(f"train.precision is auto: matrix products are in {str(dtype).removeprefix('torch.')}")
        elif dtype == torch.bfloat16 and not has_fast_bfloat16(self.device):
            self.records.say(
                "train.precision is bfloat16, for which this machine has no instructions, so that it is many times "
                "slower than float32: train.precision=auto takes what is fast"
            )

    def _train(self, step: int) -> None:
        """One step: every due turn, then the moving average."""
        self.measured = {}
        with self.stopwatch.step(self.options.batch_size):
            with self.stopwatch.waiting(), self.phase("data"):
                batch = next(self.stream)
            batches = micro_batches(self._on_device(batch), self.options.accumulate)
            context = Context(step, step / self.options.max_steps, self.generators)
            for training in self.turns:
                phase = self.phase if len(self.turns) == 1 else partial(self._phase_of, training.turn.name)
                for update in range(training.turn.updates if training.turn.is_due(step) else 0):
                    numbers = training.take(self.task, batches, replace(context, update=update), phase)
                    self.means.add({f"{training.turn.name}/{name}": value for name, value in numbers.items()})
            learn_between_steps(self.task, self.ranks)
            if self.ranks.size > 1:  # what layers have learned of their own rank's images
                self.ranks.spread([value for name, value in live_state(self.task).items() if name in self._buffers])
            if self.average is not None:
                with self.phase("average"):
                    self.average.update(self.task.model, step)
        self._tell_broken(self.stream.broken)

    def _phase_of(self, turn: str, name: str) -> AbstractContextManager[object]:
        return self.phase(f"{turn}: {name}")

    def _log(self, step: int) -> None:
        values = self.means.take()
        values |= {f"{training.turn.name}/lr": training.optimizer.lr for training in self.turns}
        if self.stream.broken:
            values["data/broken"] = float(len(self.stream.broken))
        timings = self.stopwatch.take(step, self.options.max_steps)
        timings["memory_mib"] = peak_memory_mib(self.device)
        self.records.write(Record(step, self.options.max_steps, values, timings))
        alarms = self.task.alarms()
        for name, text in alarms.items():
            if name not in self._alarms:
                self.records.say(f"step {step}: {text}")
        self._alarms = set(alarms)

    def _validate(self, step: int) -> None:
        self.measured = self._measure(self.options.validate_images)
        self.records.write(Record(step, self.options.max_steps, self.measured))
        best = self.options.best
        better = best is not None and self.ranks.is_main and self.store.is_better(self.measured[best.metric])
        if self.ranks.any(better):
            self._save(step)

    def _measure(self, num_images: int) -> dict[str, float]:
        """A validation's numbers, with averaged weights where there are some, and never compiled."""
        batches = Sequential(self.validation_data, self.images_at_once, num_images)
        averaged = nullcontext() if self.average is None else self.average.swapped(self.task.model)
        eager = torch.compiler.set_stance("force_eager") if self.options.compile else nullcontext()
        self.task.eval()
        with torch.no_grad(), averaged, eager:
            numbers = self.task.validate(map(self._on_device, batches))
        train_mode(self.task)
        self._tell_broken(batches.broken)
        return {f"validation/{name}": value for name, value in numbers.items()}

    def _check_best(self, best: Best) -> None:
        """Measure a few images, so that a metric that does not exist is found now and not at the first validation."""
        given = self._measure(self.images_at_once)
        if best.metric not in given:
            raise ValueError(
                f"train.best.metric: a validation gives no '{best.metric}'{did_you_mean(best.metric, given) or '.'} "
                f"It gives {', '.join(given)}"
            )

    def _tell_broken(self, broken: Mapping[str, str]) -> None:
        for key, reason in broken.items():
            if key not in self._broken_told:
                self.records.say(f"left out, since it cannot be read: {key}: {reason}")
        self._broken_told |= broken.keys()

    def _save(self, step: int) -> None:
        """Save once a step, whoever asks for it."""
        if self._saved == step:
            return
        self._saved = step
        own = {
            "generators": self.generators.state_dict(),
            "global_generators": global_state(),
            "broken": self.stream.broken,
        }
        every = self.ranks.gather(own)
        self._tell_broken({key: reason for state in every for key, reason in state["broken"].items()})
        if self.ranks.is_main:
            self._write(step, every)
        self.ranks.wait()

    def _write(self, step: int, every: Sequence[Mapping[str, Any]]) -> None:
        """The checkpoint, with what is each rank's own."""
        self.records.sync()
        weights = {"model": live_state(self.task)}
        if self.average is not None:
            weights["ema"] = self.average.state_dict()
        state = {
            "optimizers": {training.turn.name: training.optimizer.state_dict() for training in self.turns},
            "ranks": list(every),
            "stream": self.stream.state_dict(),
            "means": self.means.state_dict(),
        }
        self.store.save(step, weights, state, self.frozen, self.measured)

    def _resume(self) -> int:
        """Go back to the latest checkpoint, in memory and in the records; returns the steps taken so far."""
        if self.ranks.is_main:
            self.store.tidy()
        self.ranks.wait()
        checkpoint = latest_checkpoint(self.store.folder, self.records.say)
        if checkpoint is None:
            inheritance = self.take_over()
            self.generators.seed_global()
            self.records.rewind(0)
            if inheritance is not None:
                self.records.say(inheritance.text)
            return 0
        checkpoint.check_frozen(self.frozen)
        load_weights(self.task, checkpoint.weights("model"), checkpoint.folder)
        if self.average is not None:
            self.average.load_state_dict(checkpoint.weights("ema"))
        state = checkpoint.state()
        try:
            self._load_state(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{checkpoint.folder} cannot be continued: {reason}") from error
        self.records.rewind(checkpoint.step)
        self.records.say(f"continuing from {checkpoint.folder}")
        return checkpoint.step

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for training in self.turns:
            training.optimizer.load_state_dict(state["optimizers"][training.turn.name])
        if len(state["ranks"]) != self.ranks.size:
            self.records.say(
                f"saved by {len(state['ranks'])} processes and continued by {self.ranks.size}: each takes another "
                "share of the batch, so that the result is not bit for bit that of a run without a break"
            )
        broken: Mapping[str, str] = {}
        self.generators.seed_global()
        if self.ranks.rank < len(state["ranks"]):
            own = state["ranks"][self.ranks.rank]
            self.generators.load_state_dict(own["generators"])
            set_global_state(own["global_generators"])
            broken = own["broken"]
        self.stream.load_state_dict(state["stream"] | {"broken": broken})
        self._broken_told |= self.stream.broken.keys()
        self.means.load_state_dict(state["means"])

    def _on_device(self, batch: Batch) -> Batch:
        return batch.to(self.device)


def make_turns(
    task: Task, options: Training, ranks: Ranks | None = None, device: torch.device | None = None
) -> list[TurnTraining]:
    """The task's turns, each with its parameters, optimizer and schedule.

    Raises:
        ValueError: if turns do not share out the trainable parameters, an optimizer has no turn or parameters, or
            ``train.freeze`` matches nothing.
    """
    names = [turn.name for turn in task.turns]
    unknown = sorted(set(options.turn_optimizers) - set(names))
    if unknown:
        raise ValueError(
            f"train.turn_optimizers has {', '.join(unknown)}, "
            f"and the turns of {type(task).__name__} are {', '.join(names)}"
        )
    freeze(task, options.freeze)
    shares = share_parameters(task)
    return [
        TurnTraining(
            turn,
            shares[turn.name],
            [p for name in names if name != turn.name for _, p in shares[name]],
            options.turn_optimizers.get(turn.name, options.optimizer)(parameters=shares[turn.name]),
            options.schedule(max_steps=options.max_steps),
            options.clip_norm,
            autocast=options.dtype(device or torch.device("cpu")) == torch.bfloat16,
            ranks=ranks or Ranks(),
        )
        for turn in task.turns
    ]
