"""Check a local copy of C4: count its documents, find what is damaged, say what is missing.

    python scripts/check_c4.py /data/c4

Every file is read as training reads it. Exit code: 0 if nothing is damaged (files may be missing),
1 if something is, 2 for a wrong argument.
"""

import argparse
import os
import sys
from pathlib import Path

import tomli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchtitan_ext.data.c4_check import check_files, report
from torchtitan_ext.data.datasets import c4_files

RECIPE = Path(__file__).parents[1] / "configs" / "530m" / "dense.toml"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def main() -> None:
    recipe = tomli.loads(RECIPE.read_text())["training"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset_path", help="the copy's root, or its en folder")
    parser.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count(),
        help="processes (default: one a CPU, %(default)s)",
    )
    for name in ("seq_len", "global_batch_size", "steps"):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive,
            default=recipe[name],
            help=f"training.{name} of the run to compare with (default: the recipe's %(default)s)",
        )
    args = parser.parse_args()
    try:
        files = c4_files(args.dataset_path)
    except ValueError as error:
        parser.exit(2, f"check_c4: {error}\n")

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    checked, damaged = [], 0
    results = check_files(files, args.workers)  # forks before the display's thread starts
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("files", total=len(files))
            for contents in results:
                checked.append(contents)
                damaged += contents.n_problems > 0
                progress.update(task, advance=1, description=f"files, {damaged} damaged")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    text, is_damaged = report(
        files,
        checked,
        seq_len=args.seq_len,
        global_batch_size=args.global_batch_size,
        steps=args.steps,
    )
    print(text)
    sys.exit(1 if is_damaged else 0)


if __name__ == "__main__":
    main()
