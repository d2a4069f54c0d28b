"""Check the optimizer and the schedule, and compare them with a checkpoint's."""

from collections.abc import Iterator
from contextlib import suppress
from math import isclose
from pathlib import Path
from typing import Any

from torch import nn
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import JobConfig


def optimizer_problems(job_config: JobConfig) -> Iterator[str]:
    """Settings that would distort the schedule, in this run or in one that continues it."""
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    total = steps if schedule.total_steps is None else schedule.total_steps
    if total < steps:
        yield f"lr_scheduler.total_steps = {total}: ends before training.steps = {steps}; set it to {steps} or more"
    if not job_config.checkpoint.enable:
        return  # no run continues this one
    if 0 < total < schedule.warmup_steps:
        remedy = f"set it to {total} at most, or lr_scheduler.total_steps to the steps of the whole training"
        rule = f"more than {total} steps, so the rate would jump if the run went on"
        yield f"lr_scheduler.warmup_steps = {schedule.warmup_steps}: {rule}; {remedy}"
    if job_config.lighthouse.enable and schedule.decay_ratio != 0.0 and schedule.total_steps is None:
        remedy = "set it to 0.0, or lr_scheduler.total_steps to the steps of both stages"
        yield f"lr_scheduler.decay_ratio = {schedule.decay_ratio}: the dense stage's rate would jump back; {remedy}"


def schedule_changes(job_config: JobConfig, field: str, path: Path, saved: dict[str, Any]) -> Iterator[str]:
    """Changes since the launch that saved these objects in the checkpoint `path`, which `field` names."""
    if job_config.optimizer.override_checkpoint:
        return
    on_purpose = "; or, to change that from here on, set optimizer.override_checkpoint to true"
    group = {key.rpartition(".")[2]: value for key, value in saved.items() if key.startswith("optimizer.param_groups.")}
    base = (saved.get("lr_scheduler.base_lrs") or [group.get("initial_lr")])[0]
    trained_with = {"lr": base} | {name: group.get(name) for name in ("eps", "weight_decay")}
    trained_with |= dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
    if "decoupled_weight_decay" in group:
        trained_with["name"] = "AdamW" if group["decoupled_weight_decay"] else "Adam"
    for name, value in trained_with.items():
        if value is not None and (now := getattr(job_config.optimizer, name)) != value:
            before = f"{path}, which {field} leads to, was trained with {value!r}"
            yield f"optimizer.{name} = {now!r}: {before}; set it to that{on_purpose}"
    if rates := saved.get("lr_scheduler._last_lr"):
        step, rate = saved.get("lr_scheduler.last_epoch", 0), rates[0]
        with suppress(Exception):  # torchtitan rejects these settings itself
            optimizers = build_optimizers([nn.Linear(1, 1)], job_config.optimizer, None)
            schedulers = build_lr_schedulers(optimizers, job_config.lr_scheduler, job_config.training.steps)
            rate = base * schedulers.schedulers[0].lr_lambdas[0](step)
        if not isclose(rate, rates[0], rel_tol=1e-6):
            schedule = job_config.lr_scheduler
            names = ("warmup_steps", "decay_ratio", "decay_type", "min_lr_factor", "total_steps")
            settings = ", ".join(f"{name} = {getattr(schedule, name)!r}" for name in names)
            settings += f" with training.steps = {job_config.training.steps}"
            jump = f"the rate would jump from {rates[0]:.3g} to {rate:.3g} at step {step}, where {path} continues"
            yield f"[lr_scheduler] {settings}: {jump}; restore them{on_purpose}"
