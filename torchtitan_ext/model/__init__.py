"""torchtitan's llama3 with Lighthouse Attention; importing it registers `llama3_lighthouse`."""

import os

from torchtitan.protocols.train_spec import register_train_spec

from torchtitan_ext.patching import NotPatched

from .args import LighthouseModelArgs, flavors
from .checks import check_job, patch_problems
from .config import JobConfig, Lighthouse
from .model import LighthouseTransformer
from .train_spec import get_train_spec

__all__ = [
    "JobConfig",
    "Lighthouse",
    "LighthouseModelArgs",
    "LighthouseTransformer",
    "check_job",
    "flavors",
    "get_train_spec",
]

# Without a GPU, torchtitan as released stops a launched process before check_job is called.
if "LOCAL_RANK" in os.environ:
    for problem in patch_problems():
        raise NotPatched(problem)

register_train_spec("llama3_lighthouse", get_train_spec())
