"""What a grid shows: means over seeds, differences to its first variant paired by seed, and curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from framework.ablation.grid import Cell, Grid, Metric
from framework.evaluation.plots import plot_curves
from framework.evaluation.tables import Estimate, column_texts, csv_text, estimate, latex, markdown
from framework.runtime.files import write_text

MEANS = "Mean ± standard deviation over seeds, the best of each column in bold"
DIFFERENCES = "Difference to '{}', paired by seed: mean ± standard error over seeds"

Labels = tuple[str, ...]
Variants = Mapping[Labels, Sequence[Estimate | None]]
"""One estimate for each column."""


def write_report(grid: Grid, cells: Sequence[Cell], finished: Collection[Cell]) -> None:
    """Leave ``table.md``, ``table.tex``, ``table.csv``, ``summary.json`` and ``plot.png`` in the grid's folder.

    Args:
        grid: says what is shown.
        cells: all of them.
        finished: those that have results.

    Raises:
        RunError: if a cell has not got what a metric asks for.
    """
    folder = Path(grid.dir)
    columns = {_heading(name, at): metric for name, metric in grid.metrics.items() for at in metric.lengths or ()}
    values: dict[Labels, dict[str, dict[int, float]]] = {cell.labels: defaultdict(dict) for cell in cells}
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    records = []
    for cell in [cell for cell in cells if cell in finished]:
        metrics = json.loads((cell.folder / "evaluation/metrics.json").read_text())
        axes = {f"grid.{axis}": label for axis, label in zip(grid.grid, cell.labels, strict=True)}
        record: dict[str, object] = {"cell": cell.name, **axes, "seed": cell.seed}
        for name, metric in grid.metrics.items():
            for length, value in metric.read(metrics).items():
                record[_heading(metric.path, length)] = value
                values[cell.labels][_heading(name, length)][cell.seed] = value * metric.scale
                if metric.lengths is None:
                    columns.setdefault(_heading(name, length), metric)
                if length is not None:
                    curve = curves.setdefault(name, {}).setdefault(", ".join(cell.labels), {})
                    curve.setdefault(length, []).append(value * metric.scale)
        records.append(record | _protocol(cell, metrics))

    first = cells[0].labels
    means = {labels: [estimate([*by[heading].values()]) for heading in columns] for labels, by in values.items()}
    differences = {
        labels: [estimate(_differences(by[heading], values[first][heading]), of_the_mean=True) for heading in columns]
        for labels, by in values.items()
        if labels != first
    }
    missing = [cell.name for cell in cells if cell not in finished]
    notes = [f"{len(cells) - len(missing)} of {len(cells)} cells finished, missing: {', '.join(missing) or 'none'}"]
    for key in ("steps", "images", "split", "git") if records else ():
        notes.append(f"{key}: {', '.join(dict.fromkeys(str(record[key]) for record in records))}")
    words = len(grid.grid) + 1
    tables = {MEANS: (_rows(grid, columns, means), words, {(row, words + at) for row, at in _best(columns, means)})}
    if differences:
        tables[DIFFERENCES.format(", ".join(first))] = _rows(grid, columns, differences), words, set()

    texts = [f"{title}:\n\n{markdown(*table)}\n" for title, table in tables.items()]
    write_text(folder / "table.md", "".join([*texts, *(f"- {note}\n" for note in notes)]))
    texts = [f"% {title}\n{latex(*table)}" for title, table in tables.items()]
    write_text(folder / "table.tex", "".join([*texts, *(f"% {note}\n" for note in notes)]))
    write_text(folder / "table.csv", csv_text(records))
    both = {"means": means, "differences": differences}
    variants = [
        {"labels": dict(zip(grid.grid, labels, strict=True))}
        | {key: _by_heading(columns, found.get(labels, ())) for key, found in both.items()}
        for labels in values
    ]
    write_text(folder / "summary.json", json.dumps({"missing": missing, "variants": variants}, indent=1) + "\n")
    if curves:
        errors = [name for name, metric in grid.metrics.items() if metric.best == "lowest"]
        plot_curves(curves, errors, folder / "plot.png")


def _heading(metric: str, length: int | None) -> str:
    return metric if length is None else f"{metric} @ {length}"


def _protocol(cell: Cell, metrics: Any) -> dict[str, object]:
    """How a cell's numbers came about, as far as it says."""
    parts = [metrics, *(part for part in metrics.values() if isinstance(part, dict))]  # a generator has one for all
    protocol: dict[str, Any] = next((part["protocol"] for part in parts if "protocol" in part), {})
    sessions = json.loads((cell.folder / "run.json").read_text())["sessions"]
    times = [
        [datetime.strptime(session[key], "%Y-%m-%dT%H:%M:%S%z").timestamp() for key in ("started", "ended")]
        for session in sessions
        if "ended" in session  # a killed one has no end
    ]
    return {
        "steps": sessions[-1]["step"],
        "images": protocol.get("images"),
        "split": protocol.get("data", {}).get("split"),
        "git": sessions[-1]["git"],
        "seconds": sum(ended - started for started, ended in times),
    }


def _differences(values: Mapping[int, float], first: Mapping[int, float]) -> list[float]:
    """By seed, where both have it."""
    return [value - first[seed] for seed, value in values.items() if seed in first]


def _best(columns: Mapping[str, Metric], means: Variants) -> set[tuple[int, int]]:
    """Rows, from 1, and columns of the best means."""
    places = set()
    for at, metric in enumerate(columns.values()):
        found = {row: entry.mean for row, entries in enumerate(means.values(), 1) if (entry := entries[at])}
        best = (min if metric.best == "lowest" else max)(found.values(), default=None)
        places |= {(row, at) for row, mean in found.items() if mean == best}
    return places


def _rows(grid: Grid, columns: Iterable[str], variants: Variants) -> list[list[str]]:
    """A header; then labels, the number of seeds and estimates of each variant."""
    by_column = [column_texts(column) for column in zip(*variants.values(), strict=True)]
    texts = [[column[row] for column in by_column] for row in range(len(variants))]
    counts = [str(max((entry.num_values for entry in entries if entry), default=0)) for entries in variants.values()]
    rows = [[*labels, count, *row] for labels, count, row in zip(variants, counts, texts, strict=True)]
    return [[*grid.grid, "seeds", *columns], *rows]


def _by_heading(columns: Iterable[str], entries: Iterable[Estimate | None]) -> dict[str, dict[str, Any]]:
    return {heading: entry._asdict() for heading, entry in zip(columns, entries, strict=False) if entry}
