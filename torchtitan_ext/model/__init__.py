"""torchtitan's llama3 with Lighthouse Attention as a setting."""

from .args import LighthouseModelArgs, choose_kernel, flavors
from .model import LighthouseTransformer
from .settings import JobConfig, Lighthouse

__all__ = ["JobConfig", "Lighthouse", "LighthouseModelArgs", "LighthouseTransformer", "choose_kernel", "flavors"]
