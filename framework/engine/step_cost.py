"""Where a training step's time goes, and how much of the machine's arithmetic it uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from framework.data.interface import Batch
from framework.data.stream import Sequential
from framework.engine.experiment import Experiment
from framework.engine.plan import count_operations
from framework.engine.trainer import Trainer
from framework.losses.perceptual import PerceptualLoss
from framework.runtime.ranks import Ranks
from framework.runtime.records import Records, peak_memory_mib
from framework.tasks.interface import Task
from framework.tokenizers.tokenizer import Tokenizer

SIDE = 2048
ROUNDS = 5


class PhaseClock:
    """Seconds by phase, for a trainer's ``phase``; on a GPU each phase waits for the device, which costs a little."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[name] += self.now() - began

    def now(self) -> float:
        """Seconds, after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


def peak_operations(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few: what this machine can do at most."""
    left, right = torch.randn(2, SIDE, SIDE, device=device, dtype=dtype)
    clock = PhaseClock(device)
    times = []
    for _ in range(ROUNDS + 1):
        began = clock.now()
        torch.mm(left, right)
        times.append(clock.now() - began)
    return 2 * SIDE**3 / min(times[1:])


def step_cost_lines(experiment: Experiment, steps: int, ranks: Ranks) -> Iterator[str]:
    """Train a copy for some steps aside; images a second, shares of the phases, memory, operations against the peak.

    Operations count six for each multiply-add at full length, two forward and four backward.
    """
    options, device = copy(experiment.train), experiment.run.torch_device()
    options.max_steps, options.log_every = 2 * steps, steps
    options.validate_every = options.checkpoint_every = 2 * steps + 1
    clock = PhaseClock(device)
    spans: list[float] = []

    def restart(step: int) -> None:
        """The first half warms up."""
        spans.append(clock.now())
        if step == steps:
            clock.seconds.clear()

    with TemporaryDirectory() as folder:
        data = experiment.data.train
        trainer = Trainer(
            deepcopy(experiment.task), data, data, options, experiment.run.seed, Path(folder),
            num_workers=experiment.data.num_workers, device=device, records=Records([]), ranks=ranks, phase=clock,
        )  # fmt: skip
        trainer.periodic = [(steps, restart)]
        if trainer.fit().status != "finished":
            raise KeyboardInterrupt
    seconds = spans[1] - spans[0]
    images = steps * options.batch_size / seconds
    phases = clock.seconds | {"the rest": seconds - sum(clock.seconds.values())}
    yield f"{images:.1f} images/s in {ranks.size} processes, peak memory {peak_memory_mib(device):.0f} MiB a process"
    yield "time: " + ", ".join(f"{name} {spent / seconds:.1%}" for name, spent in phases.items())
    yield from _extractor_lines(trainer.task, next(iter(Sequential(data, options.batch_size))), clock, seconds / steps)
    model = experiment.task.model
    if isinstance(model, Tokenizer):
        used = 6 * count_operations(model)["total"] * images / ranks.size
        dtype = options.dtype(device)
        peak = peak_operations(device, dtype)
        share = f"{used / peak:.1%} of the {peak:.3g} of a matrix product of side {SIDE}"
        yield f"{used:.3g} operations/s a process at full length, {share} in {str(dtype).removeprefix('torch.')}"


def _extractor_lines(task: Task, batch: Batch, clock: PhaseClock, step: float) -> Iterator[str]:
    """What the feature extractors of a step's losses take of it, measured alone, forward and backward."""
    images = batch.to(clock.device).images
    for name, loss in task.named_modules():
        if isinstance(loss, PerceptualLoss):
            times = []
            for _ in range(ROUNDS):
                rebuilt = images.clone().requires_grad_()
                began = clock.now()
                loss(rebuilt, images).backward()
                times.append(clock.now() - began)
            alone = median(times[1:])
            title = loss.extractor.title
            yield f"{name} alone ({title}), forward and backward: {1e3 * alone:.0f} ms, {alone / step:.1%} of a step"
