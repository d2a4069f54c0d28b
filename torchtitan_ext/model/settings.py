"""The sections that this package adds to a job's TOML; named by `job.custom_config_module`."""

from dataclasses import dataclass, field
from typing import Literal, TypedDict

from torchtitan_ext.lighthouse import LighthouseConfig


@dataclass(frozen=True)
class Lighthouse(LighthouseConfig):
    enable: bool = False
    """Train the layers that aren't listed as dense with Lighthouse Attention"""

    dense_layers: list[int] | None = None
    """Layers that keep dense attention, counted from 0. None means the flavor's own list."""


@dataclass
class Attention:
    kernel: Literal["auto", "fa4", "cudnn", "flash", "sdpa"] = "auto"
    """
    What attends, in dense and in Lighthouse layers: FlashAttention-4 (the package flash-attn-4), cuDNN, torch's own
    flash kernel, or the first that can of torch's kernels. auto is the fastest that is installed and fits GPU, dtype
    and head dimension.
    """


@dataclass
class Optimizer:
    override_checkpoint: bool = False
    """Train on with another [optimizer] or [lr_scheduler] than the checkpoint was trained with. Moments and the
    schedule's position are the checkpoint's either way. By default such a launch is refused."""


@dataclass
class Model:
    name: str = "llama3_lighthouse"
    """torchtitan's name of the model: llama3 with Lighthouse Attention as a setting"""


@dataclass
class Loss:
    fuse_output: bool = False
    """Take the loss from the last hidden states, a chunk of tokens at a time: the logits never exist whole"""


class Source(TypedDict, total=False):
    dataset: str
    path: str
    text_field: str
    weight: float


@dataclass
class Training:
    text_field: str = "text"
    """What holds the text in files of the data sets text and c4_local: the name in an object of JSON, or a column"""

    mixture: list[Source] = field(default_factory=list)
    """Several data sets in place of training.dataset, each in a table [[training.mixture]]: dataset ("text" if not
    given), path, text_field, and weight, its share of the documents relative to the others' (1 if not given)"""

    skip_damaged_data: bool = False
    """Leave out lines and files of text and c4_local that are damaged, named in the log and counted. By default
    the first stops the run. A file that can't be read at all always does: it may be back for the next launch."""

    skip_nonfinite_steps: int = 0
    """How many steps in a row may have a loss or gradients that are not finite. Such a step leaves parameters and
    optimizer state as they are, unless optimizer.early_step_in_backward has changed them already; the schedule
    and the data go on. One more stops training, so 0 stops at the first."""


@dataclass
class Parallelism:
    fsdp_no_sync: bool = False
    """Accumulate gradients before FSDP reduces them, in the last microbatch of a step only. Takes the memory of a
    whole gradient on every rank. With fsdp_reshard_after_forward = "never", weights are gathered once per step
    too. No effect without gradient accumulation, or with pipeline parallelism."""

    context_parallel_load_balancer: str | None = None
    """'headtail' gives each rank that shares a sequence a chunk of its head and one of its tail: for torch's ring
    attention, the rotate method 'alltoall'. Otherwise the ranks share out heads, which needs no balancer."""


@dataclass
class JobConfig:
    model: Model = field(default_factory=Model)
    parallelism: Parallelism = field(default_factory=Parallelism)
    training: Training = field(default_factory=Training)
    attention: Attention = field(default_factory=Attention)
    lighthouse: Lighthouse = field(default_factory=Lighthouse)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
