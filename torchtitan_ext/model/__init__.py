"""torchtitan's llama3 with Lighthouse Attention as a setting."""

from .args import LighthouseModelArgs, RoPEScalingArgs, choose_kernel, flavors
from .model import LighthouseTransformer
from .settings import JobConfig, Lighthouse

__all__ = ["JobConfig", "Lighthouse", "LighthouseModelArgs", "LighthouseTransformer", "RoPEScalingArgs"]
__all__ += ["choose_kernel", "flavors"]
