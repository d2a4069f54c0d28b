"""Lighthouse Attention for torchtitan."""
