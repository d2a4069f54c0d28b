"""Verbs of `python -m torchtitan_ext <verb>`. Training is `torchrun -m torchtitan_ext.train`."""

import logging
import os
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from rich.filesize import decimal
from tyro.conf import Positional, arg, subcommand

from .arguments import Positive, Positives, parse
from .console import make_folder
from .progress import Display

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = CONFIGS / "published.toml"
FIRST_STAGE_ORIGIN = "from a first stage (lighthouse.enable = true), without dense steps after it"
JobFile = Annotated[Path, arg(name="job.config_file")]


@dataclass
class Patch:
    """Patch torchtitan, check whether it is patched, or restore the release: all patches or none.

    Exit code: 0 done, or nothing to do (check: patched); 1 check found torchtitan as released; 2 error.
    """

    action: Positional[Literal["apply", "check", "revert"]]
    root: Path | None = None  # folder that contains torchtitan/, such as a git checkout; None for the installed one

    def run(self) -> int:
        from . import patching

        root, wanted = self.root or patching.installed_root(), self.action != "revert"
        if self.action != "check":
            patching.change(root, wanted)
        patched = patching.is_patched(root)
        state = f"patched ({len(patching.series())} patches)" if patched else "as released"
        print(f"{root / 'torchtitan'} is {state}")
        return 0 if patched == wanted else 1


@dataclass
class Preflight:
    """Check a whole run in seconds, before it costs anything: on any machine, without training or a GPU.

    Lists every problem of versions, patches, settings, data, checkpoint, disk and GPU memory, and estimates time and
    resources. Overrides are torchtitan's, as for training: --lighthouse.top_k 2048.
    Exit code: 0 no problem, 1 problems, 2 wrong arguments.
    """

    config_file: JobFile  # the job file
    nproc: Positive = 1  # processes of the run on all nodes, one per GPU
    gpu_memory: float | None = None  # GiB per GPU; None for this machine's, or the 139 of an NVIDIA H200
    tok_s: float | None = None  # tokens per second per GPU, `tps` in a log; None for an estimate from an H200's MFU

    def run(self, overrides: list[str]) -> int:
        from .jobs.environment import environment_problems  # needs nothing that may be missing

        for name, value in (("--gpu-memory", self.gpu_memory), ("--tok-s", self.tok_s)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} {value}: must be a positive number")
        # Warnings of libraries are not problems of the run.
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
        problems = list(environment_problems())
        try:
            from .jobs.preflight import plan_report
            from .train.spec import register

            register()
            facts, more = plan_report(str(self.config_file), overrides, self.nproc, self.gpu_memory, self.tok_s)
        except ImportError as error:
            facts, more = {}, [f"the job can't be checked before this environment is complete: {error}"]
        problems += more
        for name, fact in facts.items():
            print(f"{name:10} {fact}")
        print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}:" if problems else "no problems")
        for problem in problems:
            print(f"- {problem}")
        return 1 if problems else 0


@dataclass
class Splits:
    """Run a split-point experiment: dense, stage 1, and stage 2 from each split.

    The same command continues an interrupted experiment. Overrides apply to every run: --debug.seed 2.
    """

    configs: Path  # folder of dense.toml, stage1.toml and stage2.toml
    output: Path | None = None  # folder of the runs; None for outputs/<name of configs>
    nproc: Positive = 1  # processes, one per device
    splits: Positives = ()  # steps at which stage 2 starts; by default 10, 11 and 12 sixteenths of its steps
    only: tuple[Literal["dense", "stage1", "stage2"], ...] = ("dense", "stage1", "stage2")  # which of the runs

    def run(self, overrides: list[str]) -> None:
        from .experiment import runner

        output = self.output or Path("outputs") / self.configs.resolve().name
        runs = runner.plan(self.configs, output, self.splits, self.only, overrides, self.nproc)
        runner.run_all(runs, self.nproc)


@dataclass
class Table:
    """Make the split-point table and plot from the records of `splits`."""

    folder: Positional[Path]  # the experiment: dense/, stage1/, stage2-*/
    output: Path | None = None  # folder of table and plot; None for the experiment's folder
    others: tuple[Path, ...] = ()  # experiments with other seeds or settings, such as those of `ablate`

    def run(self) -> None:
        from .experiment import report

        published = tomllib.loads(PUBLISHED.read_text())
        text, paths = report.write(self.folder, self.output or self.folder, published, self.others)
        print(text, *paths, f"made from the records in {self.folder}/*/tb (TensorBoard)", sep="\n")


@dataclass
class Ablate:
    """Run cells of an ablation grid: stage 1 for ten sixteenths of the steps, then stage 2 to the end.

    A cell is the job files in --configs with the settings of its entry in the grid. Without --cells, lists the cells.
    """

    cells: tuple[str, ...] = ()  # names, or all
    grid: Path = PUBLISHED  # TOML with [[ablations]], each with a run's name and settings
    configs: Path = CONFIGS / "530m"  # folder of dense.toml, stage1.toml and stage2.toml
    output: Path = Path("outputs/ablations")  # folder of the cells' runs
    nproc: Positive = 1  # processes, one per device

    def run(self, overrides: list[str]) -> None:
        from .experiment import ablations, runner

        grid = ablations.read_grid(self.grid)
        if not self.cells:
            for name, settings in grid.items():
                print(f"{name:26}", *settings)
            return
        names = [*grid] if self.cells == ("all",) else self.cells
        if unknown := [name for name in names if name not in grid]:
            raise ValueError(f"--cells {' '.join(unknown)}: the grid has {', '.join(grid)}")
        cells = {name: grid[name] for name in names}
        runner.run_all(ablations.plan(cells, self.configs, self.output, overrides, self.nproc), self.nproc)


@dataclass
class Niah:
    """Measure whether a checkpoint retrieves a digit hidden in random text: table, JSON and heat map.

    The model always attends densely: in bfloat16 on a GPU, in float32 on a CPU.
    """

    checkpoint: Positional[Path]  # a step-N folder, a run's folder for its newest step, or a Hugging Face folder
    contexts: Positives = ()  # tokens; by default 4096, 8192, 16384, 32768, 65536 and 98304, up to its training length
    depths: tuple[int, ...] = (0, 15, 30, 50, 70, 85, 100)  # percent of the filler before the needle
    trials: Positive = 10  # prompts per context and depth, a multiple of 10
    batch_size: Positive = 10  # prompts at once
    seed: int = 0  # of the prompts
    output: Path | None = None  # folder of the results; None for outputs/niah/<name of the checkpoint>

    def run(self) -> None:
        import torch

        from .evaluate import niah

        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        candidate = niah.find_candidate(self.checkpoint)
        prompts = niah.Prompts(candidate.tokenizer)
        contexts = self.contexts or tuple(n for n in niah.CONTEXTS if n <= candidate.max_context)
        contexts, depths = (tuple(sorted(set(values))) for values in (contexts, self.depths))
        settings = niah.Settings(contexts, depths, self.trials, self.seed, self.batch_size)
        settings.check(prompts, candidate)
        folder = make_folder(self.output or Path("outputs/niah") / candidate.name)
        if not self.contexts and (left_out := niah.CONTEXTS[len(contexts) :]):
            beyond = f"beyond the {candidate.max_context} of training"
            print(f"left out: contexts {', '.join(map(str, left_out))}, {beyond}", file=sys.stderr)
        if candidate.lighthouse:
            print(f"note: {candidate.path} is {FIRST_STAGE_ORIGIN}; evaluated as it is", file=sys.stderr)
        logits = candidate.load(torch.device(device), dtype)
        with Display() as display:
            n_tokens = sum(settings.contexts) * len(settings.depths) * settings.trials
            display.begin(f"{n_tokens:,} tokens", n_tokens)
            cells = niah.evaluate(logits, prompts, settings, display.count)
        text, paths = niah.write(folder, candidate, settings, cells, dtype)
        print(text, *paths, sep="\n")


@dataclass
class Export:
    """Export a checkpoint as a Hugging Face folder that transformers loads as a plain Llama.

    Needs no GPU. Reads the model's shape from config.json in the run's folder.
    """

    checkpoint: Positional[Path]  # a step-N folder, or a run's folder for its newest step
    output: Path  # folder to write to; must be new or empty
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights

    def run(self) -> None:
        import torch

        from .evaluate.export_hf import export, find_checkpoint

        checkpoint = find_checkpoint(self.checkpoint)
        if checkpoint.lighthouse:
            remedy = "resume it in a stage 2 and export that"
            print(f"warning: {checkpoint.path} is {FIRST_STAGE_ORIGIN}; {remedy}", file=sys.stderr)
        dtype = getattr(torch, self.dtype)
        with Display() as display:
            n_bytes = checkpoint.n_bytes(dtype)
            display.begin(f"{decimal(n_bytes, precision=2)} read and written", 2 * n_bytes)
            export(checkpoint, self.output, dtype, display.count)
        print(f"{checkpoint.path} exported to {self.output}")


@dataclass
class CheckData:
    """Check text files: count documents and find damage.

    Reads every file as training does, and compares their size with what a run reads.
    Exit code: 0 no damage, 1 damage, 2 wrong arguments.
    """

    dataset_path: Positional[Annotated[str, arg(metavar="DATA")]]  # a file, folder, glob, hub data set or job file
    workers: Positive = os.cpu_count() or 1  # processes that read
    config_file: JobFile = CONFIGS / "530m" / "dense.toml"  # the run, if DATA is no job file; overrides may follow

    def run(self, overrides: list[str]) -> int:
        from .data.check_text import check_files, files_to_check, report
        from .jobs.job_file import parse_job

        is_job = self.dataset_path.endswith(".toml")
        config_file = Path(self.dataset_path) if is_job else self.config_file
        job = parse_job(config_file, overrides)
        if not is_job:
            if taken := [word for word in overrides if word.startswith(("--training.dataset", "--training.mixture"))]:
                raise ValueError(f"{taken[0]}: DATA names what is checked; leave it out, or give a job file as DATA")
            job.training.dataset, job.training.dataset_path, job.training.mixture = "text", self.dataset_path, []
        files, text_fields = zip(*files_to_check(job), strict=True)
        if job.training.global_batch_size < 1:  # that of one process
            job.training.global_batch_size = job.training.local_batch_size
        checked, damaged = [], 0
        results = check_files(files, self.workers, text_fields)  # forks before the display's thread starts
        with Display() as display:
            display.begin("files", len(files))
            for contents in results:
                checked.append(contents)
                damaged += contents.n_problems > 0
                display.count(1, f"{len(checked)}/{len(files)}, {damaged} damaged, ")
        print(report(files, checked, job))
        return 1 if damaged else 0


VERBS = {"patch": Patch, "preflight": Preflight, "splits": Splits, "table": Table, "ablate": Ablate, "niah": Niah}
VERBS |= {"export": Export, "check-data": CheckData}


def main(arguments: list[str]) -> int | None:
    verbs: Any = Union[tuple(Annotated[v, subcommand(name, prefix_name=False)] for name, v in VERBS.items())]  # noqa: UP007
    chosen, overrides = parse(verbs, arguments, "python -m torchtitan_ext", return_unknown_args=True)
    if not isinstance(chosen, (Patch, Table, Preflight)):
        from .train.spec import register

        register()
    if isinstance(chosen, (Preflight, Splits, Ablate, CheckData)):
        return chosen.run(overrides)
    if overrides:
        raise ValueError(f"{overrides[0]}: no such argument here; see --help")
    return chosen.run()
