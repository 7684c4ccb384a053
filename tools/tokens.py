"""Tokens on disk: encode images, decode them again, and see what a file holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from framework.launch.options import count

EXAMPLE = """\
examples:
  python tools/tokens.py encode my/photos --run runs/adatok/ata --out my/photos.tokens
  python tools/tokens.py encode dataset --split train --run runs/adatok/ntm --length quality:0.01 --out train.tokens
  python tools/tokens.py decode my/photos.tokens --run runs/adatok/ata --length 4 --out my/rebuilt
  python tools/tokens.py compare my/photos.tokens my/photos --run runs/adatok/ata
  python tools/tokens.py info my/photos.tokens
An encoding that was stopped goes on when the same command is run again. docs/tokens.md has the format.
"""


def parse() -> argparse.Namespace:
    form: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    number: dict[str, Any] = {"type": count, "metavar": "N"}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="write the tokens of images", **form)
    encode.add_argument("--length", default="auto", help="auto (the default), N, quality:MSE or quality:MSE:binary")
    encode.add_argument("--crops", default=1, **number, help="of each image; those of a folder are flipped at random")
    encode.add_argument("--dtype", choices=("codes", "float16", "float32"), help="codes if there are, else float32")
    text = "of a folder's images that may be unreadable, and are left out; 0.01 by default"
    encode.add_argument("--max-broken", type=float, metavar="SHARE", help=text)
    encode.add_argument("--batch", dest="batch_size", default=64, **number, help="images at a time, 64 by default")
    encode.add_argument("--rows-per-file", default=20_000, **number, help="20000 by default; a stop costs one file")
    encode.add_argument("--workers", dest="num_workers", default=0, **number, help="that read ahead; none by default")
    decode = commands.add_parser("decode", help="write the images of tokens, as PNG", **form)
    decode.add_argument("--rows", type=int, nargs=2, metavar=("FROM", "TO"), help="TO is left out; all by default")
    compare = commands.add_parser("compare", help="errors beside those of JPEG and WebP in as many bytes", **form)
    compare.add_argument("--limit", default=256, **number, help="images, always the same; 256 by default")
    commands.add_parser("info", help="what is in a file", **form)
    commands.add_parser("verify", help="read everything and compare digests; exits with 1 if it is damaged", **form)
    for command in (encode, decode, compare):
        command.add_argument("--run", required=True, type=Path, metavar="DIR", help="the tokenizer's, or exported")
    for command in (encode, decode):
        command.add_argument("--out", required=True, type=Path, metavar="OUT", help="a file; of images, a new folder")
    for command in (decode, compare):
        command.add_argument("--length", **number, help="read at most N tokens of each")
    for name in ("decode", "compare", "info", "verify"):
        commands.choices[name].add_argument("file", metavar="FILE", help="or a set, without -00000-of-...")
    for command in (encode, compare):
        command.add_argument("images", metavar="DIR|dataset", help="a folder of images, or 'dataset' for the run's own")
        command.add_argument("--split", choices=("train", "validation", "test"), help="of 'dataset'; else validation")
        command.add_argument("--crop", metavar="NAME", help="of a folder; CenterCrop by default, RandomCrop of several")
    return parser.parse_args()


def main() -> int:
    given = parse()
    from framework.launch.tokens import ERRORS, run_command
    from framework.runtime.progress import Stages

    try:
        with Stages() as progress:
            run_command(progress=progress, say=print, **vars(given))
    except ERRORS as error:
        print(error, file=sys.stderr)
        return 1 if given.command == "verify" else 2
    except KeyboardInterrupt:
        print("interrupted; an encoding goes on with the same command", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
