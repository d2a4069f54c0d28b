"""Draw the pictures of docs/method.md: the cascade, the gathered order and the scatter, as the code computes them.

python scripts/draw_method.py            # writes docs/method-*.png
"""

import argparse
from pathlib import Path

import _start
import matplotlib
import torch
from matplotlib.patches import Rectangle

from torchtitan_ext.command_line import make_folder
from torchtitan_ext.lighthouse import LighthouseConfig, operators, select_entries
from torchtitan_ext.lighthouse.operators import Selection

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = LighthouseConfig(levels=3, pooling_factor=4, top_k=4, tile_winners=2)
SEQ_LEN = 128
COLORS = ("#0072B2", "#E69F00", "#009E73")  # of levels 0, 1, 2; Okabe and Ito's palette
PALE = "#EEEEEE"


def example() -> tuple[Selection, torch.Tensor]:
    """The entries gathered for one head of a random sequence, [S], and which of them reach each position,
    [N, S]: what the scatter does to the rows of an identity matrix."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, SEQ_LEN, 1, 8, generator=generator) for _ in range(3))
    slots = operators.select(operators.score(q, k, v, CONFIG), CONFIG)
    rows = torch.eye(CONFIG.gathered_len(SEQ_LEN))[None, None]
    reached = operators.scatter(rows, slots, CONFIG)[0, :, 0]
    level, index = select_entries(q, k, v, CONFIG)
    return Selection(level[0, 0], index[0, 0]), reached


def axes(height: float, xlabel: str) -> tuple[plt.Figure, plt.Axes]:
    figure, panel = plt.subplots(figsize=(11, height), layout="constrained")
    panel.set(xlim=(0, SEQ_LEN), xticks=range(0, SEQ_LEN + 1, 16), xlabel=xlabel)
    panel.spines[["top", "right", "left"]].set_visible(False)
    return figure, panel


def draw_cascade(selection: Selection) -> plt.Figure:
    """Every entry of the pyramid over the positions that it averages."""
    figure, panel = axes(2.8, "position in the sequence")
    gathered = set(zip(*(x.tolist() for x in selection), strict=True))
    for level in range(CONFIG.levels):
        span = CONFIG.span(level)
        for index in range(SEQ_LEN // span):
            joins = (level, index) in gathered
            wins = (level - 1, index * CONFIG.pooling_factor) in gathered
            box = Rectangle((index * span, level), span, 0.72, edgecolor="white", linewidth=0.6)
            box.set_facecolor(COLORS[level] if joins else PALE)
            box.set_alpha(1.0 if wins or level == 0 or not joins else 0.4)
            panel.add_patch(box)
            if wins:
                panel.text((index + 0.5) * span, level + 0.33, "w", ha="center", va="center")
    for tile in range(1, CONFIG.n_tiles):
        panel.axvline(tile * SEQ_LEN / CONFIG.n_tiles, color="black", linestyle=":")
    panel.set(ylim=(-0.1, CONFIG.levels))
    panel.set_yticks([level + 0.36 for level in range(CONFIG.levels)])
    panel.set_yticklabels(
        [f"level {level}\nspan {CONFIG.span(level)}" for level in range(CONFIG.levels)]
    )
    return figure


def draw_order(selection: Selection) -> plt.Figure:
    """The gathered sequence, each entry joined to the position at which it ends."""
    figure, panel = axes(2.4, "position in the sequence")
    width = SEQ_LEN / CONFIG.gathered_len(SEQ_LEN)
    for slot, (level, index) in enumerate(zip(*(x.tolist() for x in selection), strict=True)):
        color, end = COLORS[level], (index + 1) * CONFIG.span(level) - 1
        panel.add_patch(Rectangle((slot * width, 1), width, 0.3, color=color, ec="white"))
        panel.plot([(slot + 0.5) * width, end + 0.5], [1, 0], color=color, linewidth=0.8)
    panel.set(ylim=(0, 1.35), yticks=[1.15], yticklabels=["gathered\nsequence"])
    return figure


def draw_scatter(selection: Selection, reached: torch.Tensor) -> plt.Figure:
    """The positions to which each gathered entry's output is added."""
    figure, panel = axes(2.8, "position in the sequence")
    for slot, level in enumerate(selection.level.tolist()):
        positions = reached[:, slot].nonzero().flatten().tolist()
        if positions:  # the sequence's last entry may end with it
            box = Rectangle((positions[0], level + 1), len(positions), 0.72, edgecolor="white")
            box.set_facecolor(COLORS[level])
            panel.add_patch(box)
    counts = range(CONFIG.levels + 1)
    unit = 0.8 / CONFIG.levels
    panel.stairs(reached.sum(1) * unit, range(SEQ_LEN + 1), baseline=None, color="black", lw=1.5)
    panel.set_ylim(0, CONFIG.levels + 1)
    panel.set_ylabel("outputs\na position", rotation=0, ha="right", va="center", y=0.13)
    panel.set_yticks([*(n * unit for n in counts[1:]), *(level + 1.36 for level in counts[:-1])])
    panel.set_yticklabels([*map(str, counts[1:]), *(f"level {level}" for level in counts[:-1])])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path(__file__).parents[1] / "docs",
        help="folder of the pictures (default: docs)",
    )
    args = parser.parse_args()
    make_folder(args.out)
    selection, reached = example()
    for name, figure in (
        ("cascade", draw_cascade(selection)),
        ("order", draw_order(selection)),
        ("scatter", draw_scatter(selection, reached)),
    ):
        file = args.out / f"method-{name}.png"
        figure.savefig(file, dpi=110)
        print(file)


if __name__ == "__main__":
    _start.run(main)
