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
  python tools/train_net.py --config projects/adatok/ntm.yaml --slurm --nodes 2 --gpus-per-node 8 --time 12:00:00
"""


def main() -> int:
    from framework.launch.options import add_flags, slurm_flags

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
    add_flags(parser)
    arguments = parser.parse_intermixed_args()  # changes may stand before and after --check
    flags = slurm_flags(parser, arguments, ("check", "profile", "fresh"))
    overrides = arguments.overrides + ([] if arguments.seed is None else [f"run.seed={arguments.seed}"])
    if arguments.slurm:
        from framework.launch.slurm import submit_training

        return submit_training(arguments.config, overrides, flags, arguments.dry_run)

    from framework import runs
    from framework.config import ConfigError, load_config
    from framework.engine.checkpoint import CheckpointError
    from framework.engine.turns import NonFiniteError
    from framework.launch import local
    from framework.runtime.ranks import PeerError

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
            return local.train(config, [sys.executable, __file__, *sys.argv[1:]], arguments.fresh)
    except (ConfigError, runs.RunError, CheckpointError, NonFiniteError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except PeerError as error:
        print(error, file=sys.stderr)
        return local.PEER_ERROR
    except KeyboardInterrupt:
        print("interrupted; what was saved stays, and the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
