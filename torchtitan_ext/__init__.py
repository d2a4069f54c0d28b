"""Lighthouse Attention for torchtitan."""

__version__ = "0.2.0"
