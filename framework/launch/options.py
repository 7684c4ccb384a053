"""How a run is launched: the YAML node ``launch:``, and the flags of the tools that stand for it. Imports no torch."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence

from framework.config.yaml import parse_scalar

Option = int | float | str | bool

# sbatch(1), SLURM 22.05 to 25.05; what is not here goes to sbatch too, unless it looks like a slip.
KNOWN = set(
    "setup signal_delay_s "
    "account acctg_freq bb bbf begin chdir cluster_constraint clusters comment consolidate_segments constraint "
    "container container_id contiguous core_spec cores_per_socket cpu_freq cpus_per_gpu cpus_per_task deadline "
    "delay_boot dependency distribution exclude exclusive export export_file extra extra_node_info get_user_env gid "
    "gpu_bind gpu_freq gpus gpus_per_node gpus_per_socket gpus_per_task gres gres_flags hint hold ignore_pbs input "
    "job_name kill_on_invalid_dep licenses mail_type mail_user mcs_label mem mem_bind mem_per_cpu mem_per_gpu mincpus "
    "network nice no_kill no_requeue nodefile nodelist nodes ntasks ntasks_per_core ntasks_per_gpu ntasks_per_node "
    "ntasks_per_socket oom_kill_step overcommit oversubscribe partition power prefer priority profile "
    "propagate qos quiet reboot requeue reservation resv_ports segment sockets_per_node spread_job stepmgr switches "
    "thread_spec threads_per_core time time_min tmp tres_bind tres_per_task uid use_min_nodes verbose wait_all_nodes "
    "wckey".split()
)
DECIDED = {
    "array": "a grid becomes an array: tools/ablate.py --slurm",
    "error": "logs go to slurm/ in the run directory",
    "output": "logs go to slurm/ in the run directory",
    "signal": "write signal_delay_s: seconds from SIGUSR2 to the time limit",
}
FLAGS = {"partition": "P", "nodes": "N", "gpus_per_node": "G", "time": "T", "account": "A", "constraint": "X"}
COUNTS = ("nodes", "ntasks_per_node", "cpus_per_task", "signal_delay_s")


class Launch:
    """How many processes train together, and what SLURM is asked for: the YAML node ``launch:``.

    Args:
        num_processes: on this machine, or on each node.
        slurm: options of sbatch as its manual spells them, with underscores (``time: 12:00:00``, ``gpus_per_node: 8``,
            ``exclusive: true``); what is not in the manual goes to sbatch as it is, since clusters have their own. And
            ``setup``, shell lines before the command, and ``signal_delay_s``, the time to save before the limit (90).
            GPUs get one task each.

    Raises:
        ValueError: if an option is misspelt, decided by the framework, or no count.
    """

    def __init__(self, num_processes: int = 1, slurm: dict[str, Option] | None = None) -> None:
        self.num_processes = num_processes
        self.slurm = slurm or {}
        if num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, got {num_processes}")
        for key, value in self.slurm.items():
            near = difflib.get_close_matches(key.replace("-", "_"), KNOWN, n=1, cutoff=0.85)
            if key in DECIDED:
                raise ValueError(f"slurm.{key} cannot be set: {DECIDED[key]}")
            if near and key not in KNOWN:
                raise ValueError(f"unknown sbatch option '{key}' in slurm: did you mean '{near[0]}'?")
            if key in COUNTS and (type(value) is not int or value < 1):
                raise ValueError(f"slurm.{key} must be an integer of at least 1, got {value}")
        minutes(self.slurm.get("time", 0))
        if self._gpus_per_node not in (0, self.tasks_per_node):
            gpus = f"{self.tasks_per_node} tasks on {self._gpus_per_node} GPUs of a node"
            raise ValueError(f"{gpus}: a task uses one GPU, so leave slurm.ntasks_per_node out, or make it equal")

    @property
    def tasks_per_node(self) -> int:
        """One for each GPU, or as many as asked for."""
        return int(self.slurm.get("ntasks_per_node", self._gpus_per_node or self.num_processes))

    @property
    def _gpus_per_node(self) -> int:
        """From ``8`` or ``a100:8``."""
        count = str(self.slurm.get("gpus_per_node", 0)).rpartition(":")[2]
        if not count.isdecimal():
            raise ValueError(f"slurm.gpus_per_node must be a number or TYPE:NUMBER, got {self.slurm['gpus_per_node']}")
        return int(count)


def minutes(limit: Option) -> int:
    """A time limit as sbatch takes it (``90``, ``12:00:00``, ``2-12``), in minutes, rounded up.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(limit))
    if match is None:
        raise ValueError(f"slurm.time must be minutes, hours:minutes:seconds or days-hours, got {limit}")
    days, *parts = (int(group or 0) for group in match.groups())
    if match[1] is None and match[4] is None:  # minutes or minutes:seconds
        parts = [0, *parts[:2]]
    seconds = ((days * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]
    return -(-seconds // 60)


def count(text: str) -> int:
    """A number of at least 1: the ``type`` of an argument.

    Raises:
        ArgumentTypeError: if it is smaller.
    """
    if int(text) < 1:
        raise ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def add_flags(parser: ArgumentParser) -> None:
    """The flags of a tool that can submit its work to SLURM."""
    group = parser.add_argument_group("SLURM", "the same as launch.slurm in YAML, over which these win")
    group.add_argument("--slurm", action="store_true", help="submit to SLURM; with --dry-run only print the script")
    for name, metavar in FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=parse_scalar, metavar=metavar)
    group.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    group.add_argument("--after", metavar="JOBID", help="start when that job has finished well")


def slurm_flags(parser: ArgumentParser, arguments: Namespace, others: Sequence[str]) -> dict[str, Option]:
    """What the flags say, as ``Launch.slurm`` and ``after``.

    Ends the program where ``--slurm`` is not among them, or goes with one of ``others``, which are for this machine.
    """
    given = {name: getattr(arguments, name) for name in FLAGS}
    flags: dict[str, Option] = {name: value for name, value in given.items() if value is not None}
    for text in arguments.sbatch:
        key, equals, value = text.partition("=")
        flags[key.replace("-", "_")] = parse_scalar(value) if equals else True
    if arguments.after:
        flags["after"] = arguments.after
    if flags and not arguments.slurm:
        parser.error(f"{', '.join(flags)}: only with --slurm")
    if arguments.slurm and (wrong := [f"--{name}" for name in others if getattr(arguments, name)]):
        parser.error(f"{wrong[0]} does not go with --slurm")
    return flags
