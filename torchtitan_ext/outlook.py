"""What a planned run will read, hold and take, and what of it can't be: the job's part of the preflight."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import get_peak_flops

from .command_line import size
from .data import build_dataloader, check_dataset
from .data.dataloader import batches_ready
from .model import LighthouseModelArgs, LighthouseTransformer, flavors
from .model.checkpoints import (
    checkpoint_to_load,
    complete_steps,
    data_parallel_degree,
    data_position,
    step_of,
)
from .model.checks import (
    build_tokenizer,
    data_sections,
    job_problems,
    parallel_dims,
    sequences_at_once,
)
from .model.memory import GIB, peak_memory, unknown
from .runner import parse_job

MODEL = "llama3_lighthouse"
MFU = {"none": 47, "selective": 47, "full": 38}  # percent on H200s: results/bench_train.json
SMALL = 100_000_000  # parameters: of fewer, the MFU is another
H200 = ("NVIDIA H200", 139.0)  # GiB
SHARED_MEMORY = Path("/dev/shm")
BYTES_OF_TOKEN = 16  # of a batch: the token and its label


@dataclass(frozen=True)
class Plan:
    """A job whose settings fit each other, on a number of GPUs."""

    job: JobConfig
    dims: ParallelDims
    args: LighthouseModelArgs
    n_params: int
    flops: int  # a token

    @classmethod
    def of(cls, job: JobConfig, n_gpus: int) -> "Plan":
        args = replace(flavors[job.model.flavor])
        args.update_from_config(job)
        with torch.device("meta"):
            model = LighthouseTransformer(args)
        counted = args.get_nparams_and_flops(model, job.training.seq_len)
        return cls(job, parallel_dims(job, n_gpus), args, *counted)

    @property
    def at_once(self) -> int:
        """Sequences that all GPUs hold at once."""
        return sequences_at_once(self.job, self.dims)

    @property
    def batch(self) -> int:
        """Sequences a step."""
        asked = self.job.training.global_batch_size
        return asked if asked > 0 else self.at_once

    @property
    def first_step(self) -> int:
        start = checkpoint_to_load(self.job)
        return step_of(start) if start else 0

    @property
    def tokens(self) -> int:
        """Tokens from the checkpoint that the run starts from to its end."""
        steps = max(0, self.job.training.steps - self.first_step)
        return steps * self.batch * self.job.training.seq_len

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and two moments; the rest is little."""
        return 3 * TORCH_DTYPE_MAP[self.job.training.dtype].itemsize * self.n_params


def job_outlook(
    config_file: str,
    overrides: list[str],
    n_gpus: int,
    gpu_memory: float | None,
    tok_s: float | None,
) -> tuple[dict[str, str], list[str]]:
    """What is known of a run, by name, and every problem that it would have.

    Args:
        config_file, overrides: the job file and torchtitan's arguments.
        n_gpus: processes of the run, one a GPU.
        gpu_memory: GiB of one of them; None for this machine's, or an H200's.
        tok_s: tokens a second a GPU; None to derive it from an MFU.
    """
    try:
        job = parse_job(config_file, overrides)
    except ValueError as error:
        return {}, [str(error)]
    problems = [*_name_problems(job), *job_problems(job, n_gpus)]
    name, memory = H200
    if torch.cuda.is_available():
        local = torch.cuda.get_device_properties(0)
        name, memory = local.name, local.total_memory / GIB
    try:
        plan = Plan.of(job, n_gpus)
        problems += _reading_problems(plan)
        problems += _disk_problems(plan)
        problems += _shared_memory_problems(plan)
        problems += _memory_problems(plan, gpu_memory or memory, problems)
        return _facts(plan, gpu_memory or memory, name, tok_s), problems
    except Exception:  # of any kind: settings that were found wrong are no plan
        if not problems:
            raise
        return {}, problems


def _name_problems(job: JobConfig) -> Iterator[str]:
    if job.model.name != MODEL:
        yield f"model.name = {job.model.name!r}: the checks are those of {MODEL!r}; set it to that"


def _reading_problems(plan: Plan) -> Iterator[str]:
    """Read a batch of the first rank and of the last, which gets the fewest documents.

    A training that goes on reads it where that rank stopped.
    """
    job, degree = plan.job, data_parallel_degree(plan.dims)
    for name, section in data_sections(job):
        try:
            check_dataset(section.dataset, section.dataset_path)
            tokenizer = build_tokenizer(job)
        except ValueError:  # named by job_problems
            continue
        infinite = name == "training" or job.validation.steps != -1
        try:
            for rank in sorted({0, degree - 1}):
                loader = build_dataloader(degree, rank, tokenizer, job, infinite, name)
                position = data_position(job, plan.dims, rank) if name == "training" else {}
                if position.get("world_size") == degree:
                    loader.load_state_dict(position)
                next(iter(loader))
        except StopIteration:
            yield (
                f"{name}.dataset = {section.dataset!r}, {name}.dataset_path = {section.dataset_path!r}: "
                f"not one sequence of {name}.seq_len = {section.seq_len} tokens; give more, or a shorter seq_len"
            )
        except Exception as error:  # whatever reads a data set
            # That of a worker comes with its traceback, as text.
            reason = (str(error).splitlines() or [""])[-1].removeprefix(f"{type(error).__name__}: ")
            yield (
                reason
                if f"{name}.data" in reason
                else (
                    f"{name}.dataset = {section.dataset!r}, {name}.dataset_path = {section.dataset_path!r}: "
                    f"its first documents can't be read ({reason})"
                )
            )


def _shared_memory_problems(plan: Plan) -> Iterator[str]:
    """A worker's batches wait in shared memory, those of the step that is computed and of what comes next."""
    training, local_gpus = plan.job.training, torch.cuda.device_count()
    if not (training.dataloader.num_workers and local_gpus and SHARED_MEMORY.is_dir()):
        return
    ready = batches_ready(training, data_parallel_degree(plan.dims))
    of_rank = (ready + plan.batch // plan.at_once) * training.local_batch_size
    needed = min(local_gpus, plan.dims.world_size) * of_rank * training.seq_len * BYTES_OF_TOKEN
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        yield (
            f"training.dataloader.num_workers = {training.dataloader.num_workers}: {size(free)} free in "
            f"{SHARED_MEMORY}, but the batches that wait there take {size(needed)}; make it larger (docker run "
            f"--shm-size), set training.dataloader.prefetch_factor below {ready}, or num_workers to 0"
        )


def _checkpoints_to_come(plan: Plan) -> int:
    """How many more checkpoints than now the run's folder will hold at most."""
    checkpoint, steps = plan.job.checkpoint, plan.job.training.steps
    if not checkpoint.enable or checkpoint.load_only or plan.first_step >= steps:
        return 0
    interval = checkpoint.interval
    saves = -(-steps // interval) - plan.first_step // interval  # the last step too
    there = len(complete_steps(Path(plan.job.job.dump_folder, checkpoint.folder)))
    if not checkpoint.keep_latest_k:
        return saves
    # The oldest goes after the next is written.
    return min(saves, max(1, checkpoint.keep_latest_k + 1 - there))


def _disk(plan: Plan) -> Path:
    """The nearest folder that exists of where the run will write."""
    folder = Path(plan.job.job.dump_folder).resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _disk_problems(plan: Plan) -> Iterator[str]:
    folder, disk = plan.job.job.dump_folder, _disk(plan)
    if not disk.is_dir() or not os.access(disk, os.W_OK):
        yield f"job.dump_folder = {folder!r}: nothing can be written in {disk}; choose another folder"
        return
    count = _checkpoints_to_come(plan)
    needed, free = count * plan.checkpoint_bytes, shutil.disk_usage(disk).free
    if needed > free:
        yield (
            f"job.dump_folder = {folder!r}: {size(free)} free in {disk}, but {count} checkpoints of "
            f"{size(plan.checkpoint_bytes)} are to come, {size(needed)}; choose another folder or "
            f"make room (checkpoint.keep_latest_k = {plan.job.checkpoint.keep_latest_k})"
        )


def _memory(plan: Plan) -> float:
    return sum(peak_memory(plan.job, plan.args, plan.dims).values())


def _memory_problems(plan: Plan, gpu_memory: float, others: list[str]) -> Iterator[str]:
    if unknown(plan.job, plan.dims) or _memory(plan) <= gpu_memory:
        return
    yield (
        f"activation_checkpoint.mode = {plan.job.activation_checkpoint.mode!r}: about {_memory(plan):.1f} GiB a GPU, "
        f"which has {gpu_memory:.1f}; {_what_fits(plan, gpu_memory, others)}"
    )


def _what_fits(plan: Plan, gpu_memory: float, others: list[str]) -> str:
    """The least change that fits, and that adds nothing to the `others`' problems."""
    # More GPUs share out weights, gradients and moments alone; those of one sequence its activations too.
    for more, sharing in [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (8, 8)]:
        n_gpus = plan.dims.world_size * more
        degree = plan.dims.cp * sharing
        for mode in ("none", "selective", "full"):
            job = replace(
                plan.job,
                activation_checkpoint=replace(
                    plan.job.activation_checkpoint, mode=mode, selective_ac_option="op"
                ),
                parallelism=replace(plan.job.parallelism, context_parallel_degree=degree),
            )
            if set(job_problems(job, n_gpus)) - set(others):
                continue
            other = replace(plan, job=job, dims=parallel_dims(job, n_gpus))
            if not unknown(job, other.dims) and (needed := _memory(other)) <= gpu_memory:
                return (
                    f"{mode!r} would take {needed:.1f}"
                    + " (selective_ac_option = 'op')" * (mode == "selective")
                    + f" on {n_gpus} GPUs" * (more > 1)
                    + f" with parallelism.context_parallel_degree = {degree}" * (sharing > 1)
                )
    return (
        "nothing fits, nor on 8 times the GPUs: lower training.seq_len or training.local_batch_size"
    )


def _facts(plan: Plan, gpu_memory: float, gpu: str, tok_s: float | None) -> dict[str, str]:
    job, args, dims = plan.job, plan.args, plan.dims
    n_gpus, seq_len = dims.world_size, job.training.seq_len
    attention = f"dense in {args.n_layers} layers"
    if n_lighthouse := len(args.lighthouse_layers):
        gathered = args.lighthouse.gathered_len(seq_len)
        attention = (
            f"Lighthouse in {n_lighthouse} layers, {gathered:,} gathered rows of {seq_len:,}; "
            f"dense in {args.n_layers - n_lighthouse}"
        )
    assumed = "as given"
    if not tok_s and plan.n_params > SMALL and job.compile.enable:
        mfu = MFU.get(job.activation_checkpoint.mode, MFU["full"])
        tok_s = mfu / 100 * get_peak_flops(gpu) / plan.flops
        assumed = f"at an assumed MFU of {mfu} % on {gpu}; --tok-s gives another speed"
    if tok_s:
        gpu_hours = plan.tokens / tok_s / 3600
        hours = (
            f"{_duration(gpu_hours / n_gpus)}, {gpu_hours:,.1f} GPU-hours, at {tok_s:,.0f} tokens a second "
            f"a GPU ({assumed})"
        )
    else:
        hours = "no estimate: the speed of small models, or without compile.enable, was not measured; --tok-s gives it"
    disk, count = _disk(plan), _checkpoints_to_come(plan)
    reason = unknown(job, dims)
    parts = {} if reason else peak_memory(job, args, dims)
    start = checkpoint_to_load(job)
    return {
        "model": f"{job.model.flavor}, {plan.n_params:,} parameters, {plan.flops / 1e9:.3g} GFLOPs a token",
        "attention": attention,
        "GPUs": f"{n_gpus}: " + _degrees(dims),
        "batch": f"{plan.batch} x {seq_len:,} tokens a step, in {plan.batch // plan.at_once} accumulation steps",
        "steps": f"{plan.first_step:,} to {job.training.steps:,}, {plan.tokens:,} tokens, "
        + (f"from {start}" if start else "from scratch"),
        "time": hours,
        "memory": f"no estimate: {reason}"
        if reason
        else f"about {sum(parts.values()):.1f} of {gpu_memory:.1f} GiB a GPU, to 15 %: "
        + ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items()),
        "disk": f"{count} checkpoints more at most, of {size(plan.checkpoint_bytes)}: "
        f"{size(count * plan.checkpoint_bytes)} of {size(shutil.disk_usage(disk).free)} free in {disk}",
    }


def _degrees(dims: ParallelDims) -> str:
    names = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
    return " x ".join(
        f"{name} {getattr(dims, name)}"
        for name in names
        if getattr(dims, name) > 1 or name == "dp_shard"
    )


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
