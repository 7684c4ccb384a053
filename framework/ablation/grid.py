"""The file of a grid, and the runs that it stands for.

A **variant** is one label of every axis: a row of the table. A **cell** is a variant with one seed: an ordinary run in
``DIR/VARIANT/seed_N``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, Literal

from framework import runs
from framework.config import Config, ConfigError, build, dump_yaml, load_config, resolve
from framework.config.schema import arguments
from framework.config.yaml import inline
from framework.engine.experiment import Experiment

Scalar = bool | int | float | str | None
Inner = Scalar | list[Scalar] | dict[str, Scalar]
Changes = dict[str, Scalar | list[Inner] | dict[str, Inner]]
"""Values by dotted path, as on the command line; for what lies deeper than this type, write a longer path. In a value,
``{seed}`` is the cell's seed."""


_RESERVED = re.compile(r"run(\.seed|\.dir)?\s*=")


@dataclass(frozen=True)
class Metric:
    """A number of every cell's ``evaluation/metrics.json``: one column, or one for each length.

    Args:
        path: the keys that lead there, such as ``rate_distortion/per_length/mse``; a list stands for its rows, each of
            which has a ``length``.
        lengths: the columns; ``null`` for every length. The plot shows every length.
        scale: what the number is multiplied by in tables and plot; ``table.csv`` has it as it was.
        best: what is printed in bold.
    """

    path: str
    lengths: list[int] | None = None
    scale: float = 1.0
    best: Literal["lowest", "highest"] = "lowest"

    def read(self, metrics: Any) -> dict[int | None, float]:
        """The numbers by length, or a single one at ``None``.

        Raises:
            RunError: if the path leads to none.
        """
        found: dict[int | None, Any] = {None: metrics}
        try:
            for key in self.path.split("/"):
                found = {length: node[key] for length, node in found.items()}
                if all(isinstance(node, list) for node in found.values()):
                    found = {row["length"]: row for rows in found.values() for row in rows}
            return {length: float(value) for length, value in found.items() if value is not None}
        except (KeyError, TypeError, ValueError) as error:
            raise runs.RunError(f"the metric path {self.path}: metrics.json has no number there ({error!r})") from error


@dataclass(frozen=True)
class Grid:
    """The schema of a grid's file: what is trained, and which numbers are shown.

    Args:
        config: what every cell starts from, relative to the grid's file.
        dir: where cells and tables go, relative to where the command runs.
        seeds: one cell of each variant for each.
        grid: axes, each with overrides by label; variants are their product, and the first is what others are compared
            with.
        metrics: by the name that tables and plot show.
        overrides: for every cell.
    """

    config: str
    dir: str
    seeds: list[int]
    grid: dict[str, dict[str, Changes]]
    metrics: dict[str, Metric]
    overrides: Changes | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, and there must be one, got {self.seeds}")
        if not self.grid or not all(self.grid.values()) or not self.metrics:
            raise ValueError("there must be an axis in grid, a label on every axis ({} changes nothing) and a metric")
        for axis, labels in self.grid.items():
            for label in labels:
                if same := [other for other in labels if other < label and slug(other) == slug(label)]:
                    raise ValueError(f"'{same[0]}' and '{label}' of {axis} have one folder '{slug(label)}': rename one")
                if not slug(label):
                    raise ValueError(f"'{label}' of {axis} names no folder: write a letter or a digit")


def slug(label: str) -> str:
    """A label as the name of a folder: ``NTM: key padding`` is ``ntm-key-padding``."""
    return re.sub(r"[^\w.]+|_+", "-", label.lower()).strip("-.")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a grid.

    Args:
        labels: one for each axis.
        seed: of the run.
        folder: its run directory.
        changes: what makes it differ, as on the command line; seed and folder are not among them.
        command: the arguments of ``tools/train_net.py`` that train it.
        config: what comes of them.
    """

    labels: tuple[str, ...]
    seed: int
    folder: Path
    changes: tuple[str, ...]
    command: tuple[str, ...]
    config: Config

    @property
    def log(self) -> Path:
        """What the cell's process prints."""
        return self.folder / "ablate.log"

    @property
    def variant(self) -> str:
        return self.folder.parent.name

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.folder.name}"


def load_grid(file: Path, changes: Sequence[str] = ()) -> tuple[Grid, list[Cell]]:
    """A grid and its cells, every one of them checked.

    Args:
        file: YAML with the arguments of ``Grid``.
        changes: ``dotted.path=value`` each: of the grid's own keys (``seeds=[0]``), or else of every cell.

    Raises:
        ConfigError: if the grid is wrong.
        RunError: if cells are wrong, with all errors of all of them.
    """
    of_grid = [change for change in changes if re.split("[.=]", change, maxsplit=1)[0] in arguments(Grid)]
    grid = build(load_config(file, of_grid), Grid, runs.load_part)
    base = runs.find_config(os.path.normpath(file.parent / grid.config))
    cells = list(_cells(grid, base, [change for change in changes if change not in of_grid]))
    _check(cells)
    return grid, cells


def _cells(grid: Grid, base: Path, changes: Sequence[str]) -> Iterator[Cell]:
    """Seed by seed, so that a grid that ends early has every variant with few seeds."""
    axes = grid.grid.values()
    for seed, labels in product(grid.seeds, product(*axes)):
        folder = Path(grid.dir) / "_".join(map(slug, labels)) / f"seed_{seed}"
        layers = [grid.overrides or {}, *(axis[label] for axis, label in zip(axes, labels, strict=True))]
        own = [f"{path}={inline(value)}" for layer in layers for path, value in layer.items()]
        own = [*(change.replace("{seed}", str(seed)) for change in own), *changes]
        whole = [*own, f"run.seed={seed}", f"run.dir={inline(str(folder))}"]
        yield Cell(labels, seed, folder, tuple(own), ("--config", str(base), *whole), load_config(base, whole))


def _check(cells: Sequence[Cell]) -> None:
    wrong: dict[str, list[str]] = {}  # variants by error
    twins: dict[str, str] = {}
    for cell in cells:
        errors = [f"{text}: seeds and dir of the grid decide it" for text in cell.changes if _RESERVED.match(text)]
        try:
            tree = resolve(cell.config, Experiment)
            tree["run"]["dir"] = ""
            if (twin := twins.setdefault(dump_yaml(tree), cell.variant)) != cell.variant:
                errors.append(f"the same runs as {twin}: let an override differ")
        except ConfigError as error:
            errors += [str(problem).removeprefix("command line: ") for problem in error.problems]
        for text in errors:
            wrong.setdefault(text, []).append(cell.variant)
    if wrong:
        lines = [f"{', '.join(dict.fromkeys(variants))}: {text}" for text, variants in wrong.items()]
        raise runs.RunError("\n".join([f"wrong in the cells of the grid, {len(lines)} times:", *lines]))


def choose(cells: Sequence[Cell], pattern: str) -> list[Cell]:
    """The cells whose ``VARIANT/seed_N`` fits a pattern such as ``ntm*/seed_0``.

    Raises:
        RunError: if none does.
    """
    chosen = [cell for cell in cells if fnmatch(cell.name, pattern)]
    if not chosen:
        raise runs.RunError(f"no cell is called '{pattern}'; there are {', '.join(cell.name for cell in cells)}")
    return chosen
