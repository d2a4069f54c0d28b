"""Optimizer and schedule of a launch from a checkpoint that was trained with other settings."""

from copy import deepcopy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import LRScheduler, Optimizer

from torchtitan_ext.train.optimizer import LaunchSchedulers


def build(model, **settings):
    optimizers = build_optimizers([model], Optimizer(**settings), None)
    schedule = LRScheduler(warmup_steps=10, decay_ratio=0.0)
    return {"optimizer": optimizers, "lr_scheduler": LaunchSchedulers(optimizers, schedule, 20)}


def train(model, states):
    model(torch.arange(4.0)).square().sum().backward()
    for state in states.values():
        state.step()
    states["optimizer"].zero_grad()


@pytest.mark.parametrize("without", [(), ("optimizer",), ("lr_scheduler",)])
@pytest.mark.parametrize("changed", [{}, {"lr": 1e-3, "weight_decay": 0.3, "beta1": 0.8}])
def test_what_a_launch_sets_holds_over_the_checkpoint(tmp_path, changed, without):
    trained = {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9}
    model = torch.nn.Linear(4, 4)
    states = build(model, **trained)
    for _ in range(3):
        train(model, states)
    dcp.save(states, checkpoint_id=tmp_path, no_dist=True)

    resumed, settings = deepcopy(model), trained | changed
    resumed_states = build(resumed, **settings)
    loaded = {name: state for name, state in resumed_states.items() if name not in without}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)

    # by hand: the moments are the checkpoint's, and the position, unless they are left out
    [by_hand] = build(model, **settings)["optimizer"].optimizers
    if "optimizer" not in without:
        by_hand.state.update(states["optimizer"].optimizers[0].state)
    for done in range(2):
        position = done + (0 if "lr_scheduler" in without else 3)
        by_hand.param_groups[0]["lr"] = settings["lr"] * (position + 1) / 10
        train(model, {"optimizer": by_hand})
        train(resumed, resumed_states)
        assert all(map(torch.equal, model.parameters(), resumed.parameters()))
