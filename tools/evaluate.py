"""Measure trained runs on held-out images, and leave numbers, plots and pictures; several runs are compared."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = """\
examples:
  python tools/evaluate.py --run runs/adatok/ntm
  python tools/evaluate.py --run runs/adatok/ntm --split test --lengths 1 4 16
  python tools/evaluate.py --run runs/adatok/ntm runs/adatok/full_length --out runs/comparison
  python tools/evaluate.py --run runs/adatok/ntm --distances STLPIPS EfficientNetLite0
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, nargs="+", metavar="DIR", help="run directories")
    parser.add_argument("--split", choices=("validation", "test", "train"), default="validation", help="which images")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="kept tokens to measure, increasing")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="which; best of train.best")
    parser.add_argument("--limit", type=int, metavar="N", help="measure N images only, always the same")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results; evaluation_SPLIT of the run unless given")
    judges = "extractors of perceptual distances to measure too, such as STLPIPS; those of the run unless given"
    parser.add_argument("--distances", nargs="+", metavar="NAME", help=judges)
    arguments = parser.parse_args()
    if len(arguments.run) > 1 and arguments.out is None:
        parser.error("to compare several runs, say where the results go: --out DIR")
    if len(arguments.run) > 1 and arguments.checkpoint == "best":
        parser.error("several runs are compared by their latest checkpoints")
    measured = {name: getattr(arguments, name) for name in ("split", "lengths", "limit", "distances")}

    from framework import runs
    from framework.config import ConfigError
    from framework.engine.checkpoint import CheckpointError

    try:
        if len(arguments.run) > 1:
            runs.compare(arguments.run, print, arguments.out, **measured)
        else:
            runs.evaluate(arguments.run[0], print, out=arguments.out, checkpoint=arguments.checkpoint, **measured)
    except (ConfigError, runs.RunError, CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
