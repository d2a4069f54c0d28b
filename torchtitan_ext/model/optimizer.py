"""The optimizer's settings and the rate's schedule: what a launch sets, beside what a checkpoint was trained with."""

from collections.abc import Callable, Iterator
from math import isclose
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.config import JobConfig, LRScheduler


def _rate(job_config: JobConfig) -> Callable[[int], float]:
    """torchtitan's rate after so many steps, as a multiple of `optimizer.lr`."""
    optimizers = build_optimizers([nn.Linear(1, 1)], job_config.optimizer, None)
    steps = max(0, job_config.training.steps)
    schedulers = build_lr_schedulers(optimizers, job_config.lr_scheduler, steps)
    return schedulers.schedulers[0].lr_lambdas[0]


def optimizer_problems(job_config: JobConfig) -> Iterator[str]:
    """What torchtitan's own builders say, and what would bend the schedule."""
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    try:
        _rate(job_config)
    except Exception as error:  # of any kind
        yield f"[optimizer] and [lr_scheduler]: training can't start with these ({error}); correct them"
        return
    total = steps if schedule.total_steps is None else schedule.total_steps
    if total < steps:
        yield (
            f"lr_scheduler.total_steps = {total}: the schedule would end before training.steps = {steps}; "
            f"set it to {steps} or more"
        )
    if not job_config.checkpoint.enable:
        return  # nothing goes on from here, under another schedule
    if 0 < total < schedule.warmup_steps:
        yield (
            f"lr_scheduler.warmup_steps = {schedule.warmup_steps}: would shrink to {total}, and the rate jump in a "
            f"longer run that goes on from this one; set it to {total} at most, or lr_scheduler.total_steps to the "
            "steps of the whole training"
        )
    if (
        job_config.lighthouse.enable
        and schedule.decay_ratio != 0.0
        and schedule.total_steps is None
    ):
        yield (
            f"lr_scheduler.decay_ratio = {schedule.decay_ratio}: the rate would decay to the end of this "
            "stage and jump back in the dense one; set it to 0.0, or lr_scheduler.total_steps to the steps "
            "of both stages"
        )


def resume_problems(
    job_config: JobConfig, field: str, path: Path, saved: dict[str, Any]
) -> Iterator[str]:
    """Where this launch differs from the one that saved these objects in the checkpoint `path`, which `field` names."""
    if job_config.optimizer.override_checkpoint:
        return
    on_purpose = "; or, to change that from here on, set optimizer.override_checkpoint to true"
    group = {
        key.rpartition(".")[2]: value
        for key, value in saved.items()
        if key.startswith("optimizer.param_groups.")
    }
    base = (saved.get("lr_scheduler.base_lrs") or [group.get("initial_lr")])[0]
    decoupled = group.get("decoupled_weight_decay")
    trained_with = {
        "name": None if decoupled is None else "AdamW" if decoupled else "Adam",
        "lr": base,
        **dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False)),
        "eps": group.get("eps"),
        "weight_decay": group.get("weight_decay"),
    }
    for name, value in trained_with.items():
        if value is not None and (now := getattr(job_config.optimizer, name)) != value:
            yield (
                f"optimizer.{name} = {now!r}: {path}, which {field} leads to, was trained with {value!r}; set it to "
                f"that{on_purpose}"
            )
    if base and (rates := saved.get("lr_scheduler._last_lr")):
        try:
            step = saved["lr_scheduler.last_epoch"]
            rate = base * _rate(job_config)(step)
        except Exception:  # named by optimizer_problems
            return
        if not isclose(rate, rates[0], rel_tol=1e-6):
            schedule = job_config.lr_scheduler
            names = ("warmup_steps", "decay_ratio", "decay_type", "min_lr_factor", "total_steps")
            settings = ", ".join(f"{name} = {getattr(schedule, name)!r}" for name in names)
            yield (
                f"[lr_scheduler] {settings} with training.steps = {job_config.training.steps}: the rate would jump "
                f"from {rates[0]:.3g} to {rate:.3g} at step {step}, where {path} goes on; set them as they were when "
                f"it was trained{on_purpose}"
            )


class LaunchSchedulers(LRSchedulersContainer):
    """torchtitan's, at a checkpoint's position, with the rate, decay, betas and epsilon of this launch."""

    def __init__(self, schedulers: LRSchedulersContainer):
        self.schedulers = schedulers.schedulers
        for scheduler in self.schedulers:
            scheduler.optimizer.register_load_state_dict_pre_hook(_keep_settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = self.schedulers[0].base_lrs
        super().load_state_dict(state_dict | {"base_lrs": own})
        for scheduler in self.schedulers:
            rates = [
                base * rate(scheduler.last_epoch)
                for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            scheduler._last_lr = rates
            for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = lr


def _keep_settings(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for loaded, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        loaded |= {name: value for name, value in own.items() if name != "params"}


def build_launch_schedulers(
    optimizers: OptimizersContainer, config: LRScheduler, training_steps: int
) -> LaunchSchedulers:
    return LaunchSchedulers(build_lr_schedulers(optimizers, config, training_steps))
