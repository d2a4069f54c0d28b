"""The report: its definitions on synthetic curves, its tables of synthetic experiments and of resumed runs."""

import csv
import json
import re
import shutil
import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_accumulator
from torch.utils.tensorboard import SummaryWriter

from torchtitan_ext.experiment import records, report
from torchtitan_ext.experiment.report import mean_loss, recovery, window

PUBLISHED = tomllib.loads((ROOT / "configs/published.toml").read_text(encoding="utf-8"))
PUBLISHED["setting"] = "made, 16k steps"  # of the same model


def logged_steps(start: int, end: int, log_freq: int) -> np.ndarray:
    return np.array([s for s in range(start + 1, end + 1) if s == 1 or s % log_freq == 0], int)


@st.composite
def switches(draw):
    """A switch whose jump and recovery are known: stage 1 is flat at its end, stage 2 stays above
    it by `jump` and then drops so deep that the first window that sees the drop is below."""
    log_freq = draw(st.sampled_from([1, 3, 10]))
    total = log_freq * draw(st.integers(40, 1200))
    w = window(total, log_freq)
    split = log_freq * draw(st.integers(w // log_freq + 1, total // log_freq - w // log_freq - 1))
    drop = log_freq * draw(st.integers(1, (total - split) // log_freq))
    level, jump = draw(st.integers(1, 64)) / 8, draw(st.integers(1, 64)) / 8
    stage1_step, step = logged_steps(0, split, log_freq), logged_steps(split, total, log_freq)
    stage1_loss = np.where(stage1_step > split - w, level, level + 4)
    loss = np.where(step < split + drop, level + jump, level - jump * (w + 1))
    assume(drop > log_freq)  # else stage 2's first point is the drop
    return stage1_step, stage1_loss, step, loss, split, w, level, jump, drop


@given(switches(), st.integers(-8, 8), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_known_jump_and_recovery_are_given_back(switch, shift, doublings, seed):
    stage1_step, stage1_loss, step, loss, split, w, level, jump, drop = switch
    before = mean_loss(stage1_step, stage1_loss, split, w)
    assert before == level and loss[0] - before == jump
    found = recovery(step, loss, split, before, w)
    assert [window(100, 1), window(100, 10), window(1000, 1)] == [5, 10, 10]
    assert found == max(drop, step[step >= split + w][0] - split)
    # whatever the origin and unit of the loss
    scale = 2.0**doublings
    assert recovery(step, loss * scale + shift, split, level * scale + shift, w) == found
    # noise below the jump moves neither by more than itself
    rng, amplitude = np.random.default_rng(seed), jump / 100
    noisy1, noisy = (x + rng.uniform(-amplitude, amplitude, x.shape) for x in (stage1_loss, loss))
    before = mean_loss(stage1_step, noisy1, split, w)
    assert abs((noisy[0] - before) - jump) <= 2 * amplitude
    assert recovery(step, noisy, split, before, w) == found
    # back at its level is recovered, above it never
    assert recovery(step, np.full(len(step), level), split, level, w) is not None
    assert recovery(step, np.maximum(loss, level + 1e-6), split, level, w) is None


@pytest.mark.parametrize("deviation", [0.01, 0.5])
def test_batch_noise_is_the_noise_put_in_whatever_the_trend(deviation):
    step = np.arange(1, 20001)
    loss = 5 - step / 5000 + 100 / step + np.random.default_rng(0).normal(0, deviation, step.shape)
    assert report.batch_noise(SimpleNamespace(loss=loss)) == pytest.approx(deviation, rel=0.05)


TOTAL, SPLITS = 80, (50, 60)


def curve(step):
    return 1 + 4 / (1 + step / 8)


each_step = np.arange(120)
plain = curve(each_step)


def write_start(folder, start, end, loss=plain, *, total=0, log_freq=1, seconds=0.5, n_devices=2, name="a", **config):
    """The records of one process start that trained from one step to another, and its event file. loss: per step."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {"training": {"steps": total or end, "seq_len": 128}, "model": {"flavor": "made"}, "debug": {"seed": 1}}
    job |= {"lighthouse": {"rope": "selected", "top_k": 256}, "attention": {"kernel": "fa4"}} | config
    (folder / "config.json").write_text(json.dumps(job))
    writer, step = SummaryWriter(folder / "tb" / name), logged_steps(start, end, log_freq)
    since = np.minimum(np.diff(step, prepend=0), log_freq)
    for s, value, n_steps in zip(step.tolist(), loss[step].tolist(), since.tolist(), strict=True):
        logged = {records.LOSS: value, records.TOKENS_PER_SECOND: 1000 * s, records.N_DEVICES: n_devices}
        logged |= {records.SECONDS: n_steps * seconds / log_freq, records.LOG_FREQ: log_freq}
        for tag, number in logged.items():
            writer.add_scalar(tag, number, s)
    for s in (s for s in range(10, max([0, *step]) + 1, 10) if s >= step[0]):
        writer.add_scalar(records.VALIDATION_LOSS, np.interp(s, step, loss[step]) + s / 80, s)
    writer.close()
    return next((folder / "tb" / name).iterdir())


def test_the_hours_are_right_where_a_later_start_logs_more_often(tmp_path):
    """36 seconds per step, on one device: a hundredth of an hour."""
    for start, end, log_freq in ((0, 100, 10), (100, 109, 1)):
        write_start(tmp_path, start, end, total=110, log_freq=log_freq, seconds=36, n_devices=1, name=str(start))
    run = records.read_run(tmp_path)
    assert run.device_hours[-1] == pytest.approx(1.09) and report.hours_at(run, 0) == 0
    assert run.gaps(0) == [] and not run.finished and run.log_freq == 10
    assert run.setting == "made, seq_len 128, 1 device, attention by fa4"
    (tmp_path / records.LOG).write_bytes(b"\xff CUDA capacity: A GPU with 1GiB memory")
    assert run.setting == "made, seq_len 128, 1 A GPU, attention by fa4"


@pytest.fixture(params=[1, 10], scope="module")
def log_freq(request):
    return request.param


@pytest.fixture(scope="module")
def made(log_freq, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    runs = [("dense", 0, TOTAL, 1.0), ("stage1", 0, max(SPLITS), 0.5)]
    for name, start, end, seconds in [*runs, *((f"stage2-{split}", split, TOTAL, 1.0) for split in SPLITS)]:
        loss = plain + (np.where(each_step <= start + log_freq, 1.0, -0.5) if start else 0)
        write_start(folder / name, start, end, loss, seconds=seconds, log_freq=log_freq)
    return folder


def test_the_table_of_a_made_experiment(made, log_freq):
    experiment, w = report.read_experiment(made), window(TOTAL, log_freq)
    dense, *rows = report.table(experiment)
    assert [row["run"] for row in rows] == [f"{s} + {TOTAL - s}" for s in SPLITS[::-1]]
    assert all(row["status"] == "finished" for row in [dense, *rows])
    later = replace(experiment, stage1=replace(experiment.stage1, seconds=9 * experiment.stage1.seconds))
    assert not any("equal_hours_difference" in row for row in report.table(later))  # dense ends before
    # 1 s a dense step, half a second a Lighthouse step, 2 devices
    assert dense["device_hours"] == pytest.approx(2 * TOTAL / 3600)
    last = logged_steps(TOTAL - w, TOTAL, log_freq)
    assert dense["final_loss"] == pytest.approx(curve(last).mean())
    for row, split in zip(rows, SPLITS[::-1], strict=True):
        assert row["device_hours"] == pytest.approx(2 * (0.5 * split + TOTAL - split) / 3600)
        assert [row["difference"], row["validation_difference"]] == pytest.approx([-0.5, -0.5])
        assert row["validation_loss"] == pytest.approx(curve(TOTAL) - 0.5 + 1)
        before = curve(logged_steps(split - w, split, log_freq)).mean()
        assert row["jump"] == pytest.approx(curve(split + log_freq) + 1 - before)
        assert row["recovery"] >= w
        # a second a dense step: as many seconds as dense steps; validated every 10 of them
        tens = np.arange(10, TOTAL + 1, 10)
        at_equal_hours = np.interp(0.5 * split + TOTAL - split, tens, curve(tens) + tens / 80)
        assert row["equal_hours_difference"] == pytest.approx(row["validation_loss"] - at_equal_hours)
        assert row["hours_percent"] == pytest.approx(100 * row["device_hours"] / dense["device_hours"])
        # 1000 tok/s at step 1, 2000 at step 2, ...; the first point is the start's
        steady = logged_steps(0, split, log_freq)[1:]
        assert row["ktok_s"] == pytest.approx(np.median(steady))


def test_files_written(made, tmp_path):
    text, (markdown, table, curves, plot) = report.write(made, tmp_path / "out", PUBLISHED)
    experiment = report.read_experiment(made)
    rows = report.table(experiment)
    assert markdown.read_text() == text
    assert [row["run"] for row in csv.DictReader(table.read_text().splitlines())] == [row["run"] for row in rows]
    assert report.markdown_rows(report.table(recorded(curves))) == report.markdown_rows(rows)
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000

    ours, theirs = text.split("**Published, not measured here**")
    assert "**Measured**: made, seq_len 128, 2 devices, " in ours
    assert PUBLISHED["source"] in theirs and PUBLISHED["hardware"] in theirs and "difference from dense" in theirs
    assert all(f"| {row['run']} |" in ours for row in rows)
    published = [f"{row['final_loss']:.4f}" for row in PUBLISHED["split_points"]]
    assert all(loss in theirs and loss not in ours for loss in published)
    assert "Published" not in report.markdown(experiment, PUBLISHED | {"setting": "made-larger, 16k steps"})


def test_every_jump_lies_whole_in_both_panels(made):
    experiment = report.read_experiment(made)
    figure = report.draw(experiment)
    figure.draw_without_rendering()
    assert len(figure.axes) == 2
    for panel, (split, tail) in product(figure.axes, experiment.tails.items()):
        low, high = panel.get_ylim()
        assert low < experiment.stage1.loss[experiment.stage1.step <= split][-1] and tail.loss[0] < high
    [legend] = figure.legends
    tails = (f"{split} + {TOTAL - split}: dense" for split in SPLITS[::-1])
    expected = ["dense", "stage 1: Lighthouse", *tails, "switch", "validation"]
    assert [text.get_text() for text in legend.get_texts()] == expected
    x0, _, x1, _ = legend.get_window_extent().extents
    assert 0 <= x0 < x1 <= figure.bbox.width


@pytest.mark.slow
@pytest.mark.parametrize("kept", [k for k in product([True, False], repeat=3) if any(k)], ids=lambda k: f"{k}")
def test_an_incomplete_experiment_has_a_table_that_says_so(made, tmp_path, kept):
    names = ["dense", "stage1", "stage2-50"]
    for name, keep in zip(names, kept, strict=True):
        if keep:
            shutil.copytree(made / name, tmp_path / name)
        else:
            (tmp_path / name).mkdir()  # planned, not started
    (tmp_path / "stage2-60-old").mkdir()  # no run of it
    text, _ = report.write(tmp_path, tmp_path, PUBLISHED)
    for name, keep in zip(names, kept, strict=True):
        assert (f"{name}: not started" in text) != keep
    dense, split = report.table(report.read_experiment(tmp_path))
    assert ("final_loss" in dense) == kept[0]
    assert ("jump" in split) == ("device_hours" in split) == (kept[1] and kept[2])
    assert ("difference" in split) == (kept[0] and kept[2])


def compared(folder, output, other) -> list[list[str]]:
    """The cells of the two rows that compare an experiment with another."""
    text, _ = report.write(folder, output, PUBLISHED, [other])
    first, second = text[text.index("**Other seeds") :].splitlines()[4:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (first, second)]


def test_seeds_are_compared_run_by_run(made, log_freq, tmp_path):
    write_start(tmp_path / "dense", 0, TOTAL, plain + 0.125, log_freq=log_freq, debug={"seed": 2})
    first, other = compared(made, tmp_path / "out", tmp_path)
    loss = curve(TOTAL) + 1
    assert first[:2] + first[-2:] == ["the first", "dense", f"{loss:.4f}", "+0.0000"]
    assert other[:2] + other[-2:] == ["debug.seed = 2", "dense", f"{loss + 0.125:.4f}", "+0.1250"]
    changed = {"debug": {"seed": 2}, "validation": {"freq": 7}}
    write_start(tmp_path / "dense", 0, TOTAL, plain + 0.25, log_freq=log_freq, **changed)
    assert compared(made, tmp_path / "out", tmp_path)[1][-2:] == ["-", "+0.2500"]  # not validated at its end
    write_start(tmp_path / "longer" / "dense", 0, TOTAL + 10, plain, log_freq=log_freq)
    assert compared(made, tmp_path / "out", tmp_path / "longer")[1][-1] == "-"  # ends at another step
    with pytest.raises(ValueError, match="has the first's settings and seed"):
        report.write(made, tmp_path / "out", PUBLISHED, [made])


@pytest.mark.parametrize("setting", ["lighthouse.rope = base", "parallelism.context_parallel_degree = 2"])
def test_other_settings_stand_beside_the_default_by_what_they_change(made, log_freq, tmp_path, setting):
    section, field, value = re.split(r"\W+", setting)
    for name, *steps in (("stage1", 0, 50), ("stage2-50", 50, TOTAL)):
        settings = {"log_freq": log_freq, section: {field: value}}
        write_start(tmp_path / "base" / name, *steps, plain - 0.25, **settings)
    # stage2-60 of the default has nothing to stand beside
    default, base = compared(made, tmp_path / "out", tmp_path / "base")
    assert [default[:2], base[:2]] == [["the first", "50 + 30"], [setting, "50 + 30"]]
    assert float(default[-1]) == 0
    assert float(base[-1]) == pytest.approx(float(base[-2]) - float(default[-2]), abs=2e-4) == 0.25


@pytest.mark.parametrize("reached, log_freq", [(1, 1), (30, 1), (79, 1), (78, 3)])
def test_an_unfinished_run_has_no_final_loss_yet(tmp_path, reached, log_freq):
    for name in ("dense", "stage1"):
        write_start(tmp_path / name, 0, reached, total=TOTAL, log_freq=log_freq)
    (tmp_path / f"stage2-{TOTAL}").mkdir()
    text, _ = report.write(tmp_path, tmp_path, PUBLISHED)
    assert f"dense: unfinished, at step {reached} of {TOTAL}" in text and "stage2-80: not started" in text
    dense, split = report.table(report.read_experiment(tmp_path))
    assert not dense.keys() & {"final_loss", "device_hours"} and "ktok_s" not in split
    assert ("ktok_s" in dense) == (reached > 1)  # the first point is the start's


def test_what_did_not_recover_diverged_or_lost_points_says_so(tmp_path):
    write_start(tmp_path / "stage1", 0, 50)
    write_start(tmp_path / "stage2-50", 50, 71, plain + 1)
    for name, *steps in (("a", 0, 20), ("b", 50, 80)):  # a kill lost what was logged between
        write_start(tmp_path / "dense", *steps, each_step * np.nan, total=80, log_freq=10, name=name)
    text, _ = report.write(tmp_path, tmp_path, PUBLISHED)
    assert "not within 21" in text and "| nan |" in text
    assert "nothing is recorded between steps 20 to 60" in text


def test_a_pipelines_stages_without_a_loss_do_not_count(tmp_path):
    for name, loss in (("rank_0", plain * 0 - 2), ("rank_2", plain), ("rank_1", plain * 0 - 2)):
        write_start(tmp_path, 0, 20, loss, name=name)
    assert records.read_run(tmp_path).loss.tolist() == pytest.approx(plain[1:21])


def test_a_stage_2_from_another_step_than_its_folder_says_is_named(tmp_path):
    write_start(tmp_path / "stage2-50", 40, 80)
    with pytest.raises(ValueError, match="starts from step 40, not 50: rename it to stage2-40"):
        report.read_experiment(tmp_path)


def test_losses_at_other_steps_are_not_compared(tmp_path):
    for name, *steps in (("dense", 0, 90), ("stage1", 0, 50), ("stage2-50", 50, 80)):
        write_start(tmp_path / name, *steps)
    text, _ = report.write(tmp_path, tmp_path, PUBLISHED)
    assert "- stage2-50: finished, but ends at step 80, dense at 90: not compared" in text
    [_, row] = report.table(report.read_experiment(tmp_path))
    assert "final_loss" in row and not row.keys() & {"hours_percent", "difference", "validation_difference"}


def test_a_validation_that_the_end_did_not_reach_is_no_final_loss(tmp_path):
    for name, freq in (("dense", 10), ("late", 5)):  # the last one logged is step 20's
        write_start(tmp_path / name, 0, 25, validation={"freq": freq})
    assert report.table(report.Experiment(records.read_run(tmp_path / "dense"), None, {}))[0]["validation_loss"]
    assert "validation_loss" not in report.table(report.Experiment(records.read_run(tmp_path / "late"), None, {}))[0]


def test_curves_hold_validations_of_steps_that_are_not_logged(tmp_path):
    write_start(tmp_path / "dense", 0, 48, log_freq=12)
    _, (*_, curves, _) = report.write(tmp_path, tmp_path, PUBLISHED)
    run = recorded(curves).dense
    assert run.validation_step.tolist() == [10, 20, 30, 40] and run.step.tolist() == [1, 12, 24, 36, 48]


def test_records_that_lack_something_name_it(tmp_path):
    write_start(tmp_path / "a", 0, 20)
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        records.read_run(tmp_path / "a")
    with SummaryWriter(tmp_path / "b") as writer:
        for s in range(5):
            writer.add_scalar(records.LOSS, 1.0, s)
    with pytest.raises(ValueError, match="throughput"):
        records.read_run(tmp_path / "b")


@pytest.mark.parametrize("kills", [[(37, 30)], [(31, 30), (59, 50)], [(45, 20), (29, 0), (70, 60)]])
def test_a_run_killed_and_resumed_reads_as_one_in_one_go(tmp_path, kills, log_freq):
    """kills: (last step done, step of the checkpoint that the next start resumes)."""
    write_start(tmp_path / "whole", 0, TOTAL, log_freq=log_freq)
    whole = records.read_run(tmp_path / "whole")

    starts, ends = [0, *(c for _, c in kills)], [*(k for k, _ in kills), TOTAL]
    surviving_starts = 0
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        # what a kill throws away leaves a trace only if it is not replaced
        redone = np.any([each_step > c for c in starts[i + 1 :]] or [each_step < 0], axis=0)
        surviving_starts += not redone[logged_steps(start, end, log_freq)].all()
        # names in an order unlike that of time
        loss = np.where(redone, 99.0, plain)
        write_start(tmp_path / "run", start, end, loss, total=TOTAL, log_freq=log_freq, name=f"{9 - i}")
    run = records.read_run(tmp_path / "run")
    for field in ("step", "loss", "validation_step", "validation_loss"):
        assert getattr(run, field).tolist() == getattr(whole, field).tolist()
    assert run.device_hours == pytest.approx(whole.device_hours)
    assert run.finished and run.gaps(0) == []
    assert run.starts.sum() == surviving_starts


def test_a_file_cut_off_anywhere_gives_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setitem(event_accumulator.DEFAULT_SIZE_GUIDANCE, "scalars", 5)  # else 10,000: no point is dropped
    file = write_start(tmp_path, 0, 12)
    whole, content = records.read_run(tmp_path), file.read_bytes()
    for size in range(0, len(content), 37):
        file.write_bytes(content[:size])
        run = records.read_run(tmp_path)
        n = 0 if run is None else len(run.step)
        assert n == 0 or run.step.tolist() == whole.step[:n].tolist()
        assert n == 0 or run.loss.tolist() == whole.loss[:n].tolist()
        # all but the point that was cut is there
        assert n >= size * 12 // len(content) - 1


def recorded(file: Path) -> report.Experiment:
    """The experiment that `table` wrote as `file`, a curves.csv; each of its runs has ended."""
    runs: dict = {}
    for point in csv.DictReader(file.read_text().splitlines()):
        runs.setdefault(point.pop("run"), []).append([float(value or "nan") for value in point.values()])
    for name, points in runs.items():
        columns = np.array(points).T
        fields = dict(zip(report.CURVES, columns[:-1, np.isfinite(columns[1])], strict=True))
        fields["validation_step"], fields["validation_loss"] = columns[[0, -1]][:, np.isfinite(columns[-1])]
        freqs = np.full_like(fields["step"], np.diff(fields["step"]).max())
        fields |= {"log_freqs": freqs, "starts": np.arange(len(freqs)) == 0}
        runs[name] = records.Run(Path(name), {"training": {"steps": int(fields["step"][-1])}}, **fields)
    tails = {int(name.removeprefix("stage2-")): run for name, run in runs.items() if name.startswith("stage2-")}
    return report.Experiment(runs.get("dense"), runs.get("stage1"), tails)


def without_compilation(experiment: report.Experiment) -> report.Experiment:
    """Without the time of each run's first step."""
    dense, stage1, *tails = (replace(run, seconds=np.where(run.starts, 0, run.seconds)) for run in experiment.runs)
    return report.Experiment(dense, stage1, dict(zip(experiment.tails, tails, strict=True)))


def test_pages_show_the_numbers_that_their_records_give():
    """The tables row by row; each other number of the text is one of the records', rounded."""
    results, folder = ROOT / "results", ROOT / "results/split_points"
    pages = ("README.md", "docs/quickstart.md", "docs/running.md")
    readme, quickstart, running = ((ROOT / page).read_text() for page in pages)
    assert report.markdown_rows(report.table(recorded(results / "passkey/curves.csv"))) in quickstart

    names = ("seed0", "seed1", "k1024-seed0", "half-rate-seed0", "base-seed0", "four-dense-layers-seed0")
    names += ("4000-seed0-first", "4000-seed1-first", "4000-seed0", "4000-seed1")
    experiments = [recorded(folder / f"curves/{name}.csv") for name in names]
    for first in (-4, -3):
        experiments[first] = replace(experiments[first], dense=experiments[first + 2].dense)
    tables = [[row for row in report.table(e) if row["status"] == "finished"] for e in experiments]
    lost = ("hours_percent", "equal_hours_difference")  # the second seed's dense run took another number of GPUs
    second = [{c: v for c, v in row.items() if c not in lost} | {"run": f"{row['run']}, seed 1"} for row in tables[1]]
    first_seed, other_seed = ([rows[0] | {"run": "dense, 4,000 steps"}, *rows[1:]] for rows in tables[-2:])
    recipe = [*first_seed, *(row | {"run": f"{row['run']}, seed 1"} for row in other_seed)]
    shown = [report.markdown_rows([*recipe, *tables[0], *second])]
    for row in csv.DictReader((folder / "27m.csv").read_text().splitlines()):
        hours, dense, loss = (float(row[c] or "nan") for c in ("hours_percent", "dense", "validation_loss"))
        cells = [row["seed"], row["run"], f"{hours:.0f}".replace("nan", "-"), f"{loss - dense:+.4f}"]
        shown.append(f"| {' | '.join(cells)} |")
    niah = json.loads((results / "niah/records.json").read_text())
    trials = (
        ("nothing", 0, 0, "85M-stage2-1250"),
        ("k = 1,024", 2, 2, "85M-k1024-stage2-1250"),
        ("k = 1,024, half the rate in stage 2", 2, 3, None),
        ("RoPE before pooling", 4, 4, "85M-base-stage2-1250"),
        ("first and last two layers dense", 5, 5, "85M-four-dense-stage2-1250"),
    )
    for changed, first, second_stage, name in trials:
        stage1, loss = tables[first][-1], tables[second_stage][-1]["validation_loss"]
        run = experiments[first].stage1
        [at_1000] = run.validation_loss[run.validation_step == 1000]
        cells = [changed, f"{at_1000:.3f}", f"{stage1['ktok_s']:.1f}", f"{loss:.4f}"]
        cells.append(f"{niah[name]['mean']:.2f}" if name else "-")
        shown.append(f"| {' | '.join(cells)} |")
    page = (folder / "README.md").read_text()
    for text in shown:
        assert text in page
        page = page.replace(text, "")

    known = [value for rows in tables for row in rows for value in row.values() if isinstance(value, float)]
    known += [record["mean"] for name, record in niah.items() if name.startswith("85M")]
    for row, other in zip(*tables[:2], strict=True):
        known.append(100 * other["device_hours"] / tables[0][0]["device_hours"])
        known += [row["validation_loss"] - other["validation_loss"], 100 - 100 * row["ktok_s"] / other["ktok_s"]]
    for run in [experiments[0].dense, experiments[1].dense, *(e.stage1 for e in experiments if e.stage1)]:
        known += [run.loss[run.step == 100][0], mean_loss(run.step, run.loss, 500, 100)]
        known += [*run.validation_loss[run.validation_step == 1000], np.median(run.tokens_per_second[1:]) / 1e6]
    known.append(100 - tables[-2][-1]["hours_percent"])
    known.append(np.mean([rows[-1]["validation_difference"] for rows in tables[-4:]]))
    known += [row["hours_percent"] for e in experiments[-4:] for row in report.table(without_compilation(e))[1:]]
    text = page[page.index("**What it shows**") :] + readme[readme.index("| 85M at") : readme.index("At the speeds")]
    text += running[running.index("In our [85M") : running.index("- **`grad_norm`**")]
    for number in re.findall(r"\d+\.\d+|\d+(?= (?:to \d+ )?%)", text):
        digits = len(number.partition(".")[2])
        assert any(f"{abs(value):.{digits}f}" == number for value in known), number
