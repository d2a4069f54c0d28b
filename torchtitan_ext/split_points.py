"""What a split-point experiment says: its table and its plot, made from the runs' own records.

An experiment is a folder that holds one run each for `dense` (from scratch), `stage1` (Lighthouse)
and `stage2-<split>` (dense, from stage 1's checkpoint at step <split>).

Definitions, the same for every run. T is the step at which stage 2 and dense end. The window W is
T // 100 steps, but no fewer than 5 and no fewer than metrics.log_freq, so that it always holds a
logged step. Means are over the logged steps of a window.

- before: mean loss of stage 1 over the steps in (split - W, split].
- jump: loss at stage 2's first logged step, minus before. Nats.
- recovery: the smallest number n of steps after the switch for which stage 2's mean loss over
  (split + n - W, split + n] is at most before. The window lies in stage 2, so n is at least W;
  there is none where the run ends first.
- final loss: mean loss over the steps in (T - W, T]. Difference: final loss minus dense's.
- validation loss: the last one of a finished run, on documents held out; difference as above. Only
  where the runs validate (validation.enable).
- dense at equal hours: dense's validation loss at the moment when it had spent the split's device-hours; linear
  between two points. Training losses are of other batches at other times, so they don't compare.
- device-hours: seconds x devices / 3600 over a run's logged steps; for a split, stage 1's up to
  the split and stage 2's (records.Run.device_hours).
- tok/s a device: median over the logged steps, the first one of each process start left out. For
  a split, of stage 1 up to the split.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

from .command_line import make_folder
from .records import Run, read_run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette: distinguishable with every common colour-vision deficiency
DENSE_COLOR, STAGE1_COLOR = "#000000", "#0072B2"
# columns of curves.csv, the logged points that everything is made of
CURVES = ("run", "step", "loss", "tokens_per_second", "seconds", "n_devices", "validation_loss")
TAIL_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def window(total_steps: int, log_freq: int) -> int:
    return max(5, total_steps // 100, log_freq)


def mean_loss(step: np.ndarray, loss: np.ndarray, end: int, window: int) -> float:
    """Mean of the losses [n_logged] logged at the steps in (end - window, end]; NaN for none."""
    inside = (step > end - window) & (step <= end)
    return float(loss[inside].mean()) if inside.any() else float("nan")


def recovery(
    step: np.ndarray, loss: np.ndarray, split: int, before: float, window: int
) -> int | None:
    """Steps after `split` until stage 2's trailing mean loss is at most `before`, or None."""
    for end in step[step >= split + window]:
        if mean_loss(step, loss, end, window) <= before:
            return int(end - split)
    return None


@dataclass
class Row:
    """A row of the table. A field is None where the records don't (yet) say."""

    run: str
    device_hours: float | None = None
    ktok_s: float | None = None
    final_loss: float | None = None
    jump: float | None = None
    recovery: int | None = None
    difference: float | None = None
    validation_loss: float | None = None
    validation_difference: float | None = None
    dense_at_equal_hours: float | None = None
    steps_after_switch: int | None = None
    status: str = "finished"


@dataclass
class Experiment:
    dense: Run | None
    stage1: Run | None
    tails: dict[int, Run | None]  # by split, latest first

    @property
    def runs(self) -> list[Run]:
        """Those that have records, in the table's order."""
        return [run for run in (self.dense, self.stage1, *self.tails.values()) if run]


def read_experiment(folder: str | Path) -> Experiment:
    """The experiment in `folder`; a run of which nothing is logged yet is None.

    Raises FileNotFoundError when no run of the experiment is there."""
    folder = Path(folder)
    splits = [int(m[1]) for p in folder.glob("*") if (m := re.fullmatch(r"stage2-(\d+)", p.name))]
    experiment = Experiment(
        dense=read_run(folder / "dense"),
        stage1=read_run(folder / "stage1"),
        tails={s: read_run(folder / f"stage2-{s}") for s in sorted(splits, reverse=True)},
    )
    if not experiment.runs:
        raise FileNotFoundError(
            f"{folder} holds no records of a run: expected TensorBoard events under "
            "dense/, stage1/ or stage2-<split>/, as scripts/run_splits.py leaves them"
        )
    return experiment


def table(experiment: Experiment) -> list[Row]:
    """One row for dense, then one a split."""
    dense, stage1 = experiment.dense, experiment.stage1
    rows = [Row("dense", status=_status(dense))]
    if dense:
        rows[0].ktok_s = _ktok_s(dense, dense.total_steps)
        if dense.finished:
            rows[0].device_hours = float(dense.device_hours[-1])
            rows[0].final_loss = _final_loss(dense)
            rows[0].validation_loss = _validation_loss(dense)

    for split, tail in experiment.tails.items():
        row = Row(f"split at {split:,}", status=_status(tail, split))
        rows.append(row)
        reached = stage1 if stage1 and split - stage1.step[-1] < stage1.log_freqs[-1] else None
        if reached:
            row.ktok_s = _ktok_s(reached, split)
        if tail is None:
            continue
        row.run = _label(split, tail)
        row.steps_after_switch = int(tail.step[-1]) - split
        if reached:
            w = window(tail.total_steps, tail.log_freq)
            before = mean_loss(reached.step, reached.loss, split, w)
            row.jump = float(tail.loss[0]) - before
            row.recovery = recovery(tail.step, tail.loss, split, before, w)
        if tail.finished:
            row.final_loss = _final_loss(tail)
            row.difference = _difference(row.final_loss, rows[0].final_loss)
            row.validation_loss = _validation_loss(tail)
            row.validation_difference = _difference(row.validation_loss, rows[0].validation_loss)
            if reached:
                row.device_hours = hours_at(reached, split) + float(tail.device_hours[-1])
                row.dense_at_equal_hours = _loss_at_hours(dense, row.device_hours)
    return rows


def batch_noise(run: Run) -> float:
    """Standard deviation of the loss between batches, without its trend: from the differences of
    neighbouring points in the later half. NaN where fewer than two are logged."""
    steps = np.diff(run.loss[len(run.loss) // 2 :])
    return float(steps.std() / np.sqrt(2)) if steps.size else float("nan")


def hours_at(run: Run, step: int) -> float:
    """Device-hours that `run` had spent at `step`; linear between two logged steps."""
    return float(np.interp(step, [0, *run.step], [0.0, *run.device_hours]))


def _loss_at_hours(dense: Run | None, hours: float) -> float | None:
    """None where dense has not (yet) spent so many device-hours, or isn't validated."""
    if dense is None or hours > dense.device_hours[-1] or not dense.validation_step.size:
        return None
    spent = [hours_at(dense, end) for end in dense.validation_step]
    return float(np.interp(hours, spent, dense.validation_loss))


def _ktok_s(run: Run, upto: int) -> float | None:
    steady = (run.step <= upto) & ~run.starts
    return float(np.median(run.tokens_per_second[steady])) / 1000 if steady.any() else None


def _final_loss(run: Run) -> float:
    return mean_loss(run.step, run.loss, run.total_steps, window(run.total_steps, run.log_freq))


def _validation_loss(run: Run) -> float | None:
    return float(run.validation_loss[-1]) if run.validation_loss.size else None


def _difference(loss: float | None, of_dense: float | None) -> float | None:
    return None if loss is None or of_dense is None else loss - of_dense


def _status(run: Run | None, start: int = 0) -> str:
    if run is None:
        return "not started"
    if not run.finished:
        return f"unfinished, at step {run.step[-1]:,} of {run.total_steps:,}"
    gaps = run.gaps(start)
    if gaps:
        places = ", ".join(f"{a:,} to {b:,}" for a, b in gaps)
        return f"finished, but nothing is recorded between steps {places}"
    return "finished"


def _label(split: int, tail: Run) -> str:
    return f"{split:,} + {tail.total_steps - split:,}"


def notes(experiment: Experiment) -> list[str]:
    """What the records lack, one line a run."""
    runs = {"dense": (experiment.dense, 0), "stage1": (experiment.stage1, 0)}
    runs |= {f"stage2-{split}": (tail, split) for split, tail in experiment.tails.items()}
    lines = [f"{name}: {_status(*run)}" for name, run in runs.items()]
    return [line for line in lines if not line.endswith(": finished")]


def write(
    folder: str | Path,
    out: str | Path,
    published: dict,
    other_seeds: Sequence[str | Path] = (),
    ablations: Sequence[str | Path] = (),
) -> tuple[str, list[Path]]:
    """Make table.md, table.csv, curves.csv and loss.png of the experiment in `folder` in `out`.

    published: what configs/published.toml holds. other_seeds: folders of the same experiment from other
    seeds, or parts of it; table.md compares their final losses. ablations: folders of experiments with other
    settings of Lighthouse; table.md sets them beside this one. Returns the Markdown and the paths written."""
    experiment = read_experiment(folder)
    out = make_folder(Path(out))
    paths = [out / name for name in ("table.md", "table.csv", "curves.csv", "loss.png")]

    text = markdown(experiment, published)
    if other_seeds:
        text += seeds_table([experiment, *map(read_experiment, other_seeds)])
    if ablations:
        text += ablations_table(experiment, [*map(read_experiment, ablations)])
    paths[0].write_text(text)
    with paths[1].open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table(experiment))
    with paths[2].open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(CURVES)
        for run in experiment.runs:
            validated = dict(zip(run.validation_step, run.validation_loss, strict=True))
            for point in zip(*(getattr(run, name) for name in CURVES[1:-1]), strict=True):
                validation = [validated[point[0]]] if point[0] in validated else []
                cells = [f"{x:.7g}" for x in (*point, *validation)]
                writer.writerow([run.folder.name, *cells, *[""] * (len(CURVES) - 1 - len(cells))])
    plot(experiment, paths[3])
    return text, paths


def markdown(experiment: Experiment, published: dict) -> str:
    """Our table, then the published rows, each labelled for what it is."""
    run = experiment.runs[0]
    n_devices, w = int(run.n_devices[-1]), window(run.total_steps, run.log_freq)
    lacking = notes(experiment)
    theirs = [Row(**row) for row in published["split_points"]]
    their_cells = [_cells(theirs[0])]
    for row in theirs[1:]:
        row.difference = _difference(row.final_loss, theirs[0].final_loss)
        their_cells.append(_cells(row, published["jump"], published["recovery"]))
    return "\n".join(
        [
            f"**Measured**: {run.config['model']['flavor']}, "
            f"seq_len {run.config['training']['seq_len']:,}, "
            f"{n_devices} device{'s' * (n_devices > 1)}",
            "",
            *_markdown_table([_cells(row) for row in table(experiment)]),
            "",
            f"Losses in nats a token, means over {w} steps; recovery counts the steps after the "
            f"switch until the mean of the last {w} is back at its level before. From batch to batch "
            f"the loss varies by {batch_noise(run):.3f}: a jump has to be seen against that.",
            "",
            *(f"- {line}" for line in lacking),
            *[""] * bool(lacking),
            f"**Published, not measured here**: {published['source']}, {published['hardware']}, "
            f"{published['setting']}",
            "",
            *_markdown_table(their_cells),
            "",
        ]
    )


def seeds_table(experiments: Sequence[Experiment]) -> str:
    """The same runs from several seeds: each one's final loss, on the validation documents where there are
    any, and how far the seeds lie apart. Raises ValueError for two experiments of one seed."""
    losses: dict[str, dict[int, float]] = {}
    for experiment in experiments:
        seed = experiment.runs[0].config["debug"]["seed"]
        for row in table(experiment):
            loss = _deciding_loss(row)
            if loss is not None and seed in losses.setdefault(row.run, {}):
                raise ValueError(
                    f"two experiments are of debug.seed = {seed}: give folders of different seeds"
                )
            if loss is not None:
                losses[row.run][seed] = loss
    seeds = sorted({seed for of_run in losses.values() for seed in of_run})
    rows = [["run", *(f"seed {seed}" for seed in seeds), "spread"]]
    rows += [["---", *["---:"] * (len(seeds) + 1)]]
    for run, of_run in losses.items():
        spread = max(of_run.values()) - min(of_run.values()) if len(of_run) > 1 else None
        rows.append([run, *(_loss(of_run.get(seed)) for seed in seeds), _loss(spread)])
    validated = any(run.validation_loss.size for run in experiments[0].runs)
    return "\n".join(
        [
            "",
            f"**From seed to seed**: final {'validation ' * validated}loss",
            "",
            *_lines(rows),
            "",
        ]
    )


def ablations_table(default: Experiment, others: Sequence[Experiment]) -> str:
    """Experiments with other settings of Lighthouse beside the default one, at the splits that they have.

    The difference is that of the final loss, on the validation documents where there are any. Raises ValueError
    for one without stage 1, which says what its settings are."""
    experiments = [default, *others]
    first_stages = [experiment.stage1 for experiment in experiments if experiment.stage1]
    if len(first_stages) < len(experiments):
        raise ValueError("an experiment without records of stage1/ can't be compared with others")
    settings = first_stages[0].config["lighthouse"]
    splits = {split for other in others for split in other.tails}
    of_default = dict(zip(default.tails, table(default)[1:], strict=True))
    rows = [["settings", "run", "stage-1 tok/s a device (k)", "device-hours", "jump (nats)"]]
    rows[0] += ["steps to recover", "final loss", "validation loss", "difference"]
    rows += [["---"] * 2 + ["---:"] * 7]
    for experiment, stage1 in zip(experiments, first_stages, strict=True):
        own = stage1.config["lighthouse"]
        changed = [f"{field} = {own[field]}" for field in own if own[field] != settings[field]]
        for split, row in zip(experiment.tails, table(experiment)[1:], strict=True):
            if split not in splits:
                continue
            run, hours, ktok_s, final, jump, recovered, _, validation, *_ = _cells(row)
            difference = _difference(*map(_deciding_loss, (row, of_default.get(split, Row("")))))
            cells = [", ".join(changed) or "the default", run, ktok_s, hours, jump, recovered]
            rows.append([*cells, final, validation, _loss(difference, "+")])
    return "\n".join(["", "**Other settings of Lighthouse**", "", *_lines(rows), ""])


def _deciding_loss(row: Row) -> float | None:
    return row.final_loss if row.validation_loss is None else row.validation_loss


def _markdown_table(rows: list[list[str]]) -> list[str]:
    """A column in which no row says anything is left out."""
    columns = [
        "run",
        "device-hours",
        "stage-1 tok/s a device (k)",
        "final loss",
        "jump (nats)",
        "steps to recover",
        "difference from dense",
        "validation loss",
        "difference from dense",
        "dense at equal hours",
    ]
    align = ["---"] + ["---:"] * (len(columns) - 1)
    filled = [i for i in range(len(columns)) if i < 7 or any(row[i] != "-" for row in rows)]
    return _lines([cells[i] for i in filled] for cells in [columns, align, *rows])


def _lines(rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in rows]


def _cells(row: Row, jump: str = "", recovered: str = "") -> list[str]:
    if row.recovery is not None:
        recovered = f"{row.recovery:,}"
    elif row.jump is not None:
        recovered = f"not within {row.steps_after_switch:,}"
    return [
        row.run,
        _number(row.device_hours),
        _number(row.ktok_s),
        _loss(row.final_loss),
        jump or _loss(row.jump, "+"),
        recovered or "-",
        _loss(row.difference, "+"),
        _loss(row.validation_loss),
        _loss(row.validation_difference, "+"),
        _loss(row.dense_at_equal_hours),
    ]


def _number(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.1f}" if x >= 10 else f"{x:#.3g}"


def _loss(x: float | None, sign: str = "") -> str:
    return "-" if x is None else f"{x:{sign}.4f}"


def plot(experiment: Experiment, path: str | Path) -> None:
    """Loss against steps and against device-hours: raw points pale, their trailing mean over the window on top,
    crosses for validation, a ring where stage 1 hands over and a dotted line for the jump."""
    dense, stage1 = experiment.dense, experiment.stage1
    tails = {split: tail for split, tail in experiment.tails.items() if tail}
    runs = [run for run in (dense, stage1, *tails.values()) if run]
    w = max(window(run.total_steps, run.log_freq) for run in runs)
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")

    def draw(run: Run, label: str, color: str, hours_before: float = 0.0) -> None:
        smooth = [mean_loss(run.step, run.loss, end, w) for end in run.step]
        for panel, x in zip(panels, (run.step, hours_before + run.device_hours), strict=True):
            panel.plot(x, run.loss, color=color, alpha=0.25, linewidth=0.8)
            panel.plot(x, smooth, color=color, linewidth=1.6, label=label)
            validated_at = np.interp(run.validation_step, run.step, x)
            panel.plot(validated_at, run.validation_loss, "x", color=color, markersize=5)

    if dense:
        draw(dense, "dense from scratch", DENSE_COLOR)
    if stage1:
        draw(stage1, "stage 1: Lighthouse", STAGE1_COLOR)
    for (split, tail), color in zip(tails.items(), cycle(TAIL_COLORS)):
        hours = hours_at(stage1, split) if stage1 else 0.0
        draw(tail, f"{_label(split, tail)}: dense", color, hours)
        if stage1:
            before = mean_loss(stage1.step, stage1.loss, split, w)
            after = (tail.step[0], hours + tail.device_hours[0])
            for panel, x0, x1 in zip(panels, (split, hours), after, strict=True):
                panel.plot([x0, x1], [before, tail.loss[0]], ":", color=color, linewidth=1.2)
                ring = panel.scatter(x0, before, c="white", edgecolors=STAGE1_COLOR, zorder=5)
            ring.set_label("switch" if split == min(tails) else None)

    if any(run.validation_loss.size for run in runs):
        panels[1].plot([], [], "x", color="0.4", markersize=5, label="validation")
    # the fall of the first steps would flatten all that follows
    panels[0].set_ylim(_limits([run.loss[run.step > run.total_steps / 10] for run in runs]))
    panels[0].set(xlabel="step", ylabel="training loss (nats a token)")
    panels[0].xaxis.set_major_formatter("{x:,.0f}")
    panels[1].set(xlabel="device-hours")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[1].get_legend_handles_labels()
    columns = len(labels) if len(labels) < 7 else 4  # more don't fit into one row
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _limits(losses: list[np.ndarray]) -> tuple[float, float] | None:
    finite = np.concatenate(losses)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return None
    margin = 0.05 * np.ptp(finite) or 0.1
    return finite.min() - margin, finite.max() + margin
