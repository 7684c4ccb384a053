"""Measure what the framework costs on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

EXAMPLE = """\
examples:
  OMP_NUM_THREADS=1 python tools/benchmark.py train --config projects/adatok/ntm.yaml
  OMP_NUM_THREADS=1 python tools/benchmark.py decode --config projects/adatok/ntm.yaml
  OMP_NUM_THREADS=1 python tools/benchmark.py attention
  OMP_NUM_THREADS=1 python tools/benchmark.py data --root my/photos
decoding reads no images, so a data root that the configuration asks for may be any folder:
  IMAGENET_TRAIN=. IMAGENET_VAL=. python tools/benchmark.py decode --config projects/adatok/imagenet/ntm.yaml --batch 4
"""


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def parse() -> argparse.Namespace:
    form: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds, text in (
        ("train", 10, "training images/s of the trainer and of a plain loop in torch, on the configuration's data"),
        ("decode", 20, "time to decode a batch at several lengths, with random weights and without autocast"),
        ("attention", 10, "explicit and fused attention, and which of them the framework takes"),
        ("data", 10, "images/s from a folder: the framework, a loop that only decodes, and torchvision"),
    ):
        command = commands.add_parser(name, help=text, description=text, **form)
        command.add_argument("--rounds", type=count, default=rounds, metavar="N", help=f"{rounds} unless given")
        if name in ("train", "decode"):
            command.add_argument("--config", required=True, metavar="FILE", help="a YAML file")
            command.add_argument("overrides", nargs="*", metavar="dotted.path=value", help="changes to it, in YAML")
        if name == "train":
            command.add_argument("--steps", type=count, metavar="N", help="of a round; train.log_every unless given")
        if name in ("decode", "data"):
            command.add_argument("--batch", type=count, default=64, metavar="N", help="images at once, 64 unless given")
        if name == "data":
            command.add_argument("--root", required=True, metavar="DIR", help="a folder of images")
            command.add_argument("--image-size", type=count, default=256, metavar="N", help="side, 256 unless given")
            command.add_argument("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="0 2 unless given")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    from framework import runs
    from framework.config import ConfigError, load_config
    from framework.engine import benchmark, data_benchmark

    try:
        if arguments.command == "attention":
            lines = benchmark.attention_lines(arguments.rounds)
        elif arguments.command == "data":
            sizes = arguments.image_size, arguments.batch
            lines = data_benchmark.loading_lines(arguments.root, *sizes, arguments.workers, arguments.rounds)
        else:
            experiment = runs.experiment_from(load_config(runs.find_config(arguments.config), arguments.overrides))
            if arguments.command == "train":
                lines = benchmark.training_lines(experiment, arguments.rounds, arguments.steps)
            else:
                lines = benchmark.decoding_lines(experiment, arguments.rounds, arguments.batch)
        for line in lines:
            print(line, flush=True)
    except (ConfigError, runs.RunError, ValueError, TypeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
