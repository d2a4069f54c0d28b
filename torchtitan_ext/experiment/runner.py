"""Run a split-point experiment: dense from scratch, stage 1, and stage 2 from each split.

Each run is one torchrun of torchtitan_ext.train with one of the folder's three TOML files. Finished runs are skipped;
interrupted ones continue from their newest checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torchtitan.config import JobConfig

from torchtitan_ext.console import CommandFailed, make_folder
from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.jobs.launch import torchrun, training
from torchtitan_ext.jobs.recorded import CONFIG_FILE, read_config
from torchtitan_ext.jobs.resume import changed_problems, changes_since, complete_steps
from torchtitan_ext.jobs.rules import check_job
from torchtitan_ext.jobs.schedule import optimizer_problems, planned
from torchtitan_ext.progress import Display

from .records import LOG

STAGES = ("dense", "stage1", "stage2")
# within a run; errors recommend all but the first
MAY_CHANGE = {"training.steps", "training.skip_nonfinite_steps", "training.skip_damaged_data"}
MAY_CHANGE |= {"optimizer.override_checkpoint"}
RECORDED = ("--metrics.enable_tensorboard", "--checkpoint.enable")  # for the table, and for the next run


@dataclass
class PlannedRun:
    """One run: `config_file` into `folder`, from step `start` (0, or the split) to `steps`."""

    name: str
    config_file: Path
    folder: Path
    config: JobConfig
    start: int
    steps: int
    overrides: tuple[str, ...] = ()  # torchtitan arguments
    load: Path | None = None  # the checkpoint that it starts from

    def checkpoint(self, step: int) -> Path:
        return self.folder / self.config.checkpoint.folder / f"step-{step}"

    def has(self, step: int) -> bool:
        return step in complete_steps(self.checkpoint(step).parent)

    @property
    def newest(self) -> int:
        """The step that a launch starts from."""
        return max([self.start, *complete_steps(self.checkpoint(0).parent)])


def plan(
    configs: Path,
    output: Path,
    splits: Sequence[int] = (),
    only: Sequence[str] = STAGES,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
) -> list[PlannedRun]:
    """The runs of the experiment that `configs` describes, in order.

    configs: folder of dense.toml, stage1.toml and stage2.toml. splits: steps at which stage 2 starts; by default 10, 11
    and 12 sixteenths of stage 2's training.steps. only: which of STAGES. overrides: torchtitan arguments of every run.
    nproc: processes of each run, if known.
    Raises ValueError, with field, value and remedy, for anything that would stop or spoil a later run.
    """
    # stages of `only` first, so that messages name their files
    order = sorted(STAGES, key=lambda stage: stage not in only)
    files, overrides = {stage: configs / f"{stage}.toml" for stage in STAGES}, (*overrides, *RECORDED)
    loaded = {stage: load_job(files[stage], overrides, nproc) for stage in order}
    total = loaded["stage2"].training.steps
    splits = sorted(set(splits or [total * n // 16 for n in (10, 11, 12)]))

    def run_of(stage: str, name: str, start: int, steps: int, load: Path | None = None):
        return PlannedRun(name, files[stage], output / name, loaded[stage], start, steps, overrides, load)

    dense = run_of("dense", "dense", 0, total)
    stage1 = run_of("stage1", "stage1", 0, splits[-1])
    tails = [run_of("stage2", f"stage2-{split}", split, total, stage1.checkpoint(split)) for split in splits]
    chosen = [run for run in (dense, stage1, *tails) if run.config_file.stem in only]
    problems = [*_split_problems(dense, stage1, tails, only), *(problem for run in chosen for problem in _changed(run))]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))  # each once, for all splits
    return chosen


def load_job(file: Path, overrides: Sequence[str], nproc: int | None = None) -> JobConfig:
    """The job config, checked as at launch, except for the checkpoint that it starts from. Raises ValueError."""
    config = parse_job(file, overrides)
    try:
        check_job(config, with_start=False, n_ranks=nproc)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _split_problems(
    dense: PlannedRun, stage1: PlannedRun, tails: list[PlannedRun], only: Sequence[str]
) -> Iterator[str]:
    total, steps, checkpoint = tails[0].steps, stage1.config.training.steps, stage1.config.checkpoint
    launched = replace(stage1.config, training=replace(stage1.config.training, steps=stage1.steps))
    if (dense_steps := dense.config.training.steps) != total:
        ends = f"training.steps = {dense_steps}, but {tails[0].config_file} ends at {total}"
        yield f"{dense.config_file}: {ends}: set both alike, so that their final losses compare"
    for tail in tails:
        split, gone = tail.start, f"{tail.name} starts from {tail.load}, which does not exist"
        if not 0 < split < total:
            yield f"split {split}: must lie between 0 and stage 2's training.steps = {total}"
        elif split > steps:
            yield f"split {split}: {stage1.config_file} ends at training.steps = {steps}; split earlier or raise it"
        elif split % checkpoint.interval:
            interval = f"checkpoint.interval = {checkpoint.interval}"
            yield f"split {split}: {stage1.config_file} saves every {interval} steps; choose a multiple of it"
        elif "stage2" not in only or tail.newest > split:
            continue
        elif "stage1" not in only:
            if not stage1.has(split):
                yield f"{gone}: run stage1 too"
        elif split <= stage1.newest and not stage1.has(split):
            remedy = f"split later, or delete {stage1.folder} to run stage 1 again"
            yield f"{gone}, and stage 1 is past it, at step {stage1.newest}: {remedy}"
        elif {"optimizer", "lr_scheduler"}.isdisjoint(tail.config.checkpoint.exclude_from_loading):
            field, origin = "checkpoint.initial_load_path", f"stage 1 ({stage1.config_file})"
            problems = changed_problems(tail.config, field, origin, launched.to_dict(), planned(launched, split))
            yield from (f"{tail.config_file}: {problem}" for problem in problems)  # as its launch would, after stage 1
    if "stage1" in only:  # whose file may name more steps
        yield from (f"{stage1.config_file} to step {stage1.steps}: {p}" for p in optimizer_problems(launched))
    n_checkpoints = (tails[-1].start - tails[0].start) // checkpoint.interval + 1
    if 0 < checkpoint.keep_latest_k < n_checkpoints:
        setting = f"{stage1.config_file}: checkpoint.keep_latest_k = {checkpoint.keep_latest_k}"
        remedy = f"set it to 0 (keep all) or to at least {n_checkpoints}"
        yield f"{setting} would delete step {tails[0].start} before stage 2 starts from it; {remedy}"


def _changed(run: PlannedRun) -> Iterator[str]:
    """Settings that differ from those of the run's checkpoints: continuing would mix them. Raises ValueError if their
    record is damaged."""
    has_record = run.newest > run.start and (run.folder / CONFIG_FILE).is_file()
    record = read_config(run.folder / CONFIG_FILE, "training.steps") if has_record else {}
    for name, (before, now) in changes_since(record, run.config).items():
        if name not in MAY_CHANGE:
            changed = f"{name} = {before!r}, which is {now!r} now"
            yield f"{run.folder} was run with {changed}: choose another output folder, or delete this one"


def train_command(run: PlannedRun, nproc: int) -> list[str]:
    # the last of repeated arguments wins
    command = [*torchrun(nproc, run.config_file), *run.overrides]
    command += ["--job.dump_folder", str(run.folder), "--training.steps", str(run.steps)]
    if run.load:
        command += ["--checkpoint.initial_load_path", str(run.load)]
    return command


def run_all(runs: list[PlannedRun], nproc: int = 1) -> None:
    """Run the unfinished runs in order, with progress. Raises CommandFailed for the first that fails. Ctrl-C, SIGTERM
    and a closed terminal end the training processes and raise KeyboardInterrupt."""
    # the table of an unfinished experiment lists runs by their folders
    for run in runs:
        make_folder(run.folder)
    try:
        with Display() as display:
            for number, run in enumerate(runs, 1):
                title = f"[{number}/{len(runs)}] {run.name}"
                if run.has(run.steps):
                    display.say(f"{title}: done already, at step {run.steps}")
                    continue
                since = f", from step {run.newest}" if run.newest else ""
                display.say(f"{title}: to step {run.steps}{since}; log in {run.folder / LOG}")
                display.begin(title, run.steps, run.newest)
                _execute(run, train_command(run, nproc), display)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues") from None


def _execute(run: PlannedRun, command: list[str], display: Display) -> None:
    with training(command, run.folder / LOG) as child:
        for step, loss, tps in child.steps():
            display.show(step, f"{step}/{run.steps}  loss {loss:.3f}  {tps} tok/s/device  ")
    if (code := child.process.returncode) or not run.has(run.steps):
        ending = f"exit code {code}" if code else f"ended without its checkpoint of step {run.steps}"
        reason = f"{run.name} failed ({ending}), see above and {run.folder / LOG}"
        raise CommandFailed(f"{child.output}\n{reason}: correct that, and the same command continues")
