"""torchtitan's llama3 with Lighthouse Attention as a setting."""

from .args import LighthouseModelArgs, RoPEScalingArgs, choose_kernel, flavors
from .model import LighthouseTransformer
from .settings import Lighthouse

__all__ = ["Lighthouse", "LighthouseModelArgs", "LighthouseTransformer", "RoPEScalingArgs", "choose_kernel", "flavors"]
