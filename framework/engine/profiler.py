"""Where a training step's time and memory go: a trace to look at and tables to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from framework.engine.experiment import Experiment
from framework.engine.trainer import Trainer
from framework.runtime import files
from framework.runtime.records import Records

WARM_UP = 3
STEPS = 10
ROWS = 25
PHASE = "phase: "


def profile_training(experiment: Experiment) -> Path:
    """Profile ``STEPS`` training steps from initial weights; returns ``profile/`` in the run directory.

    ``trace.json`` is for chrome://tracing or ui.perfetto.dev; ``table.txt`` has the share of each phase, and the
    operators by time and by memory. Nothing else is written: checkpoints and metrics are not touched. Every turn is
    taken from the first step on. On a CUDA device a phase waits for its own kernels, so that it is charged for them.

    Raises:
        ValueError: as ``Trainer``.
    """
    data, device = experiment.data, experiment.run.torch_device()
    options = copy(experiment.train)
    options.max_steps = WARM_UP + STEPS

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with record_function(PHASE + name):
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    with TemporaryDirectory() as name:
        trainer = Trainer(
            experiment.task, data.train, data.validation, options, experiment.run.seed, Path(name),
            num_workers=data.num_workers, device=device, records=Records([]), phase=phase,
        )
        for training in trainer.turns:
            training.turn = replace(training.turn, start=0)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        steps = schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1)
        with profile(activities=activities, schedule=steps, profile_memory=True) as profiler:
            trainer.periodic = [(1, lambda step: profiler.step())]
            if trainer.fit().status != "finished":
                raise KeyboardInterrupt
        trace = Path(name) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        files.write_bytes(experiment.run.dir / "profile/trace.json", trace.read_bytes())
    files.write_text(experiment.run.dir / "profile/table.txt", _tables(profiler, device.type))
    return experiment.run.dir / "profile"


def _tables(profiler: profile, device: str) -> str:
    averages = profiler.key_averages()
    phases = {event.key.removeprefix(PHASE): event.cpu_time_total for event in averages if event.key.startswith(PHASE)}
    whole = sum(event.cpu_time_total for event in averages if event.key.startswith("ProfilerStep"))
    phases["the rest"] = whole - sum(phases.values())
    lines = [f"{whole / STEPS / 1e3:.1f} ms a step, mean of {STEPS} steps under the profiler, which slows them"]
    lines += [f"  {name:10}{time / STEPS / 1e3:10.1f} ms{time / whole:8.1%}" for name, time in phases.items()]
    unit = "cpu" if device == "cpu" else "device"
    for what in ("time_total", "memory_usage"):
        lines += ["", averages.table(sort_by=f"self_{unit}_{what}", row_limit=ROWS, max_name_column_width=60)]
    return "\n".join(lines) + "\n"
