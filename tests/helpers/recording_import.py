"""Record what a job that imports this module sees, for test_resume.

Adds two flavors: one for eight ranks that share a sequence, one with few layers at the 530M recipe's size.

RECORDS: folder for each rank's batches, in the order drawn, and for the state after loading.
KILL_AT_BATCH: every rank kills itself when it draws that batch.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader

from torchtitan_ext.model import flavors

RECORDS = Path(os.environ["RECORDS"])
KILL_AT_BATCH = int(os.environ.get("KILL_AT_BATCH", 0))
flavors["eight-heads"] = replace(flavors["debug"], n_heads=8)
flavors["six-layers"] = replace(flavors["270M"], n_layers=6, dense_layers=(0, 5))

draw, load = ParallelAwareDataloader.__iter__, CheckpointManager.load


def draw_and_record(self):
    for count, batch in enumerate(draw(self), 1):
        if count == KILL_AT_BATCH:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save(batch, RECORDS / f"batch-{self.dp_rank}-{count}.pt")
        yield batch


def load_and_record(self, step=-1):
    loaded = load(self, step)
    state = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in self.states["optimizer"].state_dict().items()
    }
    state |= self.states["train_state"].state_dict()
    state["lr"] = self.states["lr_scheduler"].schedulers[0].get_last_lr()
    if torch.distributed.get_rank() == 0:
        torch.save(state, RECORDS / "loaded.pt")
    return loaded


ParallelAwareDataloader.__iter__, CheckpointManager.load = draw_and_record, load_and_record
