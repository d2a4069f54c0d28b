"""Tables and plots of results."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: distinguishable with every common color-vision deficiency
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """A table without a final newline. `align` has an l or an r per column; by default only the first is left."""
    align = align or "l" + "r" * (len(head) - 1)
    rule = "".join("|---:" if side == "r" else "|---" for side in align) + "|"
    first, *rest = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return "\n".join([first, rule, *rest])


def write_csv(file: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
