"""Puts evaluated runs side by side in one table, in the columns of AdaTok's Table 1; nothing is measured anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = """\
examples:
  python tools/report.py --run runs/adatok/ntm runs/adatok/full_length runs/adatok/ata --out runs/table1.md
  python tools/report.py --run runs/adatok/ntm runs/adatok/ata --evaluation evaluation_test --lengths 4 --out table1.tex
Evaluate the runs first, all on the same images: python tools/evaluate.py --run DIR --split test
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, nargs="+", metavar="DIR", help="run directories")
    text = "which evaluation of each run; the one that training leaves unless given"
    parser.add_argument("--evaluation", default="evaluation", metavar="NAME", help=text)
    text = "rows for these lengths too, of tokenizers that were measured there"
    parser.add_argument("--lengths", type=int, nargs="+", default=[], metavar="N", help=text)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="a .md, .tex or .csv file")
    given = parser.parse_args()

    from framework.evaluation.system_table import write_system_table

    evaluations = {str(run): run / given.evaluation / "metrics.json" for run in given.run}
    try:
        print(write_system_table(evaluations, given.out, given.lengths).strip())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
