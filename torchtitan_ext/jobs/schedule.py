"""Check the optimizer and the schedule, and compare them with a checkpoint's."""

from collections.abc import Iterator
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import JobConfig


def optimizer_problems(job_config: JobConfig) -> Iterator[str]:
    """Settings that would distort the schedule, in this run or in one that continues it."""
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    total = steps if schedule.total_steps is None else schedule.total_steps
    if total < steps:
        yield f"lr_scheduler.total_steps = {total}: ends before training.steps = {steps}; set it to {steps} or more"
    if job_config.optimizer.early_step_in_backward:
        loss = "training.max_norm is ignored, each microbatch is a step, and checkpoints hold one parameter's moments"
        yield f"optimizer.early_step_in_backward = true: {loss}; set it to false"
    if not job_config.checkpoint.enable:
        return  # no run continues this one
    if 0 < total < schedule.warmup_steps:
        remedy = f"set it to {total} at most, or lr_scheduler.total_steps to the steps of the whole training"
        rule = f"more than {total} steps, so the rate would jump if the run went on"
        yield f"lr_scheduler.warmup_steps = {schedule.warmup_steps}: {rule}; {remedy}"
    if job_config.lighthouse.enable and schedule.decay_ratio != 0.0 and schedule.total_steps is None:
        remedy = "set it to 0.0, or lr_scheduler.total_steps to the steps of both stages"
        yield f"lr_scheduler.decay_ratio = {schedule.decay_ratio}: the dense stage's rate would jump back; {remedy}"


def trained_with(saved: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's settings, the step and its rate that a checkpoint's objects record."""
    group = {key.rpartition(".")[2]: value for key, value in saved.items() if key.startswith("optimizer.param_groups.")}
    group |= dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
    if "decoupled_weight_decay" in group:
        group["name"] = "AdamW" if group["decoupled_weight_decay"] else "Adam"
    lr = (saved.get("lr_scheduler.base_lrs") or [group.get("initial_lr")])[0]
    rate = saved.get("lr_scheduler._last_lr", [nan])[0]
    return group | {"lr": lr, "step": saved.get("lr_scheduler.last_epoch", 0), "rate": rate}


def planned(job_config: JobConfig, step: int, lr: float | None = None) -> dict[str, Any]:
    """The same for the checkpoint that a job will save at `step`; no rate for settings that torchtitan rejects."""
    rate = nan
    with suppress(Exception):
        optimizers = [torch.optim.SGD([torch.zeros(1)])]  # the schedule needs one
        schedulers = build_lr_schedulers(optimizers, job_config.lr_scheduler, job_config.training.steps)
        rate = (lr or job_config.optimizer.lr) * schedulers.schedulers[0].lr_lambdas[0](step)
    return vars(job_config.optimizer) | {"step": step, "rate": rate}


def schedule_changes(job_config: JobConfig, field: str, path: Path | str, saved: dict[str, Any]) -> Iterator[str]:
    """Changes since the launch with the settings `saved` in the checkpoint `path`, which `field` names."""
    if job_config.optimizer.override_checkpoint:
        return
    on_purpose = "; or, to change that from here on, set optimizer.override_checkpoint to true"
    now, step, before = planned(job_config, saved["step"], saved["lr"]), saved["step"], saved["rate"]
    for name in ("name", "lr", "beta1", "beta2", "eps", "weight_decay"):
        if saved.get(name, now[name]) not in (None, now[name]):
            value = f"{path}, which {field} leads to, has {saved[name]!r}"
            yield f"optimizer.{name} = {now[name]!r}: {value}; set it to that{on_purpose}"
    if abs(now["rate"] - before) > 1e-6 * before:
        settings = ", ".join(f"{name} = {value!r}" for name, value in vars(job_config.lr_scheduler).items())
        settings += f" with training.steps = {job_config.training.steps}"
        jump = f"the rate would jump from {before:.3g} to {now['rate']:.3g} at step {step}, where {path} continues"
        yield f"[lr_scheduler] {settings}: {jump}; restore them{on_purpose}"
