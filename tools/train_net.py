"""Train what a configuration describes; the same command again continues an unfinished run."""

from __future__ import annotations

import argparse
import sys

EXAMPLE = """\
examples:
  python tools/train_net.py --config projects/adatok/ntm.yaml
  python tools/train_net.py --config projects/adatok/ntm.yaml train.max_steps=500 run.dir=runs/short
  python tools/train_net.py --config projects/adatok/ntm.yaml run.dir=runs/mine \\
      data.train.name=ImageFolder data.train.root=photos
  python tools/train_net.py --config projects/adatok/ntm.yaml --profile
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="dotted.path=value", help="changes to it, in YAML")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as run.seed=N")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="only check the configuration, and list all that is wrong")
    only.add_argument("--dry-run", action="store_true", help="only build, and print parameters, operations and steps")
    only.add_argument("--profile", action="store_true", help="time ten steps aside; leave a trace and a table")
    only.add_argument("--fresh", action="store_true", help="move an older run aside, and start anew")
    arguments = parser.parse_intermixed_args()  # changes may stand before and after --check

    from framework import runs
    from framework.config import ConfigError, load_config
    from framework.engine.checkpoint import CheckpointError
    from framework.engine.turns import NonFiniteError

    overrides = arguments.overrides + ([] if arguments.seed is None else [f"run.seed={arguments.seed}"])
    try:
        config = load_config(runs.find_config(arguments.config), overrides)
        if arguments.check:
            runs.check(config)
            print(f"{arguments.config} is right")
        elif arguments.dry_run:
            print(runs.dry_run(config))
        elif arguments.profile:
            runs.profile(config, print)
        else:
            outcome = runs.train(config, print, fresh=arguments.fresh)
            return 0 if outcome.status == "finished" else 130
    except (ConfigError, runs.RunError, CheckpointError, NonFiniteError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved stays, and the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
