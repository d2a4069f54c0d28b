"""Lighthouse Attention for any PyTorch model."""

from .attention import LighthouseAttention, lighthouse_attention, select_entries
from .config import LighthouseConfig
from .torch_ops import Selection

__all__ = ["LighthouseAttention", "LighthouseConfig", "Selection", "lighthouse_attention", "select_entries"]
