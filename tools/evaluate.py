"""Measure a trained run on held-out images, and leave numbers, plots and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = """\
examples:
  python tools/evaluate.py --run runs/adatok/ntm
  python tools/evaluate.py --run runs/adatok/ntm --split test --lengths 1 4 16
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run directory")
    parser.add_argument("--split", choices=("validation", "test", "train"), default="validation", help="which images")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="kept tokens to measure, increasing")
    parser.add_argument("--limit", type=int, metavar="N", help="measure N images only, always the same")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; evaluation/ of the run unless given")
    arguments = parser.parse_args()

    from framework import runs
    from framework.config import ConfigError
    from framework.engine.checkpoint import CheckpointError

    try:
        runs.evaluate(
            arguments.run, print, arguments.split, arguments.out, lengths=arguments.lengths, limit=arguments.limit
        )
    except (ConfigError, runs.RunError, CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
