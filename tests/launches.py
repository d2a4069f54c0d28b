"""Ranks without the seconds that each would need to import torchtitan: they are forked from a process that has.

With GPUs each imports it by itself, because what has asked for one can't be forked. What torchrun does beside starting
ranks is tested with torchrun itself.
"""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException
from torchtitan.config import ConfigManager
from torchtitan.train import Trainer, main

ROOT = Path(__file__).parents[1]
START = "spawn" if torch.cuda.is_available() else "forkserver"


def start_ranks(function: Callable[..., None], n_ranks: int, *args: object) -> None:
    """`function(rank, n_ranks, *args)` in as many processes. Raises ProcessException as soon as one fails."""
    multiprocessing.get_context(START).set_forkserver_preload(
        ["torchtitan.train", "torchtitan_ext.model"]
    )
    mp.start_processes(function, (n_ranks, *args), n_ranks, start_method=START)


def train(n_ranks: int, arguments: list[str], **env: str) -> tuple[bool, str]:
    """torchtitan.train with these arguments: whether it ended well, and what all ranks wrote."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    env |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with tempfile.NamedTemporaryFile("r") as log:
        try:
            start_ranks(_train_rank, n_ranks, arguments, log.name, env)
        except ProcessException as error:
            return False, f"{log.read()}\n{error}"
        return True, log.read()


def _train_rank(rank: int, n_ranks: int, arguments: list[str], log: str, env: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **env}
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    # the platform's own, for a data loader's worker
    multiprocessing.set_start_method(None, force=True)
    # in place of what sys.argv was when it was imported
    ConfigManager.parse_args.__defaults__ = (arguments,)
    main(Trainer)
