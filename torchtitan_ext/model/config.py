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
class Optimizer:
    override_checkpoint: bool = False
    """
    Train on with another [optimizer] or [lr_scheduler] than the checkpoint was trained with. Moments and the
    schedule's position are the checkpoint's either way. By default such a launch is refused.
    """


@dataclass
class Loss:
    fuse_output: bool = False
    """Take the loss from the last hidden states, a chunk of tokens at a time: the logits never exist whole"""


@dataclass
class Training:
    skip_damaged_data: bool = False
    """
    Leave out lines and files of c4_local that are damaged, named in the log and counted. By default the first
    stops the run. A file that can't be read at all always does: it may be back for the next launch.
    """


@dataclass
class Parallelism:
    context_parallel_load_balancer: str | None = None
    """
    'headtail' gives each rank that shares a sequence a chunk of its head and one of its tail: for torch's ring
    attention, the rotate method 'alltoall'. Otherwise the ranks share out heads, which needs no balancer.
    """


@dataclass
class JobConfig:
    parallelism: Parallelism = field(default_factory=Parallelism)
    training: Training = field(default_factory=Training)
    lighthouse: Lighthouse = field(default_factory=Lighthouse)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
