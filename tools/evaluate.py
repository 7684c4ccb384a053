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
  python tools/evaluate.py --run runs/adatok/discrete/ntm --split test --probe
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
    text = "measure linear probes of the tokens, on labelled images, instead; of TiTok's and AdaTok's readout with mean"
    readouts = ("concatenated", "mean")
    parser.add_argument("--probe", nargs="?", const="concatenated", choices=readouts, metavar="READOUT", help=text)
    arguments = parser.parse_args()
    if len(arguments.run) > 1 and arguments.out is None:
        parser.error("to compare several runs, say where the results go: --out DIR")
    if len(arguments.run) > 1 and arguments.checkpoint == "best":
        parser.error("several runs are compared by their latest checkpoints")
    if arguments.probe and (len(arguments.run) > 1 or arguments.distances):
        parser.error("--probe takes one run, and no distances")
    measured = {name: getattr(arguments, name) for name in ("split", "lengths", "limit")}

    from framework import runs
    from framework.config import ConfigError
    from framework.engine.checkpoint import CheckpointError
    from framework.launch.probing import probe

    try:
        if len(arguments.run) > 1:
            runs.compare(arguments.run, print, arguments.out, distances=arguments.distances, **measured)
        elif arguments.probe:
            one = {"out": arguments.out, "checkpoint": arguments.checkpoint}
            probe(arguments.run[0], print, arguments.probe, **one, **measured)
        else:
            one = {"out": arguments.out, "checkpoint": arguments.checkpoint, "distances": arguments.distances}
            runs.evaluate(arguments.run[0], print, **one, **measured)
    except (ConfigError, runs.RunError, CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
