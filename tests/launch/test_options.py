from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import pytest

from framework.launch.options import Launch, add_flags, minutes, slurm_flags


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        (90, 90),
        ("90", 90),
        ("0:30", 1),
        ("90:01", 91),
        ("12:00:00", 720),
        ("1:02:03", 63),
        ("2-12", 3600),
        ("1-2:03", 1563),
        ("1-0:0:0", 1440),
    ],
)
def test_time_limits_as_sbatch_reads_them(limit: int | str, wanted: int) -> None:
    assert minutes(limit) == wanted


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"partiton": "x"}, "unknown sbatch option 'partiton' in slurm: did you mean 'partition'?"),
        ({"gpus-per-node": 2}, "did you mean 'gpus_per_node'?"),
        ({"time": "tomorrow"}, "slurm.time must be minutes, hours:minutes:seconds or days-hours, got tomorrow"),
        ({"nodes": "2-4"}, "slurm.nodes must be an integer of at least 1, got 2-4"),
        ({"nodes": 0}, "slurm.nodes must be an integer of at least 1, got 0"),
        ({"gpus_per_node": "a100"}, "slurm.gpus_per_node must be a number or TYPE:NUMBER, got a100"),
        ({"gpus_per_node": 8, "ntasks_per_node": 4}, "4 tasks on 8 GPUs of a node: a task uses one GPU"),
        ({"output": "x"}, "slurm.output cannot be set: logs go to slurm/"),
        ({"array": "0-3"}, "slurm.array cannot be set: a grid becomes an array"),
        ({"signal": "USR1@5"}, "slurm.signal cannot be set: write signal_delay_s"),
    ],
)
def test_wrong_options_are_refused(slurm: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Launch(slurm=slurm)
    assert message in str(caught.value)


def test_a_cluster_may_have_options_of_its_own() -> None:
    assert Launch(slurm={"container_image": "x", "fairness": 3}).slurm == {"container_image": "x", "fairness": 3}


@pytest.mark.parametrize(
    ("slurm", "processes", "tasks"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        ({"gpus_per_node": 8}, 1, 8),
        ({"gpus_per_node": "a100:4"}, 2, 4),
        ({"ntasks_per_node": 3}, 2, 3),
        ({"gpus_per_node": 0}, 2, 2),
    ],
)
def test_tasks_on_a_node(slurm: dict[str, Any], processes: int, tasks: int) -> None:
    assert Launch(processes, slurm).tasks_per_node == tasks
    with pytest.raises(ValueError, match="num_processes must be at least 1, got 0"):
        Launch(0)


def flags_of(*words: str) -> dict[str, Any]:
    parser = ArgumentParser()
    parser.add_argument("--check", action="store_true")
    add_flags(parser)
    return slurm_flags(parser, parser.parse_args(words), ["check"])


def test_flags_become_options() -> None:
    words = "--slurm --nodes 2 --gpus-per-node a100:8 --time 12:00:00 --partition p --account a --constraint x&y"
    words += " --after 7 --sbatch mail-type=END --sbatch exclusive --sbatch nice=5 --sbatch x=a=b"
    assert flags_of(*words.split()) == {
        "partition": "p", "nodes": 2, "gpus_per_node": "a100:8", "time": "12:00:00", "account": "a",
        "constraint": "x&y", "mail_type": "END", "exclusive": True, "nice": 5, "x": "a=b", "after": "7",
    }  # fmt: skip
    assert flags_of() == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", "--sbatch", "qos=x"], "nodes, qos: only with --slurm"),
        (["--after", "7"], "after: only with --slurm"),
        (["--slurm", "--check"], "--check does not go with --slurm"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        flags_of(*words)
    assert message in capsys.readouterr().err
