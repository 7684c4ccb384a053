"""Measure what the framework costs on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLE = """\
examples:
  OMP_NUM_THREADS=1 python tools/benchmark.py train --config projects/adatok/ntm.yaml
  OMP_NUM_THREADS=1 python tools/benchmark.py decode --config projects/adatok/ntm.yaml
  OMP_NUM_THREADS=1 python tools/benchmark.py allocation --config projects/adatok/ntm.yaml --batch 1 64
  OMP_NUM_THREADS=1 python tools/benchmark.py attention
  OMP_NUM_THREADS=1 python tools/benchmark.py data --root my/photos
  OMP_NUM_THREADS=1 python tools/benchmark.py quantizer --codes 4096 --dim 12
  OMP_NUM_THREADS=1 python tools/benchmark.py generate --run runs/adatok/ar --batch 1 8 32
  OMP_NUM_THREADS=1 python tools/benchmark.py generate --lengths 4 8 12 16 --modes hazard prefix
  OMP_NUM_THREADS=1 python tools/benchmark.py generate --official path/to/LlamaGen --rounds 3
train runs under torchrun too. decode and allocation read no images, so a data root may be any folder:
  IMAGENET_TRAIN=. IMAGENET_VAL=. python tools/benchmark.py decode --config projects/adatok/imagenet/ntm.yaml --batch 4
"""


def count(text: str) -> int:
    if int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")


def parse() -> argparse.Namespace:
    form: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    number: dict[str, Any] = {"type": count, "metavar": "N"}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds, text in (
        ("train", 10, "training images/s of the trainer and of a plain loop in torch, on the configuration's data"),
        ("decode", 20, "time to decode a batch at several lengths, with random weights and without autocast"),
        ("allocation", 10, "time to choose lengths by a learned policy and by binary search, with random weights"),
        ("attention", 10, "explicit and fused attention, and which of them the framework takes"),
        ("data", 10, "images/s from a folder of images or shards: the framework, decoding alone, and other loaders"),
        ("generate", 3, "decoding of shorter sequences by policy, against full length; or against LlamaGen's sampler"),
        ("quantizer", 10, "vector quantization, forward and backward: ours, TiTok's form, vector-quantize-pytorch"),
    ):
        command = commands.add_parser(name, help=text, description=text, **form)
        command.add_argument("--rounds", default=rounds, help=f"{rounds} unless given", **number)
        if name in ("train", "decode", "allocation"):
            command.add_argument("--config", required=True, metavar="FILE", help="a YAML file")
            command.add_argument("overrides", nargs="*", metavar="dotted.path=value", help="changes to it, in YAML")
        if name in ("decode", "data", "quantizer"):
            command.add_argument("--batch", dest="batch_size", default=64, help="images, 64 unless given", **number)
    train, allocation, data, quantizer = (commands.choices[n] for n in ("train", "allocation", "data", "quantizer"))
    train.add_argument("--steps", help="of a round; train.log_every unless given", **number)
    allocation.add_argument("--batch", dest="batch_sizes", nargs="+", default=[1, 64], help="1 64 by default", **number)
    allocation.add_argument("--shortest", default=1, help="length to choose, 1 unless given", **number)
    data.add_argument("--root", required=True, metavar="DIR", help="a folder of images or of shards")
    data.add_argument("--image-size", default=256, help="side, 256 unless given", **number)
    data.add_argument("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="0 2 unless given")
    for option, default in (("codes", 4096), ("dim", 12), ("tokens", 256)):
        quantizer.add_argument(f"--{option}", default=default, help=f"{default} unless given", **number)
    generate = commands.choices["generate"]
    which = generate.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, metavar="DIR", help="of an autoregressive generator; else one is made")
    which.add_argument("--official", type=Path, metavar="DIR", help="a checkout of FoundationVision/LlamaGen")
    text = "images at a time, 1 8 32 unless given, or 8 beside the official sampler"
    generate.add_argument("--batch", dest="batch_sizes", nargs="+", help=text, **number)
    generate.add_argument("--guidance", type=float, default=2.0, metavar="SCALE", help="2 unless given; 1 is none")
    generate.add_argument("--size", help="LlamaGen's B to 3B, or WIDTHxDEPTHxHEADS; 128x4x4, or the official B")
    generate.add_argument("--lengths", nargs="+", metavar="N|FILE", help="drawn from these, or a token file's")
    generate.add_argument("--modes", nargs="+", choices=("none", "eos", "hazard", "prefix"), help="all unless given")
    generate.add_argument("--codes", help="of the vocabulary, 4096 unless given", **number)
    generate.add_argument("--images", help="of a round, for each at a time; 8 unless given", **number)
    generate.add_argument("--tokens", help="of an image, 256 unless given, beside the official sampler", **number)
    return parser.parse_args()


def main() -> int:
    options = vars(parse())
    from framework import runs
    from framework.config import ConfigError
    from framework.launch.benchmarks import benchmark_lines

    try:
        for line in benchmark_lines(**options):
            print(line, flush=True)
    except (ConfigError, runs.RunError, ValueError, TypeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
