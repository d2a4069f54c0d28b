"""Draw the picture of docs/method.md: the cascade, the gathered order and the scatter, as the code computes them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from torchtitan_ext import figures
from torchtitan_ext.arguments import start
from torchtitan_ext.console import make_folder
from torchtitan_ext.lighthouse import LighthouseConfig, select_entries, torch_ops

CONFIG = LighthouseConfig(levels=3, pooling_factor=4, top_k=4, tile_winners=2)
SEQ_LEN = 128
COLORS = (figures.BLUE, figures.ORANGE, figures.GREEN)  # of levels 0, 1, 2
PALE = "#EEEEEE"
Entries = list[tuple[int, int]]  # level and index of each gathered entry, in gathered order


@dataclass
class DrawMethod:
    output: Path = Path(__file__).parents[1] / "docs"  # folder of the picture

    def run(self) -> None:
        entries, reached = example()
        figure = Figure(figsize=(9, 7.2), layout="constrained")
        panels = figure.subplots(3, height_ratios=(2.8, 2.4, 2.8))
        draw_cascade(panels[0], entries)
        draw_order(panels[1], entries)
        draw_scatter(panels[2], entries, reached)
        for panel in panels:
            panel.set(xlim=(0, SEQ_LEN), xticks=range(0, SEQ_LEN + 1, 16), xlabel="position in the sequence")
            panel.spines[["top", "right", "left"]].set_visible(False)
        file = make_folder(self.output) / "method.png"
        figure.savefig(file, dpi=130)
        print(file)


def example() -> tuple[Entries, torch.Tensor]:
    """The S entries gathered for one head of a random sequence, and which of them reach each position, [N, S].

    The latter is what the scatter does to the rows of an identity matrix.
    """
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, SEQ_LEN, 1, 8, generator=generator) for _ in range(3))
    slots = torch_ops.select(torch_ops.score(q, k, v, CONFIG), CONFIG)
    rows = torch.eye(CONFIG.gathered_len(SEQ_LEN))[None, None]
    reached = torch_ops.scatter(rows, slots, CONFIG)[0, :, 0]
    level, index = (x[0, 0].tolist() for x in select_entries(q, k, v, CONFIG))
    return list(zip(level, index, strict=True)), reached


def draw_cascade(panel: Axes, gathered: Entries) -> None:
    """Every entry of the pyramid over the positions that it averages: gathered ones colored, winners marked."""
    levels = range(CONFIG.levels)
    for level in levels:
        span = CONFIG.span(level)
        for index in range(SEQ_LEN // span):
            joins = (level, index) in gathered
            wins = (level - 1, index * CONFIG.pooling_factor) in gathered
            color, alpha = COLORS[level] if joins else PALE, 1.0 if wins or level == 0 or not joins else 0.4
            panel.add_patch(Rectangle((index * span, level), span, 0.72, ec="white", fc=color, alpha=alpha))
            if wins:
                panel.text((index + 0.5) * span, level + 0.33, "w", ha="center", va="center")
    for tile in range(1, CONFIG.n_tiles):
        panel.axvline(tile * SEQ_LEN / CONFIG.n_tiles, color="black", linestyle=":")
    panel.set_ylim(-0.1, CONFIG.levels)
    panel.set_yticks([level + 0.36 for level in levels], [f"level {n}\nspan {CONFIG.span(n)}" for n in levels])


def draw_order(panel: Axes, entries: Entries) -> None:
    """The gathered sequence, each entry joined to the position at which it ends."""
    width = SEQ_LEN / CONFIG.gathered_len(SEQ_LEN)
    for slot, (level, index) in enumerate(entries):
        color, end = COLORS[level], (index + 1) * CONFIG.span(level) - 1
        panel.add_patch(Rectangle((slot * width, 1), width, 0.3, color=color, ec="white"))
        panel.plot([(slot + 0.5) * width, end + 0.5], [1, 0], color=color, linewidth=0.8)
    panel.set(ylim=(0, 1.35), yticks=[1.15], yticklabels=["gathered\nsequence"])


def draw_scatter(panel: Axes, entries: Entries, reached: torch.Tensor) -> None:
    """The positions to which each gathered entry's output is added, and the number of outputs per position."""
    for slot, (level, _) in enumerate(entries):
        positions = reached[:, slot].nonzero().flatten().tolist()
        if positions:  # an entry that ends with the sequence reaches none
            panel.add_patch(Rectangle((positions[0], level + 1), len(positions), 0.72, ec="white", fc=COLORS[level]))
    levels, unit = range(CONFIG.levels), 0.8 / CONFIG.levels
    panel.stairs(reached.sum(1) * unit, range(SEQ_LEN + 1), baseline=None, color="black", lw=1.5)
    panel.set_ylabel("outputs\nper position", rotation=0, ha="right", va="center", y=0.13)
    ticks = {(n + 1) * unit: str(n + 1) for n in levels} | {level + 1.36: f"level {level}" for level in levels}
    panel.set(ylim=(0, CONFIG.levels + 1), yticks=[*ticks], yticklabels=[*ticks.values()])


if __name__ == "__main__":
    start(DrawMethod)
