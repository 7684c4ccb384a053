"""Measure what the framework costs on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from framework.launch.options import count

EXAMPLE = """\
examples:
  OMP_NUM_THREADS=1 python tools/benchmark.py train --config projects/adatok/ntm.yaml
  OMP_NUM_THREADS=1 python tools/benchmark.py decode --config projects/adatok/ntm.yaml
  OMP_NUM_THREADS=1 python tools/benchmark.py generate --run runs/adatok/ar --batch 1 8 32
  OMP_NUM_THREADS=1 python tools/benchmark.py generate --official path/to/LlamaGen
  OMP_NUM_THREADS=1 python tools/benchmark.py generate --official path/to/DiT --guidance 4 --steps 5
train runs under torchrun too. decode and allocation read no images: IMAGENET_TRAIN=. IMAGENET_VAL=. will do.
"""


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
        ("generate", 3, "decoding of shorter sequences by policy, against full length; or ours against official code"),
        ("quantizer", 10, "vector quantization, forward and backward: ours, TiTok's form, vector-quantize-pytorch"),
    ):
        command = commands.add_parser(name, help=text, description=text, **form)
        command.add_argument("--rounds", default=rounds, help=f"{rounds} unless given", **number)
        if name in ("train", "decode", "allocation"):
            command.add_argument("--config", required=True, metavar="FILE", help="a YAML file")
            command.add_argument("overrides", nargs="*", metavar="dotted.path=value", help="changes to it, in YAML")
        if name in ("decode", "data", "quantizer"):
            command.add_argument("--batch", dest="batch_size", default=64, help="images, 64 unless given", **number)
    train, _, allocation, _, data, generate, quantizer = commands.choices.values()
    train.add_argument("--steps", help="of a round; train.log_every unless given", **number)
    allocation.add_argument("--batch", dest="batch_sizes", nargs="+", default=[1, 64], help="1 64 by default", **number)
    allocation.add_argument("--shortest", default=1, help="length to choose, 1 unless given", **number)
    data.add_argument("--root", required=True, metavar="DIR", help="a folder of images or of shards")
    data.add_argument("--image-size", default=256, help="side, 256 unless given", **number)
    data.add_argument("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="0 2 unless given")
    for option, default in (("codes", 4096), ("dim", 12), ("tokens", 256)):
        quantizer.add_argument(f"--{option}", default=default, help=f"{default} unless given", **number)
    generate.add_argument("--run", type=Path, metavar="DIR", help="of an autoregressive generator; else one is made")
    generate.add_argument("--official", type=Path, metavar="DIR", help="a checkout of LlamaGen, or of DiT")
    generate.add_argument("--batch", dest="batch_sizes", nargs="+", help="1 8 32, with --official 8", **number)
    generate.add_argument("--guidance", type=float, default=2.0, metavar="SCALE", help="2 unless given; 1 is none")
    generate.add_argument("--size", help="of LlamaGen, or WIDTHxDEPTHxHEADS; 128x4x4, with --official B or S/2")
    generate.add_argument("--steps", help="of DDPM beside an official DiT, 10 unless given", **number)
    generate.add_argument("--images", help="of a round for each at a time, 16 unless given", **number)
    generate.add_argument("--lengths", nargs="+", metavar="N|FILE", help="drawn from these, or a token file's")
    generate.add_argument("--modes", nargs="+", choices=("none", "eos", "hazard", "prefix"), help="all unless given")
    return parser.parse_args()


def main() -> int:
    options = vars(parse())
    from framework.launch.benchmarks import ERRORS, benchmark_lines

    try:
        for line in benchmark_lines(**options):
            print(line, flush=True)
    except ERRORS as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
