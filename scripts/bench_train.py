"""Train a few steps of several job files in one call: speed, memory, MFU and the ratio to the first.

Every run trains on local sources, one sequence per data-parallel rank and step, without checkpoints. A run
that fails, for example out of memory, is reported, and the next starts. For example: --nproc 1 2
--run stage1 configs/530m/stage1.toml --run full configs/530m/stage1.toml activation_checkpoint.mode=full
"""

import json
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

from torchtitan.config import JobConfig
from tyro.conf import UseAppendAction, arg

from torchtitan_ext.arguments import Positive, Positives, start
from torchtitan_ext.console import CommandFailed, make_folder
from torchtitan_ext.experiment import step_profile
from torchtitan_ext.experiment.records import LOSS, SECONDS, TOKENS_PER_SECOND, read_scalars
from torchtitan_ext.experiment.runner import load_job
from torchtitan_ext.experiment.timing import ON_GPU, this_machine
from torchtitan_ext.figures import markdown_table
from torchtitan_ext.jobs.job_file import arguments_of
from torchtitan_ext.jobs.launch import torchrun, training
from torchtitan_ext.jobs.recorded import CONFIG_FILE, read_config
from torchtitan_ext.model import flavors
from torchtitan_ext.progress import Display
from torchtitan_ext.train.spec import register

MFU, PEAK = "mfu(%)", "memory/max_reserved(GiB)"
PROFILED = 2  # steps
RECIPE = (("dense", "configs/530m/dense.toml"), ("stage1", "configs/530m/stage1.toml"))
NamedRuns = UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass
class BenchTrain:
    runs: Annotated[NamedRuns, arg(name="run", metavar="NAME CONFIG [SETTING ...]")] = ()
    """a run's name, job file and settings, section.field=value; without any, the 530M recipe's dense and stage 1"""
    nproc: Positives = (1,)  # processes, one per device; every run at each number
    steps: Positive = 16  # of each run
    window: Positive = 4  # steps timed at a time; the first of them warm up
    settings: tuple[str, ...] = ()  # section.field=value for every run
    profile: bool = False  # split the last step's time into parts, each beside its limit on this GPU
    output: Path = Path("outputs/bench_train.json")  # the records; logs go beside it
    append: bool = False  # add to the records in --output, to compare the runs of several calls

    def run(self) -> None:
        output, least = self.output, (3 if self.profile else 2) * self.window
        if self.steps < least or self.steps % self.window:
            raise ValueError(f"--steps {self.steps}: must be a multiple of --window {self.window}, at least {least}")
        if self.profile and not ON_GPU:
            raise ValueError("--profile: there is no CUDA device here")
        if not ON_GPU and not self.runs:
            raise ValueError("the 530M recipe needs a CUDA device, which is missing here: give other runs with --run")
        if output.is_dir():
            raise ValueError(f"--output {output}: is a folder; name a file")
        register()
        runs, jobs = self.runs or RECIPE, {}
        for words in runs:
            where, name = f"--run {' '.join(words)}", "".join(words[:1])
            if len(words) < 2 or not Path(words[1]).is_file():
                raise ValueError(f"{where}: give a name and the path of a job file")
            if name in jobs or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"{where}: give each run a unique name of letters, digits, _ and -")
            jobs[name] = load_job(Path(words[1]), self.job_arguments(words))
        records: dict = {"machine": this_machine(), "commands": [], "rows": [], "profiles": {}}
        if self.append and output.exists():
            records = json.loads(output.read_text())
            if records["machine"] != this_machine():
                raise ValueError(f"--append: {output} has records of {records['machine']}, this is {this_machine()}")
        records["commands"].append(" ".join(["python", *sys.argv]))
        make_folder(output.parent)

        profiles, limited = records["profiles"], {}
        todo = [(nproc, words) for nproc in self.nproc for words in runs]
        with Display() as display:
            for number, (nproc, words) in enumerate(todo, 1):
                name, job = words[0], jobs[words[0]]
                title = f"[{number}/{len(todo)}] {name}"
                display.say(f"{title}: {self.steps} steps of {words[1]}")
                display.begin(title, self.steps)
                row = {"name": name, "config": " ".join([*words[1:], *self.settings]), "n_gpus": nproc}
                log = output.with_name(f"bench_train_{name}_{nproc}.log")
                with tempfile.TemporaryDirectory() as folder:
                    failure = self.train(nproc, words, Path(folder), log, display)
                    if failure and re.search("OutOfMemoryError|CUDA.*out of memory", log.read_text()):
                        row["error"] = "out of memory"
                    elif failure:
                        row["error"] = f"failed: {log}"
                        display.say(failure)
                    else:
                        row |= measured(Path(folder), job, self.window, self.profile)
                        for rank, profile in enumerate(profiles_of_ranks(Path(folder), job)):
                            profiles[name if nproc == 1 else f"{name} on {nproc}, rank {rank}"] = profile
                        # The limits are those of one device that recomputes nothing.
                        if self.profile and nproc == 1 and job.activation_checkpoint.mode == "none":
                            limited[name] = job
                records["rows"].append(row)
                display.say(table([row]).splitlines()[-1])
                output.write_text(json.dumps(records, indent=1) + "\n")
        if limited:  # after the runs, which need all of the GPU's memory
            rates = step_profile.measure_rates()
            for key, job in limited.items():
                args, training = replace(flavors[job.model.flavor]), job.training
                args.update_from_config(job)
                limits = step_profile.limits(training.seq_len, training.local_batch_size, args, rates)
                profiles[key] |= {"rates": rates, "limits_ms": limits}
            output.write_text(json.dumps(records, indent=1) + "\n")
        for key, profile in profiles.items():
            print(f"\n{key}\n\n{step_profile.table(profile['parts_ms'], profile.get('limits_ms'))}")
        print(f"\n{records['machine']}\n\n{table(records['rows'])}\n\nrecords: {output}")
        if failed := [row["name"] for row in records["rows"][-len(todo) :] if "error" in row]:
            raise CommandFailed(f"failed: {', '.join(failed)}; the reasons are above and in the logs beside {output}")

    def job_arguments(self, words: tuple[str, ...]) -> list[str]:
        """A run's torchtitan arguments after its job file: no checkpoints, local sources, and the run's settings."""
        arguments = ["--checkpoint.no_enable", "--checkpoint.initial_load_path=None", f"--training.steps={self.steps}"]
        arguments += ["--training.dataset=python_source", "--training.dataset_path=None"]
        arguments += ["--training.global_batch_size=-1", f"--metrics.log_freq={self.window}"]
        arguments += ["--metrics.enable_tensorboard", "--checkpoint.no_initial_load_in_hf"]
        if self.profile:
            arguments += ["--profiling.enable_profiling", f"--profiling.profile_freq={self.steps}"]
            arguments += [f"--profiling.profiler_active={PROFILED}", "--profiling.profiler_warmup=1"]
        for setting in (*words[2:], *self.settings):
            field, _, value = setting.partition("=")
            arguments += arguments_of(field, {"true": True, "false": False}.get(value, value))
        return arguments

    def train(self, nproc: int, words: tuple[str, ...], folder: Path, log: Path, display: Display) -> str | None:
        """Run one job into `folder`; returns the end of its output if it failed."""
        log.unlink(missing_ok=True)
        command = [*torchrun(nproc, words[1]), *self.job_arguments(words), f"--job.dump_folder={folder}"]
        with training(command, log) as child:
            for step, *_ in child.steps():
                display.show(step, f"{step}/{self.steps} steps, ")
        return child.output if child.process.returncode else None


def measured(folder: Path, job: JobConfig, window: int, profile: bool) -> dict:
    """A row's figures, from the run's TensorBoard events; medians over the timed windows.

    The first window warms up (step 1 is always logged); a profile covers the end of the last one.
    """
    timed = slice(1 if window == 1 else 2, -1 if profile else None)
    [file] = folder.glob("**/events.out.tfevents.*")
    values = {tag: [point.value for point in points] for tag, points in read_scalars(file).items()}
    return {
        "seq_len": job.training.seq_len,
        "kernel": read_config(folder / CONFIG_FILE, "attention.kernel")["attention"]["kernel"],
        "tok_s_gpu": median(values[TOKENS_PER_SECOND][timed]),
        "step_s": median(values[SECONDS][timed]),
        "peak_gib": max(values[PEAK]),
        "mfu": median(values[MFU][timed]),
        "loss_first": values[LOSS][0],
        "loss_last": values[LOSS][-1],
        "losses": values[LOSS],
    }


def profiles_of_ranks(folder: Path, job: JobConfig) -> list[dict]:
    """The last step of each rank, split into parts; none without --profile."""
    profiles = []
    for trace in sorted(folder.glob("profile_traces/*/rank*_trace.json")):
        kernels, vocab_size = step_profile.read_kernels(trace), flavors[job.model.flavor].vocab_size
        parts, rows = step_profile.breakdown(kernels, job.training.seq_len, vocab_size)
        profiles.append({"parts_ms": parts, "kernels": rows[:60]})
    return profiles


def share_of_one(row: dict, rows: list[dict]) -> str:
    """Speed per device, as a share of that of the same run on one device."""
    on_one = [r for r in rows if (r["name"], r["n_gpus"]) == (row["name"], 1) and "error" not in r]
    return f"{100 * row['tok_s_gpu'] / on_one[-1]['tok_s_gpu']:.1f} %" if on_one and row["n_gpus"] > 1 else "-"


def table(rows: list[dict]) -> str:
    head = ("run", "devices", "seq_len", "kernel", "tok/s per device", "of one device", "step s", "peak GiB", "MFU %")
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["name"], row["n_gpus"], row["error"], *[""] * 8])
            continue
        speed, first = row["tok_s_gpu"], rows[0].get("tok_s_gpu", float("nan"))
        cells.append([row["name"], row["n_gpus"], f"{row['seq_len']:,}", row.get("kernel", "-"), f"{speed:,.0f}"])
        cells[-1] += [share_of_one(row, rows), f"{row['step_s']:.3f}", f"{row['peak_gib']:.1f}", f"{row['mfu']:.1f}"]
        cells[-1] += [f"{row['loss_first']:.2f} to {row['loss_last']:.2f}", f"{speed / first:.2f}x"]
    return markdown_table([*head, "loss", "against the first"], cells)


if __name__ == "__main__":
    start(BenchTrain)
