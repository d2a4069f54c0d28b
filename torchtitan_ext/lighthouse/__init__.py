"""Lighthouse Attention for any PyTorch code."""

from .attention import LighthouseAttention, lighthouse_attention, select_entries
from .config import LighthouseConfig
from .operators import Selection

__all__ = [
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "lighthouse_attention",
    "select_entries",
]
