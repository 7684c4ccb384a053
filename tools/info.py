"""Shows what the framework knows, what is in a folder of images, what runs are doing, and what this machine has."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLE = """\
examples:
  python tools/info.py components quantizer
  python tools/info.py data my/photos --decode 5000 --workers 4 --out broken.txt
  python tools/info.py runs
  python tools/info.py doctor
"""


def parse() -> argparse.Namespace:
    form: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "registered components with arguments, defaults and a line on each"
    components = commands.add_parser("components", help=text, description=text, **form)
    components.add_argument("axis", nargs="?", help="only this axis, such as quantizer or encoder")
    text = "formats, sizes, classes, broken files and decoding speed; exits with 1 if there is anything broken"
    data = commands.add_parser("data", help=text, description=text, **form)
    data.add_argument("folder", metavar="DIR", help="a folder of images")
    data.add_argument("--decode", type=int, default=1000, metavar="N", help="decode N random ones, 1000 unless given")
    data.add_argument("--workers", type=int, default=2, metavar="N", help="processes; 2 unless given, 0 for this one")
    data.add_argument("--classes", metavar="FILE", help="look only at the classes that this file lists, one a line")
    data.add_argument("--out", type=Path, metavar="FILE", help="write broken files there, a path and a reason a line")
    text = "a line on each run below folders: state, step, time left, last numbers, starts, alarms"
    runs = commands.add_parser("runs", help=text, description=text, **form)
    runs.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="DIR", help="runs/ unless given")
    text = "versions, devices, optional weights and data, and for what is missing the command that brings it"
    commands.add_parser("doctor", help=text, description=text, **form)
    arguments = parser.parse_args()
    if arguments.command == "data" and min(arguments.decode, arguments.workers) < 0:
        parser.error("--decode and --workers must be at least 0")
    return arguments


def main() -> int:
    arguments = parse()
    try:  # each command imports its own, so that --help is quick
        if arguments.command == "components":
            import framework.components  # noqa: F401  registers every part
            from framework.config import component_list

            print(component_list(arguments.axis))
        elif arguments.command == "runs":
            from framework.launch.status import table

            print(table(arguments.folders))
        elif arguments.command == "doctor":
            from framework.launch.doctor import examination

            print(examination())
        else:
            from framework.data.inspect import inspect_folder
            from framework.runtime.progress import Stages

            with Stages() as progress:
                wanted = (arguments.folder, arguments.classes, arguments.decode, arguments.workers)
                inspection = inspect_folder(*wanted, progress)
            print(*inspection.lines(), sep="\n")
            inspection.write_broken(arguments.out)
            return 1 if inspection.broken or inspection.listing.unreadable else 0
        return 0
    except (LookupError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
