"""Submitting runs to SLURM through submitit (https://github.com/facebookincubator/submitit). Imports no torch.

What a job trains is written when it is submitted, to ``RUN_DIR/slurm/config_N.yaml``: a requeued job reads that,
whatever has become of the files it was made of. ``RUN_DIR/slurm/jobs.jsonl`` lists a run's jobs with their logs.
"""

from __future__ import annotations

import io
import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from framework.config.errors import ConfigError, Problem
from framework.config.find import find_config
from framework.config.load import load_config
from framework.config.yaml import Config, dump_yaml
from framework.launch.job import TrainingJob
from framework.launch.options import Launch, Option, minutes
from framework.launch.queue import FOLDER, last_job, queued, record_job
from framework.runtime.files import write_text

TIME = "4:00:00"
"""The limit unless given. A run that needs more is requeued there and goes on, as often as it takes."""
MAX_TIMEOUTS = 1000


class SubmissionError(RuntimeError):
    """SLURM does not take a job; the text says why."""


def submit_training(path: str, overrides: Sequence[str], flags: Mapping[str, Option], dry_run: bool) -> int:
    """Submit one run, or only print the script; tells what came of it, and returns the exit code of a tool.

    Args:
        path: of the configuration, which is read here; its parts are checked where the job runs.
        overrides: changes to it.
        flags: as from ``slurm_flags``.
        dry_run: print the script.
    """
    try:
        config = load_config(find_config(path), overrides)
        launch, folder = launch_options(config, flags), run_dir(config)
        job = last_job(folder).get("job", "")
        if dry_run:
            print(script(folder, launch, folder.name))
        elif (state := queued().get(job)) and "after" not in flags:
            raise SubmissionError(f"{folder} is job {job} already, {state}: wait for it, or end it with scancel {job}")
        else:
            print(what_to_do(submit([config], folder, launch, folder.name), folder, launch))
    except (ConfigError, SubmissionError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_dir(config: Config) -> Path:
    """Where the run lives.

    Raises:
        ConfigError: if the configuration does not say.
    """
    run = config.tree.get("run")
    if isinstance(run, dict) and isinstance(run.get("dir"), str):
        return Path(run["dir"])
    raise ConfigError([Problem(config.source(("run",)), ("run", "dir"), "expected the folder of the run, as a string")])


def launch_options(config: Config, flags: Mapping[str, Option]) -> Launch:
    """The node ``launch:`` of a configuration under the flags of the command line.

    Raises:
        ConfigError: if something in them is wrong, or the configuration cannot be read.
    """
    if config.problems:
        raise ConfigError(config.problems)
    try:
        node = dict(config.tree.get("launch") or {})
        slurm = {**(node.pop("slurm", None) or {}), **flags}
        if after := slurm.pop("after", None):
            slurm["dependency"] = ",".join(filter(None, [slurm.get("dependency"), f"afterok:{after}"]))
        return Launch(**node, slurm=slurm)
    except (TypeError, ValueError) as error:
        raise ConfigError([Problem(config.source(("launch",)), ("launch",), str(error))]) from error


def script(folder: Path, launch: Launch, name: str, num_runs: int = 1, parallel: int = 1) -> str:
    """The file that ``submit`` would hand to sbatch."""
    logs = (folder / FOLDER).absolute()
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    count = num_runs if num_runs > 1 else None
    return _make_sbatch_string(command, logs, map_count=count, **_parameters(launch, name, parallel))


def submit(configs: Sequence[Config], folder: Path, launch: Launch, name: str, parallel: int = 1) -> list[str]:
    """Submit runs as one job, or as one array of jobs.

    Args:
        configs: of the runs.
        folder: has the logs in ``slurm/``.
        launch: what SLURM is asked for, for each run.
        name: of the job.
        parallel: how many runs of an array at a time.

    Returns:
        The jobs' ids.

    Raises:
        SubmissionError: if there is no SLURM here, or it refuses.
    """
    try:
        executor = submitit.SlurmExecutor(folder / FOLDER, max_num_timeout=MAX_TIMEOUTS)
    except RuntimeError as error:
        raise SubmissionError("there is no SLURM here: no srun. --slurm --dry-run only prints the script") from error
    executor.update_parameters(**_parameters(launch, name, parallel))
    files = [_write_config(config) for config in configs]
    try:
        with redirect_stderr(io.StringIO()), executor.batch():  # where submitit prints what it also raises
            jobs = [executor.submit(TrainingJob(file)) for file in files]
    except (FailedJobError, FailedSubmissionError) as error:
        for file in files:
            file.unlink()
        raise SubmissionError(f"SLURM does not take the job:\n{error}") from error
    for job, file in zip(jobs, files, strict=True):
        record_job(file.parents[1], job.job_id, JobPaths(executor.folder, job.job_id).stdout)
    return [str(job.job_id) for job in jobs]


def what_to_do(ids: Sequence[str], folder: Path, launch: Launch) -> str:
    """For people, after a submission: where things are, and how to watch and to end them."""
    job = ids[0].partition("_")[0]
    size = f"{launch.slurm.get('nodes', 1)} nodes x {launch.tasks_per_node} tasks"
    jobs = f"{len(ids)} runs of {size}" if len(ids) > 1 else size
    logs = os.path.relpath(folder / FOLDER)
    log = Path(logs) / f"{ids[0]}_0_log.out"
    return (
        f"submitted job {job}: {jobs}. The configuration is checked when it starts\n"
        f"logs:   {logs}/\n"
        f"watch:  python tools/info.py runs {folder}; tail -F {log}\n"
        f"cancel: scancel {job} (saves first, and submitting again continues)"
    )


def _parameters(launch: Launch, name: str, parallel: int) -> dict[str, Any]:
    """As submitit calls them; options that it does not read itself go past it."""
    defaults: dict[str, Any] = {"job_name": name, "requeue": True, "time": TIME, "nodes": 1}
    options = defaults | launch.slurm
    options = {key: value for key, value in options.items() if value is not False and key != "ntasks_per_node"}
    srun = ["--kill-on-bad-exit=1"]
    if "cpus_per_task" in options:
        srun.append(f"--cpus-per-task={options['cpus_per_task']}")  # since SLURM 22.05 it does not inherit this one
    return {
        "time": minutes(options.pop("time")),
        "nodes": options.pop("nodes"),
        "ntasks_per_node": launch.tasks_per_node,
        "signal_delay_s": options.pop("signal_delay_s", 90),
        # A signal to the whole job must not end the shell, and with it the job, before it was queued again.
        "setup": ["trap : USR2", *str(options.pop("setup", "")).splitlines()],
        "array_parallelism": parallel,
        "srun_args": srun,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": options,
    }


def _write_config(config: Config) -> Path:
    """What was asked for, without how it is launched, in a file of its own."""
    folder = run_dir(config).absolute() / FOLDER
    tree = {key: node for key, node in config.tree.items() if key != "launch"}
    file = next(path for n in itertools.count(1) if not (path := folder / f"config_{n}.yaml").exists())
    write_text(file, dump_yaml(tree))
    return file
