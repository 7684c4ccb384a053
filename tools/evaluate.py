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
  python tools/evaluate.py --run runs/adatok/ntm --distances STLPIPS --features EfficientNetLite0Features
  python tools/evaluate.py --run runs/adatok/discrete/ntm --split test --probe
  python tools/evaluate.py --run runs/adatok/discrete/ntm --split test --judge
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
    networks = "networks to compare whole sets in, such as EfficientNetLite0Features or, for rFID, InceptionV3"
    parser.add_argument("--features", nargs="+", metavar="NAME", help=networks)
    instead = parser.add_mutually_exclusive_group()
    text = "measure linear probes of the tokens, on labelled images, instead; of TiTok's and AdaTok's readout with mean"
    readouts = ("concatenated", "mean")
    instead.add_argument("--probe", nargs="?", const="concatenated", choices=readouts, metavar="READOUT", help=text)
    text = "let a small classifier, trained for it, judge reconstructions of labelled images instead"
    instead.add_argument("--judge", action="store_true", help=text)
    given = parser.parse_args()
    if len(given.run) > 1 and given.out is None:
        parser.error("to compare several runs, say where the results go: --out DIR")
    if len(given.run) > 1 and given.checkpoint == "best":
        parser.error("several runs are compared by their latest checkpoints")
    if (given.probe or given.judge) and (len(given.run) > 1 or given.distances or given.features):
        parser.error("--probe and --judge take one run, and neither distances nor features")
    measured = {name: getattr(given, name) for name in ("split", "lengths", "limit", "out")}

    from framework import runs
    from framework.config import ConfigError
    from framework.engine.checkpoint import CheckpointError
    from framework.launch.judging import judge
    from framework.launch.probing import probe

    try:
        if given.judge:
            judge(given.run[0], print, checkpoint=given.checkpoint, **measured)
        elif given.probe:
            probe(given.run[0], print, given.probe, checkpoint=given.checkpoint, **measured)
        else:
            measured |= {"distances": given.distances, "features": given.features}
            if len(given.run) > 1:
                runs.compare(given.run, print, **measured)
            else:
                runs.evaluate(given.run[0], print, checkpoint=given.checkpoint, **measured)
    except (ConfigError, runs.RunError, CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
