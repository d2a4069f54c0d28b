"""torchtitan's llama3 with Lighthouse Attention; importing it registers `llama3_lighthouse`."""

from torchtitan.protocols.train_spec import register_train_spec

from .args import LighthouseModelArgs, flavors
from .checks import check_job
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

register_train_spec("llama3_lighthouse", get_train_spec())
