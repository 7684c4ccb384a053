"""Turn a folder of images into WebDataset shards with an index, or make the index of shards from elsewhere."""

from __future__ import annotations

import argparse
import sys
from typing import Any

EXAMPLE = """\
examples:
  python tools/make_shards.py my/photos my/shards --workers 8
  python tools/make_shards.py imagenet/train shards/train --resize 256 --classes LOC_synset_mapping.txt
  python tools/make_shards.py --index downloaded/shards
Work that was stopped goes on when the same command is run again. Train with data.train.name=Shards data.train.root=OUT.
"""


def above_zero(kind: type[float]) -> Any:
    def number(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return number


def parse() -> argparse.Namespace:
    form: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    parser.add_argument("root", metavar="DIR", help="a folder of images, or of shards with --index")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the folder of shards: new, or of work that was stopped")
    parser.add_argument("--index", action="store_true", help="only make DIR/index.json for the .tar files in DIR")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-size", type=above_zero(float), metavar="MB", help="about so much; 100 unless given")
    size.add_argument("--images-per-shard", type=above_zero(int), metavar="N", help="instead of a size")
    parser.add_argument("--workers", type=above_zero(int), default=2, metavar="N", help="processes, 2 unless given")
    text = "bring longer shorter sides to so many pixels, as JPEG; otherwise files stay as they are, byte by byte"
    parser.add_argument("--resize", type=above_zero(int), metavar="SIDE", help=text)
    parser.add_argument("--files", metavar="LIST", help="the images to take: a relative path and a class a line")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes in the order of their numbers")
    text = "share of images that may be unreadable and left out, 0.01 unless given"
    parser.add_argument("--max-broken", type=float, metavar="SHARE", help=text)
    arguments = parser.parse_args()
    of_images = ("out", "shard_size", "images_per_shard", "resize", "files", "max_broken")
    if arguments.index and any(getattr(arguments, name) is not None for name in of_images):
        parser.error("--index takes DIR, --classes and --workers, nothing else")
    if not arguments.index and arguments.out is None:
        parser.error("OUT is missing: the folder to write shards to")
    return arguments


def main() -> int:
    given = parse()
    from framework.data.shard_writer import index_shards, write_shards
    from framework.runtime.progress import Stages

    try:
        with Stages() as progress:
            if given.index:
                index = index_shards(given.root, given.classes, given.workers, progress)
            else:
                size, broken = given.shard_size or 100.0, 0.01 if given.max_broken is None else given.max_broken
                sizes = (given.images_per_shard, size, given.workers, given.resize)
                index = write_shards(given.root, given.out, *sizes, given.files, given.classes, broken, progress)
    except (ValueError, OSError, RuntimeError) as error:  # a worker that is killed is a RuntimeError
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(index.line(given.out or given.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
