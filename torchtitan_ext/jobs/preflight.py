"""Preflight: estimate a run's time, disk and memory, and report what would fail."""

import os
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from rich.filesize import decimal
from torchtitan.components.checkpoint import DATALOADER, TRAIN_STATE
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import get_peak_flops

from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import check_data, settings_of
from torchtitan_ext.data.tokenizer import load_tokenizer
from torchtitan_ext.model import LighthouseModelArgs, choose_kernel, flavors
from torchtitan_ext.model.model import meta_model
from torchtitan_ext.model.settings import Model

from . import resume
from .job_file import parse_job
from .memory import GIB, no_estimate_reason, peak_memory
from .rules import DEGREES, data_sections, job_problems, parallel_dims, sequences_at_once

MFU = {"none": 47, "selective": 47, "full": 38}  # percent on H200s by cuDNN: results/bench_train.json
FA4_MFU = {"none": 52, "selective": 52, "full": 44}
PRODUCTS = ("attention.w", "feed_forward.w")  # prefixes of the names of a block's linear layers


@dataclass(frozen=True)
class Plan:
    """A job whose settings fit each other, on a number of GPUs."""

    job: JobConfig
    dims: ParallelDims
    args: LighthouseModelArgs
    n_params: int
    flops: int  # per token
    first_step: int

    @classmethod
    def of(cls, job: JobConfig, n_gpus: int) -> "Plan":
        args = replace(flavors[job.model.flavor])
        args.update_from_config(job)
        counts = args.get_nparams_and_flops(meta_model(args), job.training.seq_len)
        dims = parallel_dims(job, n_gpus)
        start, step = resume.checkpoint_to_load(job), resume.saved_state(job, dims, TRAIN_STATE).get("step", 0)
        if start and not start.exists() and re.fullmatch(r"step-\d+", start.name):  # where stage 1 will end
            step = int(start.name.removeprefix("step-"))
        return cls(job, dims, args, *counts, step)


def plan_report(
    config_file: str, overrides: list[str], n_gpus: int, gpu_memory: float | None = None, tok_s: float | None = None
) -> tuple[dict[str, str], list[str]]:
    """Facts of a run on `n_gpus` processes, by name, and every problem that it would have.

    gpu_memory: GiB of one GPU; None for this machine's, or an H200's. tok_s: tokens per second per GPU; None to derive
    it from an MFU.
    """
    try:
        job = parse_job(config_file, overrides)
    except ValueError as error:
        return {}, [str(error)]
    problems = job_problems(job, n_gpus)
    if job.model.name != Model.name:
        problems.insert(0, f"model.name = {job.model.name!r}: the checks are those of {Model.name!r}; set it to that")
    gpu, memory = "NVIDIA H200", 139.0  # GiB
    if torch.cuda.is_available():
        local = torch.cuda.get_device_properties(0)
        gpu, memory = local.name, local.total_memory / GIB
    facts: dict[str, str] = {}
    try:
        plan = Plan.of(job, n_gpus)
        facts |= _facts(plan, gpu, tok_s)
        facts["kernel"] = _kernel(job, problems)
        facts["disk"] = _disk(plan, problems)
        facts["memory"] = _memory(plan, gpu_memory or memory, problems)
        problems += _reading_problems(plan)
    except Exception:  # of any kind: wrong settings, which `problems` lists, may not make a plan
        if not problems:
            raise
    return facts, problems


def _reading_problems(plan: Plan) -> Iterator[str]:
    """Read a batch of the first rank and of the last, which gets the fewest documents, from where the run continues."""
    job, degree = plan.job, resume.data_parallel_degree(plan.dims)
    position = resume.saved_state(job, plan.dims, DATALOADER)
    for name, section in data_sections(job):
        try:
            check_data(job, name)
            tokenizer = load_tokenizer(job.model.hf_assets_path)
        except ValueError:  # named by job_problems
            continue
        infinite = name == "training" or job.validation.steps != -1
        source = f"{settings_of(job, name)}:"
        try:
            for rank in {0, degree - 1}:
                loader = build_dataloader(degree, rank, tokenizer, job, infinite, name)
                if name == "training" and position.get("world_size") == degree:
                    loader.load_state_dict(position)
                next(iter(loader))
        except StopIteration:
            yield f"{source} not one sequence of {name}.seq_len = {section.seq_len} tokens; give more, or shorter ones"
        except Exception as error:  # whatever reads a data set
            # A worker's error comes with its traceback, as text.
            reason = (str(error).splitlines() or [""])[-1].removeprefix(f"{type(error).__name__}: ")
            yield reason if reason.startswith(f"{name}.") else f"{source} its first documents can't be read ({reason})"


def _checkpoints_to_come(plan: Plan) -> int:
    """How many more checkpoints than now the run's folder will hold at most."""
    checkpoint, steps = plan.job.checkpoint, plan.job.training.steps
    if not resume.saves_checkpoints(plan.job) or plan.first_step >= steps:
        return 0
    saves = -(-steps // checkpoint.interval) - plan.first_step // checkpoint.interval  # the last step too
    if not checkpoint.keep_latest_k:
        return saves
    held = len(resume.complete_steps(resume.checkpoint_folder(plan.job)))
    # The oldest goes after the next is written, in the background perhaps after another.
    beside = 1 + (checkpoint.async_mode != "disabled")
    return min(saves, max(1, checkpoint.keep_latest_k + beside - held))


def _disk(plan: Plan, problems: list[str]) -> str:
    """Disk space that the checkpoints to come need; adds a problem if they don't fit."""
    folder = resume.checkpoint_folder(plan.job).resolve()
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    field, count = f"job.dump_folder = {plan.job.job.dump_folder!r}", _checkpoints_to_come(plan)
    n_bytes = 3 * TORCH_DTYPE_MAP[plan.job.training.dtype].itemsize * plan.n_params  # weights and two moments
    needed, free = count * n_bytes, shutil.disk_usage(disk).free
    each, total, left = (decimal(n, precision=2) for n in (n_bytes, needed, free))
    fact = f"at most {count} more checkpoints of {each}: {total} of {left} free in {disk}"
    if not disk.is_dir() or not os.access(disk, os.W_OK):
        problems.append(f"{field}: nothing can be written in {disk}; choose another folder")
    elif needed > free:
        remedy = f"choose another folder or make room (checkpoint.keep_latest_k = {plan.job.checkpoint.keep_latest_k})"
        problems.append(f"{field}: {fact}; {remedy}")
    return fact


def _memory(plan: Plan, gpu_memory: float, problems: list[str]) -> str:
    """GPU memory that the run needs; adds a problem, with what would fit, if it doesn't."""
    if reason := no_estimate_reason(plan.job, plan.dims):
        return f"no estimate: {reason}"
    parts = peak_memory(plan.job, plan.args, plan.dims)
    total, each = sum(parts.values()), ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items())
    fact = f"about {total:.1f} of {gpu_memory:.1f} GiB per GPU, to 15 %: {each}"
    if total > gpu_memory:
        mode = plan.job.activation_checkpoint.mode
        problems.append(f"activation_checkpoint.mode = {mode!r}: {fact}; {_what_fits(plan, gpu_memory, problems)}")
    elif total > (safe := 0.85 * gpu_memory):
        fact += f"; tight: {_what_fits(plan, safe, problems)}"
    return fact


def _what_fits(plan: Plan, gpu_memory: float, others: list[str]) -> str:
    """The smallest change that fits and adds no problem to `others`."""
    # More GPUs share out weights, gradients and moments only; those of one sequence its activations too.
    for more, sharing in [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (8, 8)]:
        n_gpus, degree = plan.dims.world_size * more, plan.dims.cp * sharing
        for mode, *recomputed in (("none",), ("selective",), ("selective", *PRODUCTS), ("full",)):
            job = deepcopy(plan.job)
            job.parallelism.context_parallel_degree = degree
            job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option = mode, "op"
            job.activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns = recomputed
            if set(job_problems(job, n_gpus)) - set(others):
                continue
            needed = sum(peak_memory(job, plan.args, parallel_dims(job, n_gpus)).values())
            if needed <= gpu_memory:
                changes = " (selective_ac_option = 'op')" if mode == "selective" else ""
                changes += f" with per_op_sac_force_recompute_mm_shapes_by_fqns = {recomputed}" if recomputed else ""
                changes += f" on {n_gpus} GPUs" if more > 1 else ""
                changes += f" with parallelism.context_parallel_degree = {degree}" if sharing > 1 else ""
                return f"{mode!r} would take {needed:.1f}{changes}"
    return "nothing fits, even on 8 times the GPUs: lower training.seq_len or training.local_batch_size"


def _facts(plan: Plan, gpu: str, tok_s: float | None) -> dict[str, str]:
    job, args, dims, rope = plan.job, plan.args, plan.dims, vars(plan.args.rope_scaling_args)
    seq_len, start, at_once = job.training.seq_len, resume.checkpoint_to_load(job), sequences_at_once(job, dims)
    batch = job.training.global_batch_size if job.training.global_batch_size > 0 else at_once  # sequences
    tokens = max(0, job.training.steps - plan.first_step) * batch * seq_len
    changes = resume.describe_changes(start, job)
    origin = f"{start or 'scratch'}{f', changed since: {changes}' if changes else ''}"
    n_lighthouse = len(args.lighthouse_layers)
    attention = f"dense in {args.n_layers - n_lighthouse} layers"
    if n_lighthouse:
        gathered = f"{args.lighthouse.gathered_len(seq_len):,} gathered rows of {seq_len:,}"
        attention = f"Lighthouse in {n_lighthouse} layers, scorer {args.lighthouse.scorer}, {gathered}; {attention}"
    shared = " x ".join(f"{name} {n}" for name in DEGREES if (n := getattr(dims, name)) > 1 or name == "dp_shard")
    return {
        "model": f"{job.model.flavor}, {plan.n_params:,} parameters, {plan.flops / 1e9:.3g} GFLOPs per token",
        "RoPE": ", ".join(f"{name} {value:,}" for name, value in {"theta": args.rope_theta, **rope}.items()),
        "attention": attention,
        "GPUs": f"{dims.world_size}: {shared}",
        "batch": f"{batch} x {seq_len:,} tokens per step, in {batch // at_once} accumulation steps",
        "steps": f"{plan.first_step:,} to {job.training.steps:,}, {tokens:,} tokens, from {origin}",
        "time": _time(plan, tokens, gpu, tok_s),
    }


def _kernel(job: JobConfig, problems: list[str]) -> str:
    """The attention kernel on this machine; adds a problem if attention.kernel can't run."""
    wanted = job.attention.kernel
    if not torch.cuda.is_available():
        return f"{wanted}, chosen where the run starts: this machine has no CUDA device"
    try:
        kernel, reasons = choose_kernel(job)
    except ValueError as error:
        problems.append(str(error))
        return wanted
    return "; not ".join([kernel, *reasons])


def _time(plan: Plan, tokens: int, gpu: str, tok_s: float | None) -> str:
    source = "as given"
    if not tok_s:
        if plan.n_params <= 100_000_000 or not plan.job.compile.enable or plan.job.model.converters:
            return "no estimate: small, converted or uncompiled models were not measured; --tok-s gives the speed"
        by_mode = FA4_MFU if plan.args.kernel == "fa4" else MFU
        mfu = by_mode.get(plan.job.activation_checkpoint.mode, by_mode["full"])
        tok_s = mfu / 100 * get_peak_flops(gpu) / plan.flops
        source = f"at an assumed MFU of {mfu} % on {gpu}; --tok-s gives another speed"
    gpu_hours = tokens / tok_s / 3600
    hours = gpu_hours / plan.dims.world_size
    duration = f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    return f"{duration}, {gpu_hours:,.1f} GPU-hours, at {tok_s:,.0f} tokens per second per GPU ({source})"
