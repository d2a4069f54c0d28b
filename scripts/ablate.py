"""Run cells of the published ablation grid: stage 1 to step 10,000, then stage 2 to the end.

    python scripts/ablate.py                                        # list the cells
    python scripts/ablate.py --cells L3-p4-k1536-norm --nproc 8

A cell is its settings in configs/published.toml on top of the TOMLs in --configs. The table of one:
python scripts/make_table.py outputs/ablations/<cell>
"""

import argparse
from pathlib import Path

import tomli

from torchtitan_ext import runner

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(cell: dict) -> list[str]:
    """A cell's settings as torchtitan arguments."""
    return [
        f"--{section}.{field}={value}"
        for section, fields in cell["settings"].items()
        for field, value in fields.items()
    ]


def main() -> None:
    grid = tomli.loads((CONFIGS / "published.toml").read_text())["ablations"]
    cells = {cell["run"]: arguments(cell) for cell in grid}

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=cells,
        metavar="CELL",
        help="all of them are listed without it",
    )
    parser.add_argument(
        "--configs",
        type=Path,
        default=CONFIGS / "530m",
        help="folder of dense, stage1 and stage2.toml (default: configs/530m)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/ablations"),
        help="folder of the cells' runs (default: outputs/ablations)",
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a device")
    parser.add_argument(
        "--splits",
        type=int,
        nargs="+",
        default=[10_000],
        help="steps at which stage 2 takes over (default: 10000)",
    )
    parser.add_argument("overrides", nargs="*", help="torchtitan arguments for every run, after --")
    args = parser.parse_args()
    if not args.cells:
        for name, settings in cells.items():
            print(f"{name:26}", *settings)
    for name in args.cells or ():
        runner.run_script(
            args.nproc,
            args.configs,
            args.output / name,
            splits=args.splits,
            only=("stage1", "stage2"),
            overrides=[*cells[name], *args.overrides],
        )


if __name__ == "__main__":
    main()
