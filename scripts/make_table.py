"""Make the split-point table and plot from the records that scripts/run_splits.py left.

python scripts/make_table.py outputs/demo
python scripts/make_table.py outputs/small --other-seeds outputs/small-seed2 --ablations outputs/ablations/*
"""

import argparse
from pathlib import Path

import tomli

from torchtitan_ext import split_points

PUBLISHED = Path(__file__).parents[1] / "configs" / "published.toml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the experiment: dense/, stage1/, stage2-*/")
    parser.add_argument("--out", type=Path, help="where table and plot go (default: the folder)")
    parser.add_argument(
        "--other-seeds",
        type=Path,
        nargs="+",
        default=[],
        help="the same experiment from other seeds",
    )
    parser.add_argument(
        "--ablations",
        type=Path,
        nargs="+",
        default=[],
        help="experiments with other settings of Lighthouse, as scripts/ablate.py leaves them",
    )
    args = parser.parse_args()
    try:
        text, paths = split_points.write(
            args.folder,
            args.out or args.folder,
            tomli.loads(PUBLISHED.read_text()),
            args.other_seeds,
            args.ablations,
        )
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"make_table: {error}\n")
    print(text)
    for kind, path in zip(("table", "table, as CSV", "curves, as CSV", "plot"), paths, strict=True):
        print(f"{kind}: {path}")
    print(f"records: {args.folder}/*/tb (TensorBoard)")


if __name__ == "__main__":
    main()
