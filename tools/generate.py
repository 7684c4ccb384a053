"""Make images of classes with the generator of a run: pictures, a grid, an npz for the ADM evaluator, and a record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.launch.options import count

EXAMPLE = """\
examples:
  python tools/generate.py --run runs/adatok/ar --num 64 --out samples
  python tools/generate.py --run runs/adatok/ar --num 64 --classes 3 7 --guidance 1.5 --interval 0 0.5 --out samples
  python tools/generate.py --run runs/adatok/ar --num 50000 --guidance 1.5 --seed 1 --batch 128 --out many
Image i depends on the seed, i and its class, not (but for rounding) on --num, --batch and --policy. record.json has
all that made them.
A command that was stopped goes on when it is given again.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run or exported folder of a generator")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--num", type=count, default=64, metavar="N", help="images, 64 unless given, classes in turn")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C", help="labels from 0, all unless given")
    text = "tokens that images of a class have, in turn; as many as the generator finds right unless given"
    parser.add_argument("--lengths", type=count, nargs="+", metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0 unless given")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="which; best of train.best")
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument("--guidance", type=float, default=1.0, metavar="SCALE", help="1 unless given, which is none")
    text = "of progress from 0 to 1, outside of which there is none"
    guidance.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help=text)
    schedules = ("constant", "linear", "power_cosine")
    guidance.add_argument("--schedule", choices=schedules, default="constant", help="how it comes to its scale")
    guidance.add_argument("--power", type=float, default=1.0, metavar="P", help="of power_cosine, 1 unless given")
    own = parser.add_argument_group("settings", "of the generator, where it has them, in place of its own")
    own.add_argument("--temperature", type=float, metavar="T", help="of drawn codes; 0 takes the likeliest")
    own.add_argument("--top-k", type=count, metavar="K", help="draw among so many codes")
    own.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that reach this probability")
    own.add_argument("--policy", choices=("static", "compact", "refill"), help="of autoregressive decoding")
    own.add_argument("--batch", dest="batch_size", type=count, metavar="N", help="images at a time")
    try:
        return generate(**vars(parser.parse_args()))
    except KeyboardInterrupt:  # even while torch is imported
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def generate(guidance: float, interval: Sequence[float], schedule: Any, power: float, **given: Any) -> int:
    from framework.generators.guidance import Guidance
    from framework.launch.generating import ERRORS, generate_images
    from framework.runtime.progress import Stages

    try:
        guided = Guidance(guidance, (interval[0], interval[1]), schedule, power)
        with Stages() as progress:
            generate_images(progress=progress, say=print, guidance=guided, **given)
    except ERRORS as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
