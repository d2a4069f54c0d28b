"""Check a local copy of C4: count its documents, find what is damaged, say what is missing.

    python scripts/check_c4.py /data/c4

Every file is read as training reads it. Exit code: 0 if nothing is damaged (files may be missing),
1 if something is, 2 for a wrong argument.
"""

import argparse
import os
import tomllib
from pathlib import Path

import _start

from torchtitan_ext.command_line import Display, at_least

RECIPE = Path(__file__).parents[1] / "configs" / "530m" / "dense.toml"


def main() -> int:
    recipe = tomllib.loads(RECIPE.read_text())["training"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset_path", help="the copy's root, or its en folder")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=at_least(1),
        default=os.cpu_count(),
        help="processes (default: one a CPU, %(default)s)",
    )
    units = {"seq_len": "tokens", "global_batch_size": "sequences", "steps": "steps"}
    for name, unit in units.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="N",
            type=at_least(1),
            default=recipe[name],
            help=f"training.{name}, in {unit}, of the run to compare with (default: the recipe's %(default)s)",
        )
    args = parser.parse_args()

    from torchtitan_ext.data.c4_check import check_files, report
    from torchtitan_ext.data.datasets import c4_files

    files = c4_files(args.dataset_path)

    checked, damaged = [], 0
    results = check_files(files, args.workers)  # forks before the display's thread starts
    with Display() as display:
        display.start("files", len(files))
        for contents in results:
            checked.append(contents)
            damaged += contents.n_problems > 0
            display.advance(1, f"{len(checked)}/{len(files)}, {damaged} damaged, ")
    text, is_damaged = report(
        files,
        checked,
        seq_len=args.seq_len,
        global_batch_size=args.global_batch_size,
        steps=args.steps,
    )
    print(text)
    return 1 if is_damaged else 0


if __name__ == "__main__":
    _start.run(main, refused=2)
