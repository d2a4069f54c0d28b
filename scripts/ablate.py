"""Run cells of an ablation grid: stage 1 to ten sixteenths of the steps, then stage 2 to the end.

    python scripts/ablate.py                                        # list the cells of the published grid
    python scripts/ablate.py --cells L3-p4-k1536-norm --nproc 8
    python scripts/ablate.py --configs configs/small --grid configs/small/ablations.toml --cells all

A cell is its settings in the grid on top of the TOMLs in --configs. The table of one:
python scripts/make_table.py outputs/ablations/<cell>
"""

import argparse
from dataclasses import replace
from pathlib import Path

import _start

from torchtitan_ext.command_line import at_least, local_path

CONFIGS = Path(__file__).parents[1] / "configs"


def read_grid(file: Path) -> dict[str, list[str]]:
    """The torchtitan arguments of each cell by its name. Raises ValueError for what is no grid."""
    import tomllib

    try:
        grid = tomllib.loads(file.read_text())["ablations"]
        return {cell["run"]: arguments(cell) for cell in grid}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--grid {file} is no grid ({error!r}): give a TOML file of [[ablations]], each with a run and its "
            "settings, like configs/published.toml"
        ) from error


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
        "--cells", nargs="+", metavar="CELL", help="names, or all (default: they are listed)"
    )
    parser.add_argument(
        "--grid",
        metavar="FILE",
        type=local_path,
        default=CONFIGS / "published.toml",
        help="TOML with [[ablations]], each a run and its settings (default: configs/published.toml)",
    )
    parser.add_argument(
        "--configs",
        metavar="FOLDER",
        type=local_path,
        default=CONFIGS / "530m",
        help="folder of dense, stage1 and stage2.toml (default: configs/530m)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=local_path,
        default=Path("outputs/ablations"),
        help="folder of the cells' runs (default: outputs/ablations)",
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
        help="steps at which stage 2 takes over (default: ten sixteenths of its steps)",
    )
    parser.add_argument("overrides", nargs="*", help="torchtitan arguments for every run, after --")
    args = parser.parse_args()
    cells = read_grid(args.grid)
    if not args.cells:
        for name, settings in cells.items():
            print(f"{name:26}", *settings)
        return
    chosen = list(cells) if args.cells == ["all"] else args.cells
    if unknown := [name for name in chosen if name not in cells]:
        parser.error(f"--cells {' '.join(unknown)}: {args.grid} has {', '.join(cells)}")
    from torchtitan_ext import runner

    stage2 = runner.parse_job(args.configs / "stage2.toml", args.overrides)
    splits = args.splits or [stage2.training.steps * 10 // 16]
    runs = []
    for name in chosen:
        of_cell = runner.plan(
            args.configs,
            args.output / name,
            splits=splits,
            only=("stage1", "stage2"),
            overrides=[*cells[name], *args.overrides],
        )
        runs += [replace(run, name=f"{name}/{run.name}") for run in of_cell]
    runner.run_all(runs, args.nproc)


if __name__ == "__main__":
    _start.run(main)
