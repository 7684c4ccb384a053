"""Turns official checkpoints into weights of this framework, and says how a configuration names them."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

EXAMPLE = """\
examples:
  python tools/convert.py import ldm vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt vavae.safetensors
  python tools/convert.py import maskgit_vqgan maskgit-vqgan-imagenet-f16-256.bin maskgit.safetensors
families:
  ldm            VA-VAE, whose latents_stats.pt may follow, SD-VAE in its authors' layout, and other autoencoders of LDM
  maskgit_vqgan  MaskGIT's VQGAN as TiTok's authors have converted it
  taming_vqgan   VQGANs of taming transformers
  titok          TiTok and One-D-Piece; those of two stages come with their pixel decoder. Tensors do not tell num_heads
                 and normalize: those that are written are the released models', so compare them with your config
"""
FAMILIES = {
    "ldm": "convolutional",
    "maskgit_vqgan": "convolutional",
    "taming_vqgan": "convolutional",
    "titok": "titok",
}


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "read an official checkpoint, check that every tensor has its place, and write OUT"
    reading = commands.add_parser("import", help=text, description=text, epilog=EXAMPLE, formatter_class=form)
    reading.add_argument("family", metavar="FAMILY", choices=FAMILIES, help=", ".join(FAMILIES))
    reading.add_argument("files", metavar="IN", nargs="+", type=Path, help="official files, pickled or safetensors")
    reading.add_argument("out", metavar="OUT", type=Path, help="a .safetensors file")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".safetensors":
        parser.error(f"OUT must end in .safetensors, got {arguments.out}")
    return arguments


def main() -> int:
    given = parse()
    from framework import components  # noqa: F401 - registers every part
    from framework.config import dump_yaml
    from framework.interop.official import OfficialError, read_official

    try:
        state = read_official(given.files)
        read = getattr(importlib.import_module(f"framework.interop.{FAMILIES[given.family]}"), f"import_{given.family}")
        imported = read(state)
        imported.save(given.out)
    except KeyError as error:
        some = ", ".join(sorted(state)[:3])
        print(f"this is no {given.family} checkpoint: it has no tensor {error}. It begins with {some}", file=sys.stderr)
        return 2
    except (OfficialError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    left_out = f", without {len(imported.dropped)} of other parts" if imported.dropped else ""
    size = f", for data.image_size={imported.image_size}" if imported.image_size else ""
    print(f"wrote {len(state) - len(imported.dropped)} tensors to {given.out}{left_out}; at {imported.part}{size}:")
    print(dump_yaml(imported.full_node() | {"weights": str(given.out)}), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
