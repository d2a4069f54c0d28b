"""Report a split-point experiment: table and plot from the runs' records.

An experiment is a folder with the runs `dense` (throughout), `stage1` (Lighthouse) and `stage2-<split>` (dense, from
stage 1's checkpoint at step <split>). docs/running.md, "What the table says", defines the columns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from torchtitan_ext import figures
from torchtitan_ext.console import make_folder
from torchtitan_ext.jobs.recorded import LEARNED_WITH

from .records import Run, read_run

TAIL_COLORS = (figures.VERMILION, figures.GREEN, figures.PURPLE, figures.ORANGE, figures.SKY_BLUE)

COLUMNS = {  # title and format of each
    "run": ("run", ""),
    "device_hours": ("device-hours", ",.4g"),
    "hours_percent": ("% of dense's hours", ".1f"),
    "ktok_s": ("tok/s per device (k)", ",.4g"),
    "final_loss": ("final loss", ".4f"),
    "jump": ("jump (nats)", "+.4f"),
    "recovery": ("steps to recover", ","),
    "difference": ("difference from dense", "+.4f"),
    "validation_loss": ("validation loss", ".4f"),
    "validation_difference": ("difference from dense", "+.4f"),
    "equal_hours_difference": ("difference at equal hours", "+.4f"),
}
CURVES = ("step", "loss", "tokens_per_second", "seconds", "n_devices")  # columns of curves.csv
# Values that are not recorded yet are missing; a published range is a string.
Row = dict[str, Any]


def cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return f"not within {row['steps_after_switch']:,}" if column == "recovery" and "jump" in row else "-"
    return value if isinstance(value, str) else format(value, COLUMNS[column][1])


def loss_differences(row: Row, other: Row) -> Row:
    """Of the losses that both rows have at the same step, the first row's minus the other's."""
    names = {"validation_loss": "validation_difference", "final_loss": "difference"}
    both = [loss for loss in names if loss in row and loss in other and row.get("end") == other.get("end")]
    return {names[loss]: row[loss] - other[loss] for loss in both}


def compare(row: Row, dense: Row) -> None:
    if "device_hours" in row and "device_hours" in dense:
        row["hours_percent"] = 100 * row["device_hours"] / dense["device_hours"]
    row |= loss_differences(row, dense)


def markdown_rows(rows: Sequence[Row]) -> str:
    """A Markdown table of the columns in which any row has a value."""
    shown = [c for c in COLUMNS if any(cell(row, c) != "-" for row in rows)]
    return figures.markdown_table([COLUMNS[c][0] for c in shown], [[cell(row, c) for c in shown] for row in rows])


@dataclass
class Experiment:
    dense: Run | None
    stage1: Run | None
    tails: dict[int, Run | None]  # by split, latest first

    @property
    def starts(self) -> dict[str, tuple[Run | None, int]]:
        """Each run and the step at which it starts, by name."""
        tails = {f"stage2-{split}": (tail, split) for split, tail in self.tails.items()}
        return {"dense": (self.dense, 0), "stage1": (self.stage1, 0), **tails}

    @property
    def runs(self) -> list[Run]:
        return [run for run, _ in self.starts.values() if run]


def read_experiment(folder: Path) -> Experiment:
    """The experiment in `folder`; a run without logged steps is None. Raises FileNotFoundError if all are, ValueError
    if a stage 2 started before its split."""
    splits = [int(m[1]) for p in folder.glob("*") if (m := re.fullmatch(r"stage2-(\d+)", p.name))]
    tails = {split: read_run(folder / f"stage2-{split}") for split in sorted(splits, reverse=True)}
    for split, tail in tails.items():
        if tail and (start := tail.step[0] - 1) < split:
            raise ValueError(f"{tail.folder} starts from step {start}, not {split}: rename it to stage2-{start}")
    experiment = Experiment(read_run(folder / "dense"), read_run(folder / "stage1"), tails)
    if not experiment.runs:
        expected = "TensorBoard events under dense/, stage1/ or stage2-<split>/, as torchtitan_ext splits leaves them"
        raise FileNotFoundError(f"{folder} holds no records of a run: expected {expected}")
    return experiment


def window(total_steps: int, log_freq: int) -> int:
    """Steps that a mean loss covers: a hundredth of the run, at least 5 and one logged step."""
    return max(5, total_steps // 100, log_freq)


def mean_loss(step: np.ndarray, loss: np.ndarray, end: int, window: int) -> float:
    """Mean of the losses [n_logged] at steps in (end - window, end]; NaN if there are none."""
    inside = (step > end - window) & (step <= end)
    return float(loss[inside].mean()) if inside.any() else float("nan")


def recovery(step: np.ndarray, loss: np.ndarray, split: int, before: float, window: int) -> int | None:
    """Steps after `split` until stage 2's trailing mean loss is at most `before`, or None."""
    for end in step[step >= split + window]:
        if mean_loss(step, loss, end, window) <= before:
            return int(end - split)
    return None


def batch_noise(run: Run) -> float:
    """Standard deviation of the loss between batches, from neighbors in the later half; NaN for too few."""
    steps = np.diff(run.loss[len(run.loss) // 2 :])
    return float(steps.std() / np.sqrt(2)) if steps.size else float("nan")


def hours_at(run: Run, step: int) -> float:
    """Device-hours of `run` at `step`, interpolated linearly."""
    return float(np.interp(step, [0, *run.step], [0.0, *run.device_hours]))


def table(experiment: Experiment) -> list[Row]:
    """One row for dense, then one per split."""
    dense, stage1 = experiment.dense, experiment.stage1
    rows: list[Row] = [{"run": "dense", "status": _status(dense)}]
    if dense:
        rows[0] |= _speed(dense, dense.total_steps)
        if dense.finished:
            rows[0] |= {"device_hours": float(dense.device_hours[-1]), **_final_losses(dense)}
    for split, tail in experiment.tails.items():
        row: Row = {"run": _label(split, tail), "status": _status(tail, split)}
        rows.append(row)
        reached = stage1 if stage1 and stage1.step[-1] >= split else None
        if reached:
            row |= _speed(reached, split)
        if tail is None:
            continue
        row["steps_after_switch"] = int(tail.step[-1]) - split
        if reached:
            w = window(tail.total_steps, tail.log_freq)
            before = mean_loss(reached.step, reached.loss, split, w)
            row["jump"] = float(tail.loss[0]) - before
            row["recovery"] = recovery(tail.step, tail.loss, split, before, w)
        if tail.finished:
            row |= _final_losses(tail)
            if reached:
                row["device_hours"] = hours = hours_at(reached, split) + float(tail.device_hours[-1])
                if dense and hours <= dense.device_hours[-1] and dense.validation_step.size:
                    spent = [hours_at(dense, end) for end in dense.validation_step]
                    then = float(np.interp(hours, spent, dense.validation_loss))
                    row["equal_hours_difference"] = row.get("validation_loss", np.nan) - then
            if dense and dense.total_steps != tail.total_steps:
                ends = f"ends at step {tail.total_steps:,}, dense at {dense.total_steps:,}"
                row["status"] += f", but {ends}: not compared"
            else:
                compare(row, rows[0])
    return rows


def _speed(run: Run, upto: int) -> Row:
    steady = (run.step <= upto) & ~run.starts
    return {"ktok_s": float(np.median(run.tokens_per_second[steady])) / 1000} if steady.any() else {}


def _final_losses(run: Run) -> Row:
    final = mean_loss(run.step, run.loss, run.total_steps, window(run.total_steps, run.log_freq))
    freq = run.config.get("validation", {}).get("freq", 1)
    due = run.total_steps - run.total_steps % freq
    last = run.validation_loss[run.validation_step == due]  # the run may have ended before it
    return {"final_loss": final, "end": run.total_steps} | ({"validation_loss": float(last[0])} if last.size else {})


def _status(run: Run | None, start: int = 0) -> str:
    if run is None:
        return "not started"
    if not run.finished:
        return f"unfinished, at step {run.step[-1]:,} of {run.total_steps:,}"
    if gaps := ", ".join(f"{a:,} to {b:,}" for a, b in run.gaps(start)):
        return f"finished, but nothing is recorded between steps {gaps}"
    return "finished"


def _label(split: int, tail: Run | None) -> str:
    return f"{split:,} + {tail.total_steps - split:,}" if tail else f"split at {split:,}"


def write(folder: Path, output: Path, published: dict, others: Sequence[Path] = ()) -> tuple[str, list[Path]]:
    """Write table.md, table.csv, curves.csv and loss.png to `output`; return the Markdown and the paths.

    folder: of the experiment. published: configs/published.toml. others: folders of the experiment, or parts of it,
    with other seeds or Lighthouse settings.
    """
    experiment = read_experiment(folder)
    paths = [make_folder(output) / name for name in ("table.md", "table.csv", "curves.csv", "loss.png")]
    text = markdown(experiment, published)
    if others:
        text += comparison([experiment, *map(read_experiment, others)])
    paths[0].write_text(text)
    columns = [*COLUMNS, "steps_after_switch", "status"]
    figures.write_csv(paths[1], columns, ([row.get(column) for column in columns] for row in table(experiment)))
    points = []
    for run in experiment.runs:
        logged = {point[0]: point for point in zip(*(getattr(run, name) for name in CURVES), strict=True)}
        validated = dict(zip(run.validation_step, run.validation_loss, strict=True))
        for step in sorted(logged | validated):
            values = (*logged.get(step, (step, *[None] * (len(CURVES) - 1))), validated.get(step))
            points.append([run.folder.name, *("" if x is None else f"{x:.7g}" for x in values)])
    figures.write_csv(paths[2], ["run", *CURVES, "validation_loss"], points)
    draw(experiment).savefig(paths[3], dpi=150)
    return text, paths


def markdown(experiment: Experiment, published: dict) -> str:
    """Our table and, for the published model, the published rows; both are labeled."""
    run, longest = experiment.runs[0], max(experiment.runs, key=lambda run: run.total_steps)
    w = window(longest.total_steps, longest.log_freq)
    rows = table(experiment)
    status = {name: _status(*start) for name, start in experiment.starts.items()}
    status |= {f"stage2-{split}": row["status"] for split, row in zip(experiment.tails, rows[1:], strict=True)}
    unfinished = "".join(f"- {name}: {how}\n\n" for name, how in status.items() if how != "finished")
    dense, *splits = published["split_points"]
    theirs = [dense, *({"jump": published["jump"], "recovery": published["recovery"], **row} for row in splits)]
    for row in theirs[1:]:
        compare(row, dense)
    text = f"""**Measured**: {run.setting}

{markdown_rows(rows)}

Losses in nats per token, means over {w} steps; recovery counts the steps after the switch until the mean of the \
last {w} is back at its level before. From batch to batch the loss varies by {batch_noise(run):.3f}: compare jumps \
with that.

{unfinished}"""
    if published["setting"].startswith(f"{run.config['model']['flavor']}, "):
        source = f"{published['source']}, {published['hardware']}, {published['setting']}"
        text += f"**Published, not measured here**: {source}\n\n{markdown_rows(theirs)}\n"
    return text


def comparison(experiments: Sequence[Experiment]) -> str:
    """The runs that experiments share, each with its loss's difference from the first experiment's. Raises ValueError
    for an experiment of the same seed and settings as the first."""
    columns = ("run", "ktok_s", "device_hours", "jump", "recovery", "final_loss", "validation_loss")
    sections = (*LEARNED_WITH, "parallelism")
    settings = [{f"{s}.{k}": x for s in sections for k, x in e.runs[-1].config.get(s, {}).items()} for e in experiments]
    first, *others = (dict(zip(("dense", *e.tails), table(e), strict=True)) for e in experiments)  # rows by run
    of_others, body = [], []
    for experiment, own, rows in zip(experiments[1:], settings[1:], others, strict=True):
        changed = ", ".join(f"{name} = {x}" for name, x in own.items() if x != settings[0].get(name))
        if not changed:
            raise ValueError(f"--others: {experiment.runs[-1].folder} has the first's settings and seed")
        of_others += [(changed, run, row) for run, row in rows.items() if len(row) > 2]  # more than name and status
    shared = {run for _, run, _ in of_others}
    of_first = [("the first", run, row) for run, row in first.items() if run in shared]
    for label, run, row in of_first + of_others:
        differences = loss_differences(row, first.get(run, {}))
        shown = "validation_difference" if "validation_difference" in differences else "difference"
        body.append([label, *(cell(row, column) for column in columns), cell(differences, shown)])
    head = ["settings", *(COLUMNS[column][0] for column in columns), "difference"]
    return f"\n**Other seeds and settings**\n\n{figures.markdown_table(head, body, 'll' + 'r' * 7)}\n"


def draw(experiment: Experiment) -> Figure:
    """Loss against steps and against device-hours. Pale: logged points. Solid: trailing mean over the window. Crosses:
    validation. Ring: switch. Dotted: jump."""
    stage1, runs = experiment.stage1, experiment.runs
    w = max(window(run.total_steps, run.log_freq) for run in runs)
    figure = Figure(figsize=(9.5, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)

    labels = ["dense", "stage 1: Lighthouse", *(f"{_label(*tail)}: dense" for tail in experiment.tails.items())]
    colors = chain((figures.BLACK, figures.BLUE), cycle(TAIL_COLORS))
    for (run, split), label, color in zip(experiment.starts.values(), labels, colors, strict=False):
        if not run:
            continue
        hours = hours_at(stage1, split) if stage1 else 0.0
        smooth = [mean_loss(run.step, run.loss, end, w) for end in run.step]
        for panel, x, x0 in zip(panels, (run.step, hours + run.device_hours), (split, hours), strict=True):
            panel.plot(x, run.loss, color=color, alpha=0.25, linewidth=0.8)
            panel.plot(x, smooth, color=color, linewidth=1.6, label=label)
            panel.plot(np.interp(run.validation_step, run.step, x), run.validation_loss, "x", color=color, markersize=5)
            if stage1 and split:
                before = mean_loss(stage1.step, stage1.loss, split, w)
                panel.plot([x0, x[0]], [before, run.loss[0]], ":", color=color, linewidth=1.2)
                panel.plot(x0, before, "o", color=figures.BLUE, markerfacecolor="white", zorder=5)

    if stage1 and any(experiment.tails.values()):
        panels[1].plot([], [], "o", color=figures.BLUE, markerfacecolor="white", label="switch")
    if any(run.validation_loss.size for run in runs):
        panels[1].plot([], [], "x", color="0.4", markersize=5, label="validation")

    # The steep fall of the first steps would flatten the rest.
    later = np.concatenate([run.loss[run.step > run.total_steps / 10] for run in runs])
    if (later := later[np.isfinite(later)]).size:
        margin = 0.05 * np.ptp(later) or 0.1
        panels[0].set_ylim(later.min() - margin, later.max() + margin)
    panels[0].set(xlabel="step", ylabel="training loss (nats per token)")
    panels[0].xaxis.set_major_formatter("{x:,.0f}")
    panels[1].set(xlabel="device-hours")
    panels[1].locator_params("x", nbins=6)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[1].get_legend_handles_labels()
    title, columns = runs[-1].setting, len(labels) if len(labels) < 6 else 4  # more don't fit into one row
    figure.legend(handles, labels, title=title, loc="outside upper center", ncols=columns, frameon=False)
    return figure
