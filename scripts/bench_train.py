"""Train a few steps of several job files in one call: speed, memory, MFU and the ratio to the first.

    python scripts/bench_train.py                                       # the 530M recipe, dense and stage 1
    python scripts/bench_train.py --nproc 2 --run dense configs/530m/dense.toml \\
        --run selective configs/530m/stage1.toml activation_checkpoint.mode=selective

A run is a name, a job file and settings of it. Every run trains on local sources, one sequence a data-parallel
rank and step, without checkpoints. One that fails, for want of memory say, is reported and the others go on.
--profile takes each run's last step apart, every part beside its limit on this GPU. With --append the runs of
several calls stand side by side.
"""

import argparse
import json
import platform
import re
import shutil
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import _start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan_ext.command_line import CommandFailed, Display, at_least, local_path, make_folder
from torchtitan_ext.records import CONFIG_FILE, LOSS, SECONDS, TOKENS_PER_SECOND

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

MFU, PEAK = "mfu(%)", "memory/max_reserved(GiB)"
PROFILED = 2  # steps
RECIPE = [["dense", "configs/530m/dense.toml"], ["stage1", "configs/530m/stage1.toml"]]


def job_arguments(settings: list[str], args: argparse.Namespace) -> list[str]:
    """A run's torchtitan arguments after its job file: no checkpoints, local sources, and the run's settings."""
    found = [
        *("--checkpoint.no_enable", "--checkpoint.initial_load_path=None"),
        *(f"--training.steps={args.steps}", "--training.global_batch_size=-1"),
        *("--training.dataset=python_source", f"--metrics.log_freq={args.window}"),
        "--metrics.enable_tensorboard",
    ]
    if args.dataset_path:
        found.append(f"--training.dataset_path={args.dataset_path}")
    if args.profile:
        found += ["--profiling.enable_profiling", f"--profiling.profile_freq={args.steps}"]
        found += [f"--profiling.profiler_active={PROFILED}", "--profiling.profiler_warmup=1"]
    for setting in settings:
        path, _, value = setting.partition("=")
        section, _, field = path.rpartition(".")
        if value in ("true", "false"):  # torchtitan's switches take no value
            setting = f"{section}.{field if value == 'true' else f'no_{field}'}"
        found.append(f"--{setting}")
    return found


def train(
    nproc: int,
    config: str,
    settings: list[str],
    args: argparse.Namespace,
    folder: Path,
    on_step: Callable[[int], None],
) -> str | None:
    """Run one job, its log in `folder`; returns the last lines of its output if it failed."""
    from torchtitan_ext.runner import STEP_LINE, torchrun, training

    command = [*torchrun(nproc, config), *job_arguments(settings, args)]
    last: deque[str] = deque(maxlen=60)
    with training([*command, f"--job.dump_folder={folder}"], folder / "log.txt") as (child, lines):
        for line in lines:
            last.append(line)
            if found := STEP_LINE.search(line):
                on_step(int(found[1]))
    return "".join(last) if child.returncode else None


def timed_windows(window: int, profile: bool) -> slice:
    """The logged points that count. The first window warms up, and the end of the last one is what is profiled.

    Step 1 is logged whatever the window."""
    return slice(1 if window == 1 else 2, -1 if profile else None)


def record(folder: Path, timed: slice) -> dict:
    """A row's figures, from the run's TensorBoard events; medians over the timed windows."""
    [file] = folder.glob("**/events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    values = {
        tag: [point.value for point in events.Scalars(tag)]
        for tag in (LOSS, SECONDS, TOKENS_PER_SECOND, MFU, PEAK)
    }
    job = json.loads((folder / CONFIG_FILE).read_text())
    return {
        "seq_len": job["training"]["seq_len"],
        "tok_s_gpu": statistics.median(values[TOKENS_PER_SECOND][timed]),
        "step_s": statistics.median(values[SECONDS][timed]),
        "peak_gib": max(values[PEAK]),
        "mfu": statistics.median(values[MFU][timed]),
        "loss_first": values[LOSS][0],
        "loss_last": values[LOSS][-1],
        "losses": values[LOSS],
    }


def profile(folder: Path, job: "JobConfig") -> dict:
    """The parts of the run's last step, on its first rank, and the kernels behind them."""
    from torchtitan_ext import step_profile
    from torchtitan_ext.model import flavors

    [trace] = folder.glob("profile_traces/*/rank0_trace.json")
    step = step_profile.last_step(step_profile.read_kernels(trace))
    vocab_size = flavors[job.model.flavor].vocab_size
    parts, kernels = step_profile.breakdown(*step, job.training.seq_len, vocab_size)
    return {"parts_ms": parts, "kernels": kernels[:60]}


def add_limits(jobs: "dict[str, JobConfig]", profiles: dict[str, dict]) -> None:
    """Measure this GPU's rates, and give the profiles of these jobs the limits of their parts."""
    from torchtitan_ext import step_profile
    from torchtitan_ext.model import flavors

    rates = step_profile.measure_rates()
    for name, job in jobs.items():
        args = replace(flavors[job.model.flavor])
        args.update_from_config(job)
        profiles[name]["rates"] = rates
        profiles[name]["limits_ms"] = step_profile.limits(
            job.training.seq_len, job.training.local_batch_size, args, rates
        )


def kept(row: dict, rows: list[dict]) -> str | None:
    """Of the speed that the run of the same name has on one device, None for that one itself."""
    alone = [r for r in rows if (r["name"], r["n_gpus"]) == (row["name"], 1) and "error" not in r]
    if row["n_gpus"] == 1 or not alone:
        return None
    return f"{100 * row['tok_s_gpu'] / alone[-1]['tok_s_gpu']:.1f} %"


def table(rows: list[dict]) -> str:
    lines = [
        "| run | devices | seq_len | tok/s a device | of one device | step s | peak GiB | MFU % | loss "
        "| against the first |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['n_gpus']} | {row['error']} | | | | | | | |")
            continue
        first = rows[0].get("tok_s_gpu", float("nan"))
        lines.append(
            f"| {row['name']} | {row['n_gpus']} | {row['seq_len']:,} | {row['tok_s_gpu']:,.0f} "
            f"| {kept(row, rows) or '-'} | {row['step_s']:.3f} "
            f"| {row['peak_gib']:.1f} | {row['mfu']:.1f} | {row['loss_first']:.2f} to {row['loss_last']:.2f} "
            f"| {row['tok_s_gpu'] / first:.2f}x |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], machine: dict, path: Path) -> None:
    """Bars of tokens a second a device, the runs of one name side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["name"] for row in rows))
    numbers = sorted({row["n_gpus"] for row in rows})
    width = 0.8 / len(numbers)
    figure, axis = plt.subplots(figsize=(max(6, 1.6 * len(names)), 4.5))
    for place, number in enumerate(numbers):
        chosen = [row for row in rows if row["n_gpus"] == number]
        bars = axis.bar(
            [names.index(row["name"]) + (place - (len(numbers) - 1) / 2) * width for row in chosen],
            [row["tok_s_gpu"] / 1000 for row in chosen],
            width,
            label=f"{number} device{'s' * (number > 1)}",
        )
        axis.bar_label(bars, [kept(row, rows) or "" for row in chosen], size=8)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("thousands of tokens a second a device")
    axis.set_title(f"A training step, {machine['device']}; shares are of one device's speed")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def losses(rows: list[dict]) -> str:
    """The logged losses of runs side by side, as many as all of them have."""
    lines = [
        "| point | " + " | ".join(f"{row['name']} on {row['n_gpus']}" for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for number, values in enumerate(zip(*(row["losses"] for row in rows), strict=False), 1):
        lines.append(f"| {number} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        action="append",
        nargs="+",
        metavar=("NAME CONFIG", "section.field=value"),
        help="a run's name, job file and settings; once a run (default: dense and stage 1 of the 530M recipe)",
    )
    parser.add_argument(
        "--nproc",
        metavar="N",
        type=at_least(1),
        nargs="+",
        default=[1],
        help="processes, one a device; all runs at each (default: 1)",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=at_least(1),
        default=16,
        help="of each run (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=at_least(1),
        default=4,
        help="steps timed at a time; the first of them warm up (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset-path", metavar="FOLDER", help="a tree of sources (default: the standard library)"
    )
    parser.add_argument(
        "--settings",
        metavar="SETTING",
        nargs="+",
        default=[],
        help="section.field=value for every run (default: none)",
    )
    parser.add_argument(
        "--profile", action="store_true", help="take the last step apart (on a GPU)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=local_path,
        help="the records; each run's log goes beside them (default: bench_train.json in results on a GPU, else in "
        "outputs)",
    )
    parser.add_argument("--append", action="store_true", help="add to the records in --output")
    args = parser.parse_args()

    import torch

    from torchtitan_ext.runner import load_job

    on_gpu = torch.cuda.is_available()
    args.output = args.output or Path("results" if on_gpu else "outputs", "bench_train.json")
    least = (3 if args.profile else 2) * args.window
    if args.steps < least or args.steps % args.window:
        parser.error(
            f"--steps {args.steps}: must be a multiple of --window {args.window}, at least {least}"
        )
    if args.profile and not on_gpu:
        parser.error("--profile: there is no CUDA device here")
    if not on_gpu and not args.run:
        parser.error(
            "the 530M recipe needs a CUDA device, which is not here: name other runs by --run"
        )
    if args.output.is_dir():
        parser.error(f"--output {args.output}: is a folder; name a file")
    runs = args.run or RECIPE
    jobs = {}
    for run in runs:
        name = run[0]
        if len(run) < 2 or not Path(run[1]).is_file():
            parser.error(f"--run {' '.join(run)}: give a name and the path of a job file")
        if name in jobs or not re.fullmatch(r"[\w-]+", name):
            parser.error(
                f"--run {name}: give each run a name of its own, of letters, digits, _ and -"
            )
        run.extend(args.settings)
        try:
            # A start from a checkpoint is checked by the run, which has a folder of its own.
            jobs[name] = load_job(Path(run[1]), job_arguments(run[2:], args))
        except ValueError as error:
            parser.error(f"--run {' '.join(run)}: {error}")

    machine = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
    }
    records = {"machine": machine, "commands": [], "rows": [], "profiles": {}}
    if args.append and args.output.exists():
        try:
            found = json.loads(args.output.read_text())
            records = {key: found[key] for key in records}
        except (ValueError, KeyError, TypeError) as error:
            parser.error(f"--append: {args.output} is no record ({error!r}); name another --output")
        if records["machine"] != machine:
            parser.error(f"--append: {args.output} is of {records['machine']}, this is {machine}")
    records["commands"].append(" ".join(["python", *sys.argv]))

    rows, profiles, limited = [], {}, {}
    todo = [(nproc, *run) for nproc in args.nproc for run in runs]
    timed = timed_windows(args.window, args.profile)
    make_folder(args.output.parent)

    def save():
        both = {
            "rows": records["rows"] + rows,
            "profiles": records["profiles"] | profiles,
        }
        args.output.write_text(json.dumps(records | both, indent=1) + "\n")

    with Display() as display:

        def on_step(step):
            display.advance(step - display.done, f"{step}/{args.steps} steps, ")

        for number, (nproc, name, config, *settings) in enumerate(todo, 1):
            title = f"[{number}/{len(todo)}] {name}"
            display.say(f"{title}: {args.steps} steps of {config}")
            display.start(title, args.steps)
            row = {"name": name, "config": " ".join([config, *settings]), "n_gpus": nproc}
            with tempfile.TemporaryDirectory() as tmp:
                error = train(nproc, config, settings, args, Path(tmp), on_step)
                log = args.output.with_name(f"bench_train_{name}_{nproc}.log")
                shutil.copy(Path(tmp, "log.txt"), log)
                if error:
                    out_of_memory = re.search(
                        "OutOfMemoryError|CUDA.*out of memory", log.read_text()
                    )
                    row["error"] = "out of memory" if out_of_memory else f"failed: {log}"
                    display.say(row["error"] if out_of_memory else error)
                else:
                    row |= record(Path(tmp), timed)
                    if args.profile:
                        key = name if nproc == 1 else f"{name} on {nproc}"
                        profiles[key] = profile(Path(tmp), jobs[name])
                        # They are those of a lone device that recomputes nothing.
                        if nproc == 1 and jobs[name].activation_checkpoint.mode == "none":
                            limited[key] = jobs[name]
            rows.append(row)
            display.say(table([row]).splitlines()[-1])
            save()
    if limited:
        add_limits(limited, profiles)
        save()
    if profiles:
        from torchtitan_ext import step_profile
    for name, found in profiles.items():
        print(f"\n{name}\n\n{step_profile.table(found['parts_ms'], found.get('limits_ms'))}")
    failed = [row["name"] for row in rows if "error" in row]
    rows = records["rows"] + rows
    if logged := [row for row in rows if "losses" in row]:
        print(f"\n{losses(logged)}")
    if len({row["n_gpus"] for row in logged}) > 1:
        plot(logged, machine, args.output.with_suffix(".png"))
        print(f"\nplot: {args.output.with_suffix('.png')}")
    print(f"\n{machine}\n\n{table(rows)}\n\nrecords: {args.output}")
    if failed:
        raise CommandFailed(
            f"failed: {', '.join(failed)}; why is said above and in the logs beside {args.output}"
        )
    return 0


if __name__ == "__main__":
    _start.run(main)
