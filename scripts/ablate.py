"""Run cells of an ablation grid: stage 1 to ten sixteenths of the steps, then stage 2 to the end.

    python scripts/ablate.py                                        # list the cells of the published grid
    python scripts/ablate.py --cells L3-p4-k1536-norm --nproc 8
    python scripts/ablate.py --configs configs/small --grid configs/small/ablations.toml --cells all

A cell is its settings in the grid on top of the TOMLs in --configs. The table of one:
python scripts/make_table.py outputs/ablations/<cell>
"""

import argparse
from pathlib import Path

import tomli

from torchtitan_ext import runner

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(cell: dict) -> list[str]:
    """A cell's settings as torchtitan arguments."""
    found = []
    for section, fields in cell["settings"].items():
        for field, value in fields.items():
            values = value if isinstance(value, list) else [value]
            found += [f"--{section}.{field}", *map(str, values)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cells", nargs="+", metavar="CELL", help="names, or all; else they are listed"
    )
    parser.add_argument(
        "--grid",
        type=Path,
        default=CONFIGS / "published.toml",
        help="TOML with [[ablations]], each a run and its settings (default: configs/published.toml)",
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
    parser.add_argument("--splits", type=int, nargs="+", help="steps at which stage 2 takes over")
    parser.add_argument("overrides", nargs="*", help="torchtitan arguments for every run, after --")
    args = parser.parse_args()
    for file in (args.grid, args.configs / "stage2.toml"):
        if not file.is_file():
            parser.error(
                f"{file} is missing: give --grid a TOML file, --configs a folder of job files"
            )
    grid = tomli.loads(args.grid.read_text()).get("ablations", [])
    cells = {cell["run"]: arguments(cell) for cell in grid}
    if not args.cells:
        for name, settings in cells.items():
            print(f"{name:26}", *settings)
    chosen = list(cells) if args.cells == ["all"] else args.cells or []
    if unknown := [name for name in chosen if name not in cells]:
        parser.error(f"--cells {' '.join(unknown)}: {args.grid} has {', '.join(cells) or 'none'}")
    total = tomli.loads((args.configs / "stage2.toml").read_text())["training"]["steps"]
    for name in chosen:
        runner.run_script(
            args.nproc,
            args.configs,
            args.output / name,
            splits=args.splits or [total * 10 // 16],
            only=("stage1", "stage2"),
            overrides=[*cells[name], *args.overrides],
        )


if __name__ == "__main__":
    main()
