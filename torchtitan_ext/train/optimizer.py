"""Continue a checkpoint's schedule with this launch's rate, decay, betas and epsilon."""

from typing import Any

from torch.optim import Optimizer
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler


class LaunchSchedulers(LRSchedulersContainer):
    def __init__(self, optimizers: OptimizersContainer, config: LRScheduler, training_steps: int):
        self.schedulers = build_lr_schedulers(optimizers, config, training_steps).schedulers
        for optimizer in optimizers:
            optimizer.register_load_state_dict_pre_hook(_keep_settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = self.schedulers[0].base_lrs
        super().load_state_dict(state_dict | {"base_lrs": own})
        for scheduler in self.schedulers:
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * rate(scheduler.last_epoch) for base, rate in rates]
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = lr


def _keep_settings(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for loaded, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        loaded |= {name: value for name, value in own.items() if name != "params"}
