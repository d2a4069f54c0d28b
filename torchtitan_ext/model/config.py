"""The sections that this package adds to a job's TOML; named by `job.custom_config_module`."""

from dataclasses import dataclass, field

from torchtitan_ext.lighthouse import LighthouseConfig


@dataclass(frozen=True)
class Lighthouse(LighthouseConfig):
    enable: bool = False
    """Train the layers that aren't listed as dense with Lighthouse Attention"""

    dense_layers: list[int] | None = None
    """Layers that keep dense attention, counted from 0. None means the flavor's own list."""


@dataclass
class Loss:
    fuse_output: bool = False
    """Take the loss from the last hidden states, a chunk of tokens at a time: the logits never exist whole"""


@dataclass
class JobConfig:
    lighthouse: Lighthouse = field(default_factory=Lighthouse)
    loss: Loss = field(default_factory=Loss)
