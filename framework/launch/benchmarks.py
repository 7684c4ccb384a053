"""The benchmarks by name, under torchrun where they can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from framework import runs
from framework.config import load_config
from framework.engine import allocation_benchmark, benchmark, data_benchmark, quantizer_benchmark
from framework.launch.environment import joined

LINES: dict[str, Callable[..., Iterator[str]]] = {
    "train": benchmark.training_lines,
    "decode": benchmark.decoding_lines,
    "attention": benchmark.attention_lines,
    "allocation": allocation_benchmark.allocation_lines,
    "data": data_benchmark.loading_lines,
    "quantizer": quantizer_benchmark.quantizer_lines,
}


def benchmark_lines(
    command: str, config: str | None = None, overrides: Sequence[str] = (), **options: Any
) -> Iterator[str]:
    """What a benchmark finds, line by line; of several processes the main one tells.

    Args:
        command: its name.
        config: the file of a configuration, for those that need one.
        overrides: changes to it.
        options: arguments of its function.
    """
    if config is not None:
        options["experiment"] = runs.experiment_from(load_config(runs.find_config(config), overrides))
    with joined() as ranks:
        if command == "train":
            options["ranks"] = ranks
        for line in LINES[command](**options):
            if ranks.is_main:
                yield line
