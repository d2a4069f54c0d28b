"""The byte tokenizer and the data sets; importing this adds the data sets to torchtitan's."""

from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import check_dataset

__all__ = ["build_dataloader", "check_dataset"]
