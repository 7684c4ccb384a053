"""What SLURM runs: the callable that submitit pickles, starts in every task, and queues again. Imports torch late."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission

from framework.runtime.files import append_text

FAILED = "failed: "
"""How the line begins that says, in the job's log, why it has ended."""
FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Below the ports that Linux gives to whoever asks for any (32768 and up)."""


def rendezvous(environment: JobEnvironment) -> dict[str, str]:
    """torchrun's variables for this task; all tasks of a job find the same address without talking."""
    return {
        "RANK": str(environment.global_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_RANK": str(environment.local_rank),
        "MASTER_ADDR": environment.hostnames[0],
        "MASTER_PORT": str(FIRST_PORT + int(environment.raw_job_id) % NUM_PORTS),
    }


@dataclass(frozen=True)
class TrainingJob:
    """Trains one run in every task of a job.

    SIGUSR2, which SLURM sends ahead of the time limit and some clusters ahead of a preemption, saves and queues the job
    again. SIGTERM saves and ends it. What ends one task ends all, and its reason stands in the log of the first.

    Args:
        config: the file that was written when the job was submitted.
    """

    config: Path

    def __call__(self) -> None:
        environment = submitit.JobEnvironment()
        os.environ.update(rendezvous(environment))
        _remove_torn_dump(environment)

        from framework import runs
        from framework.config import ConfigError, load_config
        from framework.engine.checkpoint import CheckpointError
        from framework.engine.turns import NonFiniteError
        from framework.launch.environment import joined
        from framework.runtime.ranks import PeerError

        try:
            with joined() as ranks:
                status = runs.train(load_config(self.config), print, ranks=ranks).status
        except PeerError as error:
            sys.exit(str(error))
        except Exception as error:
            _tell(environment, error)
            if isinstance(error, (ConfigError, runs.RunError, CheckpointError, NonFiniteError, OSError)):
                sys.exit(str(error))
            raise
        if status == "preempted":
            _hand_over(environment)
        elif status == "stopped" and environment.global_rank == 0:
            sys.exit(130)  # so that no job that waits for this one begins; another rank's code would end this one early

    def checkpoint(self) -> DelayedSubmission:
        """The job that goes on; submitit asks for it inside a signal handler, so nothing is computed here."""
        return DelayedSubmission(self)


def _hand_over(environment: JobEnvironment) -> None:
    """Let submitit's own handler, which is back in place, queue the job again; SLURM then ends all tasks."""
    if environment.global_rank == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
    while True:  # a task that ended now would end the first one before it has queued the job
        time.sleep(1)


def _tell(environment: JobEnvironment, error: Exception) -> None:
    """Say on one line in the log of the first task what has failed, wherever it was."""
    paths = environment.paths
    paths.task_id = 0
    rank = f"rank {environment.global_rank} of {environment.num_tasks} on {environment.hostname}"
    append_text(paths.stdout, f"{FAILED}{rank}: {type(error).__name__}: {' '.join(str(error).split())}\n")


def _remove_torn_dump(environment: JobEnvironment) -> None:
    """What a kill left while the job was queued again; submitit would refuse to write over it."""
    if environment.global_rank == 0:
        pickle = environment.paths.submitted_pickle
        pickle.with_name(f"{pickle.name}.save_tmp").unlink(missing_ok=True)
