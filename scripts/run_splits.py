"""Run a split-point experiment: dense, stage 1, and stage 2 from each split.

    python scripts/run_splits.py --configs configs/demo
    python scripts/run_splits.py --configs configs/530m --nproc 8 -- --debug.seed 2

The same command again continues what was interrupted. What follows `--` goes to every run.
"""

import argparse
from pathlib import Path

from torchtitan_ext import runner


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs", type=Path, required=True, help="folder of dense, stage1 and stage2.toml"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the runs (default: outputs/<name of configs>)"
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a device")
    parser.add_argument(
        "--splits",
        type=int,
        nargs="+",
        default=(),
        help="steps at which stage 2 takes over (default: 10, 11, 12 sixteenths of its steps)",
    )
    parser.add_argument("--only", nargs="+", choices=runner.STAGES, default=runner.STAGES)
    parser.add_argument("overrides", nargs="*", help="torchtitan arguments for every run, after --")
    args = parser.parse_args()
    runner.run_script(
        args.nproc,
        args.configs,
        args.output or Path("outputs") / args.configs.name,
        splits=args.splits,
        only=args.only,
        overrides=args.overrides,
    )


if __name__ == "__main__":
    main()
