"""Train a grid of changes to one configuration over seeds, and write the table; again, and it goes on where it was."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

EXAMPLE = """\
examples:
  python tools/ablate.py --config projects/adatok/ablations/masking.yaml --dry-run
  python tools/ablate.py --config projects/adatok/ablations/masking.yaml --jobs 2
  python tools/ablate.py --config projects/adatok/ablations/masking.yaml --only 'ntm*/seed_0'
  python tools/ablate.py --config projects/adatok/ablations/masking.yaml --slurm --partition gpu --jobs 8
  python tools/ablate.py --config projects/adatok/ablations/masking.yaml dir=runs/short seeds=[0] train.max_steps=100
"""


def main() -> int:
    from framework.launch.options import add_flags, slurm_flags

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a grid, in YAML")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time")
    parser.add_argument("--only", default="*", metavar="GLOB", help="train only cells of such names (VARIANT/seed_N)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="only list the cells, their changes and what is finished")
    only.add_argument("--report", action="store_true", help="only write the tables and the plot again")
    changes = "changes to the grid (dir, seeds, ...), or else to every cell, in YAML"
    parser.add_argument("overrides", nargs="*", metavar="dotted.path=value", help=changes)
    add_flags(parser)
    arguments = parser.parse_intermixed_args()
    flags = slurm_flags(parser, arguments, ["report"])
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")

    from framework import runs
    from framework.ablation.grid import choose, load_grid
    from framework.ablation.report import write_report
    from framework.ablation.submission import submit_cells
    from framework.ablation.training import survey, train_cells
    from framework.config import ConfigError
    from framework.launch.slurm import SubmissionError

    try:
        grid, cells = load_grid(runs.find_config(arguments.config), arguments.overrides)
        chosen = choose(cells, arguments.only)
        if arguments.slurm:
            print(submit_cells(grid, chosen, flags, arguments.jobs, arguments.dry_run))
        elif arguments.dry_run:
            finished, refused = survey(cells)
            for cell in chosen:
                state = "finished" if cell in finished else "other run" if cell in refused else "to train"
                print(f"{state:10} {cell.name}: {' '.join(cell.changes) or 'no changes'}")
        elif arguments.report:
            finished, refused = survey(cells)
            write_report(grid, cells, finished)
            print((Path(grid.dir) / "table.md").read_text())
            for cell, reason in refused.items():
                print(f"left out {cell.name}: {reason}", file=sys.stderr)
        else:
            program = [sys.executable, str(Path(__file__).with_name("train_net.py"))]
            say = functools.partial(print, flush=True)  # a pipe shows each line when it is said
            outcome = train_cells(grid, cells, chosen, program, arguments.jobs, say)
            print(f"{outcome}; {Path(grid.dir) / 'table.md'}")
            return {"finished": 0, "failed": 1, "stopped": 130}[outcome]
    except (ConfigError, SubmissionError, runs.RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved stays, and the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
