"""Run a split-point experiment: dense, stage 1, and stage 2 from each split.

    python scripts/run_splits.py --configs configs/demo
    python scripts/run_splits.py --configs configs/530m --nproc 8 -- --debug.seed 2

The same command again continues what was interrupted. What follows `--` goes to every run.
"""

import argparse
from pathlib import Path

import _start

from torchtitan_ext.command_line import at_least, local_path

STAGES = ("dense", "stage1", "stage2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs",
        metavar="FOLDER",
        type=local_path,
        required=True,
        help="folder of dense, stage1 and stage2.toml",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=local_path,
        help="folder of the runs (default: outputs/<name of configs>)",
    )
    parser.add_argument(
        "--nproc",
        metavar="N",
        type=at_least(1),
        default=1,
        help="processes, one a device (default: 1)",
    )
    parser.add_argument(
        "--splits",
        type=at_least(1),
        nargs="+",
        metavar="STEP",
        default=(),
        help="steps at which stage 2 takes over (default: 10, 11, 12 sixteenths of its steps)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="which of the runs (default: all)",
    )
    parser.add_argument("overrides", nargs="*", help="torchtitan arguments for every run, after --")
    args = parser.parse_args()
    from torchtitan_ext import runner

    runs = runner.plan(
        args.configs,
        args.output or Path("outputs") / args.configs.resolve().name,
        splits=args.splits,
        only=args.only,
        overrides=args.overrides,
    )
    runner.run_all(runs, args.nproc)


if __name__ == "__main__":
    _start.run(main)
