"""Make the split-point table and plot from the records that scripts/run_splits.py left.

python scripts/make_table.py outputs/demo
python scripts/make_table.py outputs/small --other-seeds outputs/small-seed2 --ablations outputs/ablations/*
"""

import argparse
from pathlib import Path

import _start

from torchtitan_ext.command_line import local_path

PUBLISHED = Path(__file__).parents[1] / "configs" / "published.toml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=local_path, help="the experiment: dense/, stage1/, stage2-*/"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=local_path,
        help="where table and plot go (default: the folder)",
    )
    parser.add_argument(
        "--other-seeds",
        type=local_path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="the same experiment from other seeds (default: none)",
    )
    parser.add_argument(
        "--ablations",
        type=local_path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="experiments with other settings of Lighthouse, as scripts/ablate.py leaves them (default: none)",
    )
    args = parser.parse_args()
    import tomllib

    from torchtitan_ext import split_points

    text, paths = split_points.write(
        args.folder,
        args.out or args.folder,
        tomllib.loads(PUBLISHED.read_text()),
        args.other_seeds,
        args.ablations,
    )
    print(text)
    for kind, path in zip(("table", "table, as CSV", "curves, as CSV", "plot"), paths, strict=True):
        print(f"{kind}: {path}")
    print(f"records: {args.folder}/*/tb (TensorBoard)")


if __name__ == "__main__":
    _start.run(main)
