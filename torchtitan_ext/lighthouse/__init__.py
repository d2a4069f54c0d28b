"""Lighthouse Attention for any PyTorch code."""

from .attention import LighthouseAttention, Selection, lighthouse_attention, select_entries
from .config import LighthouseConfig

__all__ = [
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "lighthouse_attention",
    "select_entries",
]
