"""Shows what the framework knows."""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Shows what the framework knows.",
        epilog="example: python tools/info.py components quantizer",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    components = commands.add_parser(
        "components",
        help="registered components with arguments, defaults and a line on each",
        epilog="example: python tools/info.py components quantizer",
    )
    components.add_argument("axis", nargs="?", help="only this axis, such as quantizer or encoder")
    arguments = parser.parse_args()

    import framework.components  # noqa: F401  registers every part; imported late so that --help is quick
    from framework.config import component_list

    try:
        print(component_list(arguments.axis))
    except LookupError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
