"""Launch ranks in less time: they are forked from a process that has imported torchtitan.

With GPUs each rank imports it, because a process that has used one can't be forked. Tests of torchrun's other work use
torchrun itself.
"""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchtitan.train
from torch.multiprocessing.spawn import ProcessException
from torchtitan.config import ConfigManager

from torchtitan_ext.experiment.records import LOSS, read_scalars
from torchtitan_ext.train.__main__ import main
from torchtitan_ext.train.spec import register

from .commands import ROOT

START = "spawn" if torch.cuda.is_available() else "forkserver"
# what a rank would import later, or with the test's own module
PRELOADED = ["torchtitan_ext.train.__main__", "torch._dynamo.backends.debugging", "pytest", "hypothesis", "tensorboard"]
PRELOADED += ["packaging.requirements", "tyro._backends._tyro_backend", "torch.testing._internal.common_utils"]
CONTEXT = multiprocessing.get_context(START)
CONTEXT.set_forkserver_preload(PRELOADED)
SHORT = ["--training.seq_len=256", "--lighthouse.top_k=16", "--lighthouse.tile_winners=4"]
SHORT += ["--lr_scheduler.warmup_steps=2"]


def start_ranks(function: Callable[..., None], n_ranks: int, *args: object, **env: str) -> None:
    """`function(rank, *args)` in processes as torchrun starts them. Raises ProcessException as soon as one fails."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    ranks = {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    env = ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | env
    mp.start_processes(_call, (function, args, env), n_ranks, start_method=START)


def in_group(function: Callable[..., None], n_ranks: int, *args: object) -> None:
    """`function(rank, *args)` in the ranks of a process group, as a run's start leaves them."""
    start_ranks(_call_in_group, n_ranks, function, *args)


def train(
    n_ranks: int, arguments: list[str], *, stock: bool = False, ends_well: bool | None = True, **env: str
) -> tuple[bool, str]:
    """Train: whether it ended well, which `ends_well` says unless None, and what all ranks wrote. stock: torchtitan's
    own trainer."""
    with tempfile.NamedTemporaryFile("r") as log:
        try:
            start_ranks(_train_rank, n_ranks, arguments, stock, log.name, **env)
            ended_well, output = True, log.read()
        except ProcessException as error:
            ended_well, output = False, f"{log.read()}\n{error}"
    assert ends_well in (None, ended_well), output
    return ended_well, output


def losses(dump: Path, tag: str = LOSS) -> list[tuple[int, float]]:
    """Every (step, loss) that was logged, of all the starts of a run."""
    return sorted((e.step, e.value) for file in dump.glob("tb/*/*tfevents*") for e in read_scalars(file).get(tag, []))


def _call(rank: int, function: Callable[..., None], args: tuple, env: dict[str, str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **env}
    torch.set_num_threads(1)
    os.chdir(ROOT)
    function(rank, *args)


def _call_in_group(rank: int, function: Callable[..., None], *args: object) -> None:
    register()
    dist.init_process_group("gloo")
    function(rank, *args)
    dist.barrier()
    os._exit(0)  # past the interpreter's end, gloo's threads may abort the process


def _train_rank(rank: int, arguments: list[str], stock: bool, log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # the platform's own, for a data loader's worker
    multiprocessing.set_start_method(None, force=True)
    if stock:
        torchtitan.train.main(torchtitan.train.Trainer, ConfigManager().parse_args(arguments))
    else:
        main(arguments)
