"""Train a few steps of several job files in one call: speed, memory, MFU and the ratio to the first.

Every run trains on local sources, one sequence per data-parallel rank and step, without checkpoints. One that
fails, for want of memory say, is reported and the others go on. For example: --nproc 1 2
--run stage1 configs/530m/stage1.toml --run full configs/530m/stage1.toml activation_checkpoint.mode=full
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tyro.conf import UseAppendAction, arg

from torchtitan_ext.arguments import Positive, Positives, start
from torchtitan_ext.console import CommandFailed, Display, make_folder
from torchtitan_ext.experiment.records import LOSS, SECONDS, TOKENS_PER_SECOND, read_scalars
from torchtitan_ext.figures import markdown_table, new_figure
from torchtitan_ext.jobs.recorded import CONFIG_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchtitan.config import JobConfig

MFU, PEAK = "mfu(%)", "memory/max_reserved(GiB)"
PROFILED = 2  # steps
RECIPE = (("dense", "configs/530m/dense.toml"), ("stage1", "configs/530m/stage1.toml"))
NamedRuns = UseAppendAction[tuple[tuple[str, ...], ...]]


class Run(NamedTuple):
    name: str
    config: str
    settings: tuple[str, ...]  # section.field=value


@dataclass
class BenchTrain:
    runs: Annotated[NamedRuns, arg(name="run", metavar="NAME CONFIG [SETTING ...]")] = ()
    """a run's name, job file and settings, section.field=value; without any, the 530M recipe's dense and stage 1"""
    nproc: Positives = (1,)  # processes, one per device; all runs at each number
    steps: Positive = 16  # of each run
    window: Positive = 4  # steps timed at a time; the first of them warm up
    dataset_path: Path | None = None  # a tree of sources; None for the standard library
    settings: tuple[str, ...] = ()  # section.field=value for every run
    profile: bool = False  # take the last step apart, every part beside its limit on this GPU
    output: Path | None = None
    """the records, each run's log beside them; None for bench_train.json in results on a GPU, else in outputs"""
    append: bool = False  # add to the records in --output, so that the runs of several calls stand side by side

    def run(self) -> None:
        import torch

        from torchtitan_ext.experiment.runner import load_job
        from torchtitan_ext.experiment.timing import this_machine
        from torchtitan_ext.train.spec import register

        on_gpu = torch.cuda.is_available()
        output = self.output or Path("results" if on_gpu else "outputs", "bench_train.json")
        least = (3 if self.profile else 2) * self.window
        if self.steps < least or self.steps % self.window:
            raise ValueError(f"--steps {self.steps}: must be a multiple of --window {self.window}, at least {least}")
        if self.profile and not on_gpu:
            raise ValueError("--profile: there is no CUDA device here")
        if not on_gpu and not self.runs:
            raise ValueError("the 530M recipe needs a CUDA device, which is not here: name other runs by --run")
        if output.is_dir():
            raise ValueError(f"--output {output}: is a folder; name a file")
        runs = list(self.named_runs())
        # A start from a checkpoint is checked by the run, which has a folder of its own.
        register()
        jobs = {run.name: load_job(Path(run.config), self.job_arguments(run.settings)) for run in runs}
        machine = this_machine()
        records = self.begin_records(output, machine)
        make_folder(output.parent)

        rows, profiles, limited = [], {}, {}
        todo = [(nproc, run) for nproc in self.nproc for run in runs]
        with Display() as display:
            for number, (nproc, run) in enumerate(todo, 1):
                title = f"[{number}/{len(todo)}] {run.name}"
                display.say(f"{title}: {self.steps} steps of {run.config}")
                display.start(title, self.steps)
                row = {"name": run.name, "config": " ".join([run.config, *run.settings]), "n_gpus": nproc}
                with tempfile.TemporaryDirectory() as folder:

                    def on_step(step: int) -> None:
                        display.advance(step - display.done, f"{step}/{self.steps} steps, ")

                    failure = self.train(nproc, run, Path(folder), on_step)
                    log = output.with_name(f"bench_train_{run.name}_{nproc}.log")
                    shutil.copy(Path(folder, "log.txt"), log)
                    if failure and re.search("OutOfMemoryError|CUDA.*out of memory", log.read_text()):
                        row["error"] = failure = "out of memory"
                    elif failure:
                        row["error"] = f"failed: {log}"
                    else:
                        row |= measured(Path(folder), timed_windows(self.window, self.profile))
                    if failure:
                        display.say(failure)
                    elif self.profile:
                        key = run.name if nproc == 1 else f"{run.name} on {nproc}"
                        profiles[key] = profiled_step(Path(folder), jobs[run.name])
                        # The limits are those of one device that recomputes nothing.
                        if nproc == 1 and jobs[run.name].activation_checkpoint.mode == "none":
                            limited[key] = jobs[run.name]
                rows.append(row)
                records["rows"].append(row)
                records["profiles"] |= profiles
                display.say(table([row]).splitlines()[-1])
                output.write_text(json.dumps(records, indent=1) + "\n")
        if limited:
            add_limits(limited, profiles)
            output.write_text(json.dumps(records, indent=1) + "\n")
        if profiles:
            from torchtitan_ext.experiment import step_profile

            for name, profile in profiles.items():
                print(f"\n{name}\n\n{step_profile.table(profile['parts_ms'], profile.get('limits_ms'))}")
        if logged := [row for row in records["rows"] if "losses" in row]:
            print(f"\n{losses(logged)}")
        if len({row["n_gpus"] for row in logged}) > 1:
            draw(logged, machine).savefig(output.with_suffix(".png"), dpi=150)
            print(f"\nplot: {output.with_suffix('.png')}")
        print(f"\n{machine}\n\n{table(records['rows'])}\n\nrecords: {output}")
        if failed := [row["name"] for row in rows if "error" in row]:
            raise CommandFailed(f"failed: {', '.join(failed)}; why is said above and in the logs beside {output}")

    def named_runs(self) -> Iterator[Run]:
        """The runs. Raises ValueError for one that can't be."""
        names = set()
        for words in self.runs or RECIPE:
            where, name = f"--run {' '.join(words)}", "".join(words[:1])
            if len(words) < 2 or not Path(words[1]).is_file():
                raise ValueError(f"{where}: give a name and the path of a job file")
            if name in names or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{where}: give each run a name of its own, of letters, digits, _ and -")
            names.add(name)
            yield Run(name, words[1], (*words[2:], *self.settings))

    def job_arguments(self, settings: tuple[str, ...]) -> list[str]:
        """A run's torchtitan arguments after its job file: no checkpoints, local sources, and the run's settings."""
        arguments = [
            "--checkpoint.no_enable",
            "--checkpoint.initial_load_path=None",
            f"--training.steps={self.steps}",
            "--training.global_batch_size=-1",
            "--training.dataset=python_source",
            f"--metrics.log_freq={self.window}",
            "--metrics.enable_tensorboard",
        ]
        if self.dataset_path:
            arguments.append(f"--training.dataset_path={self.dataset_path}")
        if self.profile:
            arguments += ["--profiling.enable_profiling", f"--profiling.profile_freq={self.steps}"]
            arguments += [f"--profiling.profiler_active={PROFILED}", "--profiling.profiler_warmup=1"]
        for setting in settings:
            path, _, value = setting.partition("=")
            if value in ("true", "false"):  # torchtitan's switches take no value
                section, _, field = path.rpartition(".")
                setting = f"{section}.{field if value == 'true' else f'no_{field}'}"
            arguments.append(f"--{setting}")
        return arguments

    def begin_records(self, output: Path, machine: dict) -> dict:
        """Those in `output` with --append, else none, and this call. Raises ValueError for those of another machine."""
        records = {"machine": machine, "commands": [], "rows": [], "profiles": {}}
        if self.append and output.exists():
            try:
                found = json.loads(output.read_text())
                records = {key: found[key] for key in records}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--append: {output} is no record ({error!r}); name another --output") from error
            if records["machine"] != machine:
                raise ValueError(f"--append: {output} is of {records['machine']}, this is {machine}")
        records["commands"].append(" ".join(["python", *sys.argv]))
        return records

    def train(self, nproc: int, run: Run, folder: Path, on_step: Callable[[int], None]) -> str | None:
        """Run one job, its log in `folder`; returns the end of its output if it failed."""
        from torchtitan_ext.jobs.launch import torchrun, training

        command = [*torchrun(nproc, run.config), *self.job_arguments(run.settings), f"--job.dump_folder={folder}"]
        with training(command, folder / "log.txt") as child:
            for step in child.steps():
                on_step(step.number)
        return child.output if child.process.returncode else None


def timed_windows(window: int, profile: bool) -> slice:
    """The logged points that count. The first window warms up, and the end of the last one is what is profiled.

    Step 1 is logged whatever the window.
    """
    return slice(1 if window == 1 else 2, -1 if profile else None)


def measured(folder: Path, timed: slice) -> dict:
    """A row's figures, from the run's TensorBoard events; medians over the timed windows."""
    [file] = folder.glob("**/events.out.tfevents.*")
    values = {tag: [point.value for point in points] for tag, points in read_scalars(file).items()}
    return {
        "seq_len": json.loads((folder / CONFIG_FILE).read_text())["training"]["seq_len"],
        "tok_s_gpu": median(values[TOKENS_PER_SECOND][timed]),
        "step_s": median(values[SECONDS][timed]),
        "peak_gib": max(values[PEAK]),
        "mfu": median(values[MFU][timed]),
        "loss_first": values[LOSS][0],
        "loss_last": values[LOSS][-1],
        "losses": values[LOSS],
    }


def profiled_step(folder: Path, job: "JobConfig") -> dict:
    """The parts of the run's last step, on its first rank, and the kernels behind them."""
    from torchtitan_ext.experiment import step_profile
    from torchtitan_ext.model import flavors

    [trace] = folder.glob("profile_traces/*/rank0_trace.json")
    step = step_profile.last_step(step_profile.read_kernels(trace))
    parts, kernels = step_profile.breakdown(*step, job.training.seq_len, flavors[job.model.flavor].vocab_size)
    return {"parts_ms": parts, "kernels": kernels[:60]}


def add_limits(jobs: "dict[str, JobConfig]", profiles: dict[str, dict]) -> None:
    """Measure this GPU's rates, and give the profiles of these jobs the limits of their parts."""
    from torchtitan_ext.experiment import step_profile
    from torchtitan_ext.model import flavors

    rates = step_profile.measure_rates()
    for name, job in jobs.items():
        args, training = replace(flavors[job.model.flavor]), job.training
        args.update_from_config(job)
        limits = step_profile.limits(training.seq_len, training.local_batch_size, args, rates)
        profiles[name] |= {"rates": rates, "limits_ms": limits}


def share_of_one(row: dict, rows: list[dict]) -> str | None:
    """Of the speed that the run of the same name has on one device, None for that one itself."""
    alone = [r for r in rows if (r["name"], r["n_gpus"]) == (row["name"], 1) and "error" not in r]
    if row["n_gpus"] == 1 or not alone:
        return None
    return f"{100 * row['tok_s_gpu'] / alone[-1]['tok_s_gpu']:.1f} %"


def table(rows: list[dict]) -> str:
    head = ("run", "devices", "seq_len", "tok/s per device", "of one device", "step s", "peak GiB", "MFU %", "loss")
    cells = []
    for row in rows:
        cells.append([row["name"], row["n_gpus"]])
        if "error" in row:
            cells[-1] += [row["error"], *[""] * 7]
            continue
        first = rows[0].get("tok_s_gpu", float("nan"))
        cells[-1] += [f"{row['seq_len']:,}", f"{row['tok_s_gpu']:,.0f}", share_of_one(row, rows) or "-"]
        cells[-1] += [f"{row['step_s']:.3f}", f"{row['peak_gib']:.1f}", f"{row['mfu']:.1f}"]
        cells[-1] += [f"{row['loss_first']:.2f} to {row['loss_last']:.2f}", f"{row['tok_s_gpu'] / first:.2f}x"]
    return markdown_table([*head, "against the first"], cells)


def losses(rows: list[dict]) -> str:
    """The logged losses of runs side by side, as many as all of them have."""
    head = ["point", *(f"{row['name']} on {row['n_gpus']}" for row in rows)]
    points = enumerate(zip(*(row["losses"] for row in rows), strict=False), 1)
    return markdown_table(head, ([number, *(f"{value:.4f}" for value in values)] for number, values in points))


def draw(rows: list[dict], machine: dict) -> "Figure":
    """Bars of tokens per second per device, the runs of one name side by side."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    numbers = sorted({row["n_gpus"] for row in rows})
    width = 0.8 / len(numbers)
    figure = new_figure(max(6, 1.6 * len(names)), 4.5)
    axes = figure.subplots()
    for place, number in enumerate(numbers):
        chosen = [row for row in rows if row["n_gpus"] == number]
        bars = axes.bar(
            [names.index(row["name"]) + (place - (len(numbers) - 1) / 2) * width for row in chosen],
            [row["tok_s_gpu"] / 1000 for row in chosen],
            width,
            label="1 device" if number == 1 else f"{number} devices",
        )
        axes.bar_label(bars, [share_of_one(row, rows) or "" for row in chosen], size=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("thousands of tokens per second per device")
    axes.set_title(f"A training step, {machine['device']}; shares are of one device's speed")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    start(BenchTrain)
