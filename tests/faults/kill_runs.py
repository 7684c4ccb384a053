"""Kill training runs at random times, up to three times each, and compare them with one that was left alone.

Each run is a process of its own (tools/train_net.py): photographs, loader workers, accumulated gradients, Muon,
averaged weights, best and last checkpoints. SIGKILL goes to the main process alone, as the kernel sends it when memory
runs out, and the next start comes at once, while the loader's workers may still live. Everything that a run leaves is
compared byte by byte: checkpoints (weights, averages, optimizers, generators, data position), metric lines, evaluation;
only wall-clock times and the log may differ.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = """\
examples:
  python tests/faults/kill_runs.py
  python tests/faults/kill_runs.py --runs 3 --seed 7 --out /tmp/kills train.max_steps=100
"""
SETTINGS = [
    "run.threads=1",
    "data.num_workers=2",
    "data.train.num_crops=3000",
    "data.validation.num_crops=64",
    "tokenizer.encoder.width=64",
    "tokenizer.decoder.width=64",
    "train.max_steps=300",
    "train.batch_size=32",
    "train.accumulate=2",
    "train.log_every=10",
    "train.validate_every=50",
    "train.validate_images=32",
    "train.checkpoint_every=20",
    "train.best={metric: validation/mse@4}",
]
OWN = ("log.txt", "timing.jsonl", "run.json", "run.lock", "config.yaml")
MOST_KILLS = 3
SECONDS_FOR_WORKERS = 30.0


def start(folder: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config", str(ROOT / "projects/adatok/ntm.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *settings, f"run.dir={folder}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that a process has started, and that live."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(process: subprocess.Popen[bytes]) -> list[int]:
    """SIGKILL to the main process alone; returns the workers that it leaves."""
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return workers


def wait_for_end(workers: list[int]) -> None:
    """Wait until orphaned workers are gone."""
    deadline = time.monotonic() + SECONDS_FOR_WORKERS
    while any(map(is_alive, workers)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"of the workers {workers} some live {SECONDS_FOR_WORKERS:.0f} s after their parent")
        time.sleep(0.05)


def step_reached(folder: Path) -> int:
    """The last step that the metrics tell of."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines() if (folder / "metrics.jsonl").exists() else []
    steps = [int(found[1]) for line in lines if (found := re.match(rb'\{"step": (\d+)', line))]
    return max(steps, default=0)


def left(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, without times and its own name."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    own = str(folder).encode()
    return {name: content.replace(own, b"RUN") for name, content in found.items() if name not in OWN}


def differences(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    return [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]


def killed_run(folder: Path, settings: list[str], generator: random.Random, seconds: float) -> str:
    """Train until the end in spite of kills, each at most so many seconds after a start; returns what happened."""
    events: list[str] = []
    workers: list[int] = []
    while True:
        process = start(folder, settings)
        wait = generator.uniform(0, seconds)
        try:
            finish(process, wait if len(events) < MOST_KILLS else None)
            if events:
                break
            shutil.rmtree(folder)  # it was through before it was killed once: again
        except subprocess.TimeoutExpired:
            workers += kill(process)
            events.append(f"killed after {wait:.1f} s at step {step_reached(folder)}")
    wait_for_end(workers)
    resumed = [str(int(step)) for step in re.findall(r"continuing from .*step_(\d+)", (folder / "log.txt").read_text())]
    return "; ".join([*events, f"resumed from {', '.join(resumed) or 'nothing'}", f"{len(workers)} orphans gone"])


def finish(process: subprocess.Popen[bytes], timeout: float | None = None) -> None:
    _, errors = process.communicate(timeout=timeout)
    if process.returncode:
        raise RuntimeError(f"the run failed with exit code {process.returncode}: {errors.decode()[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the runs; a temporary folder unless given")
    parser.add_argument("overrides", nargs="*", metavar="dotted.path=value", help="changes to the configuration")
    arguments = parser.parse_intermixed_args()
    settings = [*SETTINGS, *arguments.overrides]
    out = arguments.out or Path(tempfile.mkdtemp(prefix="kill_runs_"))

    begin = time.monotonic()
    finish(start(out / "undisturbed", settings))
    seconds = time.monotonic() - begin
    expected = left(out / "undisturbed")
    print(f"undisturbed: {seconds:.1f} s, {step_reached(out / 'undisturbed')} steps, {len(expected)} files", flush=True)
    generator = random.Random(arguments.seed)
    identical = 0
    for number in range(1, arguments.runs + 1):
        folder = out / f"killed_{number:02d}"
        story = killed_run(folder, settings, generator, seconds)
        wrong = differences(expected, left(folder))
        identical += not wrong
        print(f"run {number}: {story}: {'differs in ' + ', '.join(wrong) if wrong else 'bit-identical'}", flush=True)
        if not wrong:
            shutil.rmtree(folder)
    print(f"{identical} of {arguments.runs} bit-identical")
    if arguments.out is None and identical == arguments.runs:
        shutil.rmtree(out)
    return 0 if identical == arguments.runs else 1


if __name__ == "__main__":
    sys.exit(main())
