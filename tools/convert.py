"""Exports trained models as folders of their own, and turns official checkpoints into weights of this framework."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

EXAMPLE = """\
examples:
  python tools/convert.py export runs/adatok/ata exports/adatok-ata --license Apache-2.0
  python tools/convert.py import ldm vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt vavae.safetensors
  python tools/convert.py import maskgit_vqgan maskgit-vqgan-imagenet-f16-256.bin maskgit.safetensors
framework.load and weights: take an exported folder, and after hf upload NAME/ID exports/adatok-ata its id, NAME/ID
families:
  ldm            VA-VAE, whose latents_stats.pt may follow, SD-VAE in its authors' layout, and other autoencoders of LDM
  maskgit_vqgan  MaskGIT's VQGAN as TiTok's authors have converted it; taming_vqgan, those of taming transformers
  titok          TiTok and One-D-Piece; those of two stages come with their pixel decoder. Tensors do not tell num_heads
                 and normalize: those that are written are the released models', so compare them with your config
  llamagen, dit  LlamaGen's class-conditional generators, and DiT, whose tokens are patches of latents
"""
FAMILIES = dict.fromkeys(("ldm", "maskgit_vqgan", "taming_vqgan"), "convolutional")
FAMILIES |= {name: name for name in ("titok", "llamagen", "dit")}


def parse() -> argparse.Namespace:
    form: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "write a run's model to a folder that loads without the run, its data and the runs it was built on"
    exporting = commands.add_parser("export", help=text, description=text, **form)
    exporting.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    exporting.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    exporting.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help="best as train.best says")
    exporting.add_argument("--license", metavar="NAME", help="of the weights, such as Apache-2.0, for the model card")
    text = "read an official checkpoint, check that every tensor has its place, and write OUT"
    reading = commands.add_parser("import", help=text, description=text, **form)
    reading.add_argument("family", metavar="FAMILY", choices=FAMILIES, help=", ".join(FAMILIES))
    reading.add_argument("files", metavar="IN", nargs="+", type=Path, help="official files, pickled or safetensors")
    reading.add_argument("out", metavar="OUT", type=Path, help="a .safetensors file")
    arguments = parser.parse_args()
    if arguments.command == "import" and arguments.out.suffix != ".safetensors":
        parser.error(f"OUT must end in .safetensors, got {arguments.out}")
    return arguments


def main() -> int:
    given = parse()
    from framework import runs
    from framework.config import ConfigError, dump_yaml
    from framework.engine.checkpoint import CheckpointError
    from framework.interop.official import read_official
    from framework.models.export import export

    try:
        if given.command == "export":
            digest = export(given.run, given.out, given.checkpoint, given.license)
            print(f"wrote {given.out}, weights with SHA-256 {digest}; it loads with framework.load({str(given.out)!r})")
            return 0
        module = importlib.import_module(f"framework.interop.{FAMILIES[given.family]}")
        state = read_official(given.files, getattr(module, "PREFERRED", ()))
        imported = getattr(module, f"import_{given.family}")(state)
        imported.save(given.out)
    except KeyError as error:
        print(f"this is no {given.family} checkpoint, it has no tensor {error}: {sorted(state)[:3]}", file=sys.stderr)
        return 2
    except (ConfigError, runs.RunError, CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    left_out = f", without {len(imported.dropped)} of other parts" if imported.dropped else ""
    size = f", for data.image_size={imported.image_size}" if imported.image_size else ""
    print(f"wrote {len(imported.weights)} tensors to {given.out}{left_out}; at {imported.part}{size}:")
    print(dump_yaml(imported.full_node() | {"weights": str(given.out)}), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
