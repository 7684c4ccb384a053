"""Submitting a grid to SLURM: the cells that are left become one array of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from framework.ablation.grid import Cell, Grid
from framework.ablation.training import survey
from framework.launch.options import Option
from framework.launch.queue import last_job, queued
from framework.launch.slurm import launch_options, script, submit, what_to_do
from framework.runs import RunError
from framework.runtime.lock import is_held


def submit_cells(grid: Grid, chosen: Sequence[Cell], flags: Mapping[str, Option], jobs: int, dry_run: bool) -> str:
    """Submit those of the chosen cells that are neither finished nor queued; returns what to tell about it.

    Args:
        grid: has the logs in ``slurm/``.
        chosen: cells, all launched alike.
        flags: as from ``slurm_flags``.
        jobs: cells at a time.
        dry_run: return the script.

    Raises:
        RunError: if cells differ in their ``launch:``.
        ConfigError, SubmissionError: as ``submit``.
    """
    if any(cell.config.tree.get("launch") != chosen[0].config.tree.get("launch") for cell in chosen):
        raise RunError("cells that differ in launch: cannot be one array: submit them apart, with --only")
    launch, folder, queue = launch_options(chosen[0].config, flags), Path(grid.dir), queued()
    finished, refused = survey(chosen)
    busy = [cell for cell in chosen if is_held(cell.folder) or last_job(cell.folder).get("job") in queue]
    left = [cell for cell in chosen if cell not in finished and cell not in refused and cell not in busy]
    lines = [f"failed {cell.name}: {reason}" for cell, reason in refused.items()]
    lines.append(f"{len(chosen)} cells, {len(finished)} finished, {len(busy)} queued or running, {len(left)} to submit")
    if left and dry_run:
        return script(folder, launch, folder.name, len(left), jobs)
    if left:
        ids = submit([cell.config for cell in left], folder, launch, folder.name, jobs)
        lines += [what_to_do(ids, folder, launch), "again, the same command submits what is missing; --report collects"]
    return "\n".join(lines)
