"""Train on two processes, kill one of them at a random time, continue, and compare with a run that nobody killed.

    python tests/faults/kill_ranks.py --tries 10

Every try ends a process by SIGKILL once or more; the command must end with the reason, and the run that is continued
must end bit for bit as the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "launch.num_processes=2", "run.threads=1", "data.image_size=16", "data.train.num_crops=300", "train.batch_size=8",
    "data.validation.num_crops=40", "tokenizer.encoder.width=32", "tokenizer.encoder.depth=1", "train.max_steps=300",
    "tokenizer.decoder.width=32", "tokenizer.decoder.depth=1", "train.log_every=10", "train.validate_every=60",
    "train.validate_images=16", "train.checkpoint_every=20", "train.precision=float32",
]  # fmt: skip


def start(folder: Path) -> subprocess.Popen[str]:
    tool = [sys.executable, str(ROOT / "tools/train_net.py"), "--config", "projects/adatok/ntm.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*tool, f"run.dir={folder}", *SETTINGS], env=environment, **output)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that train, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children]


def last_step(folder: Path) -> int:
    """Of the last line of numbers."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def results(folder: Path) -> dict[str, bytes]:
    """What must be equal: weights, optimizer and averages of the last checkpoint, and the metrics."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = [*last.iterdir(), folder / "metrics.jsonl"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name != "manifest.json"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        whole = start(Path(name) / "whole")
        said = whole.communicate()[0]
        assert whole.returncode == 0, said
        took = time.monotonic() - began
        wanted = results(Path(name) / "whole")
        print(f"undisturbed: {took:.1f} s, {len(wanted)} files", flush=True)
        for attempt in range(1, arguments.tries + 1):
            folder, told = Path(name) / f"try_{attempt}", []
            for _ in range(draw.choice([1, 2])):
                first = last_step(folder)
                run, rank = start(folder), draw.choice([0, 1])
                wanted_step = draw.randrange(first, 280)
                while run.poll() is None and last_step(folder) <= wanted_step:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.3))
                os.kill(ranks_of(run)[rank], signal.SIGKILL)
                killed, step = time.monotonic(), last_step(folder)
                said = run.communicate()[0]
                ended = time.monotonic() - killed
                told.append(f"rank {rank} killed behind step {step}, all ended {ended:.1f} s later")
                assert f"process {rank} of 2 failed (killed by SIGKILL)" in said and ended < 60, said
            last = start(folder)
            said = last.communicate()[0]
            assert last.returncode == 0, said
            same = results(folder) == wanted
            equal += same
            print(f"try {attempt}: {'; '.join(told)}: {'bit-identical' if same else 'DIFFERENT'}", flush=True)
    print(f"{equal} of {arguments.tries} bit-identical")
    return 0 if equal == arguments.tries else 1


if __name__ == "__main__":
    sys.exit(main())
