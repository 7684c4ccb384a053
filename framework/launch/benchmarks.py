"""The benchmarks by name, under torchrun where they can be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework import runs
from framework.config import ConfigError, load_config
from framework.data.token_file import TokenFile
from framework.engine import allocation_benchmark, benchmark, data_benchmark, generation_benchmark, quantizer_benchmark
from framework.engine.checkpoint import CheckpointError
from framework.engine.official_dit import DIT, dit_lines
from framework.engine.official_llamagen import LLAMAGEN, llamagen_lines
from framework.generators.autoregressive import SIZES
from framework.generators.image_generator import ImageGenerator
from framework.generators.length_modes import LENGTH_MODES
from framework.launch.environment import joined

ERRORS = (ConfigError, runs.RunError, CheckpointError, ValueError, TypeError, OSError)
"""Those that are for people."""


def generation_lines(
    rounds: int,
    batch_sizes: Sequence[int] | None = None,
    guidance: float = 2.0,
    run: Path | None = None,
    official: Path | None = None,
    **given: Any,
) -> Iterator[str]:
    """What decoding costs by policy, of a run or of a model that is made for it; or beside an official sampler.

    Args:
        rounds, guidance: as of ``generation_benchmark.generation_lines``.
        batch_sizes: likewise; one number beside an official sampler.
        run: a run of a generator.
        official: a checkout of LlamaGen or DiT, beside which ``size`` is one of its sizes, ``tokens`` are of LlamaGen's
            image, and ``steps`` of DiT's sampler.
        given: else, ``size`` is that or WIDTHxDEPTHxHEADS, ``codes`` of the vocabulary, ``lengths`` numbers or a file
            of tokens, of whose lengths each is as likely, and ``modes`` how these are known; ``images`` of a round, for
            each at a time. What is ``None`` is not given.

    Raises:
        ValueError: if options are given that have no part in this, or cannot be.
        TypeError: if the run is none of an autoregressive generator.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if official is not None:
        given |= {} if run is None else {"run": run}
        yield from _official_lines(official, batch_sizes or [8], guidance, rounds, given)
        return
    used = {"images"} if run else {"size", "codes", "lengths", "modes", "images"}
    _refuse_others(given, used, "with --run" if run else "without --run")
    found: dict[str, Any] = {"rounds": rounds, "batch_sizes": batch_sizes or [1, 8, 32], "guidance": guidance}
    found["images_per_row"] = given.get("images", 16)
    if run is not None:
        found["images"] = runs.load(run)
        if not isinstance(found["images"], ImageGenerator):
            raise TypeError(f"{run} is no run of a generator: its model is {type(found['images']).__name__}")
    else:
        found["size"] = _size(given.get("size", "128x4x4"))
        found["lengths"] = _lengths(given.get("lengths", ["4", "8", "12", "16"]))
        found |= {"codes": given.get("codes", 4096), "modes": given.get("modes", LENGTH_MODES)}
    yield from generation_benchmark.generation_lines(**found)


def _official_lines(
    official: Path, batch_sizes: Sequence[int], guidance: float, rounds: int, given: dict[str, Any]
) -> Iterator[str]:
    sides = ((LLAMAGEN, llamagen_lines, {"size", "tokens"}), (DIT, dit_lines, {"size", "steps"}))
    for repository, lines, used in sides:
        if repository.missing(official):
            continue
        _refuse_others(given, used, f"beside {repository.name}")
        if len(batch_sizes) > 1:
            raise ValueError("an official sampler is measured at one batch size: give --batch one number")
        return lines(official, batch_sizes[0], guidance, rounds, **given)
    known = " nor ".join(
        f"of https://github.com/{each.name} ({each.missing(official)} is missing)" for each, *_ in sides
    )
    raise FileNotFoundError(f"{official} is a checkout neither {known}")


def _refuse_others(given: Mapping[str, object], used: Collection[str], where: str) -> None:
    if ignored := given.keys() - used:
        raise ValueError(f"--{min(ignored)} has no part in this {where}; what has is --{', --'.join(sorted(used))}")


def _size(text: str) -> Sequence[int]:
    parts = [part for part in text.split("x") if part.isdecimal()]
    if text not in SIZES and (len(parts) != 3 or text.count("x") != 2):
        raise ValueError(f"--size is one of {', '.join(SIZES)}, or WIDTHxDEPTHxHEADS, such as 128x4x4; got {text!r}")
    return SIZES[text] if text in SIZES else [int(part) for part in parts]


def _lengths(texts: Sequence[str]) -> list[int]:
    if all(text.isdecimal() for text in texts):
        if min(map(int, texts)) < 1:
            raise ValueError(f"--lengths are numbers from 1, got {' '.join(texts)}")
        return [int(text) for text in texts]
    if len(texts) > 1:
        raise ValueError(f"--lengths are numbers, or one file of tokens; got {' '.join(texts)}")
    return [int(length) for length in TokenFile(texts[0]).lengths]


LINES: dict[str, Callable[..., Iterator[str]]] = {
    "train": benchmark.training_lines,
    "decode": benchmark.decoding_lines,
    "attention": benchmark.attention_lines,
    "allocation": allocation_benchmark.allocation_lines,
    "data": data_benchmark.loading_lines,
    "generate": generation_lines,
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
