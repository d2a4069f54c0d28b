"""Cause a fault in a job that imports this module, for test_faults.

FAULTS: "NAME RANK STEP"; after a comma, what follows once a rank was killed. What happens to that rank in that step:
    killed             SIGKILL, between its backward pass and the update
    killed-saving      SIGKILL, when the shards of that step's checkpoint are written
    full-disk          from that step's checkpoint on no file can grow beyond 64 KiB
    not-finite         its loss is nan, and in the next step too
    orphaned           torchrun, its parent, gets SIGKILL
    terminated         it gets SIGTERM
CHANGED: the folder where each rank writes what a step with a loss of nan changed, and that it is killed.
"""

import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from torchtitan_ext.train.trainer import LighthouseCheckpointManager, LighthouseTrainer

KILLED = Path(os.environ["CHANGED"], "killed")
NAME, RANK, STEP = os.environ["FAULTS"].split(",")[-KILLED.exists()].split()
STEP, HERE = int(STEP), os.environ["RANK"] == RANK

forward_backward, train_step = LighthouseTrainer.forward_backward_step, LighthouseTrainer.train_step
save, finish = LighthouseCheckpointManager.save, FileSystemWriter.finish


def faulty_forward_backward(self, **batch):
    loss_fn = self.loss_fn
    if NAME == "not-finite" and HERE and self.step in (STEP, STEP + 1):
        self.loss_fn = lambda *args: loss_fn(*args) * math.nan
    loss = forward_backward(self, **batch)
    self.loss_fn = loss_fn
    if HERE and self.step == STEP:
        if NAME == "killed":
            KILLED.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if NAME in ("orphaned", "terminated"):
            os.kill(*((os.getppid(), signal.SIGKILL) if NAME == "orphaned" else (os.getpid(), signal.SIGTERM)))
            until = time.monotonic() + 30
            while not self.sigterm_received and time.monotonic() < until:
                time.sleep(0.01)
    return loss


def state(trainer):
    tensors = {"weights": trainer.model_parts[0].parameters(), "moments": trainer.optimizers.state_dict().values()}
    return {
        name: [x.to_local().clone() for x in values if isinstance(x, torch.Tensor) and x.ndim]
        for name, values in tensors.items()
    }


def watched_train_step(self, batches):
    if NAME != "not-finite" or self.step > STEP:
        return train_step(self, batches)
    before = state(self)
    train_step(self, batches)
    changed = [name for name, tensors in state(self).items() if not all(map(torch.equal, tensors, before[name]))]
    file = Path(os.environ["CHANGED"], f"step-{self.step}-rank-{os.environ['RANK']}.json")
    file.write_text(json.dumps(changed))


def faulty_save(self, curr_step, **kwargs):
    if NAME == "full-disk" and HERE and curr_step == STEP:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    save(self, curr_step, **kwargs)


def faulty_finish(self, **results):
    if NAME == "killed-saving" and HERE and str(self.path).endswith(f"step-{STEP}"):
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, **results)


LighthouseTrainer.forward_backward_step, LighthouseTrainer.train_step = faulty_forward_backward, watched_train_step
LighthouseCheckpointManager.save, FileSystemWriter.finish = faulty_save, faulty_finish
