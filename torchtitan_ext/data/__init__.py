"""Data of a run: the byte tokenizer, the data sets and their loader."""

from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import OF_FILES, check_data, settings_of

__all__ = ["OF_FILES", "build_dataloader", "check_data", "settings_of"]
