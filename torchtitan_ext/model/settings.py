"""The sections that this package adds to a job's TOML; named by `job.custom_config_module`."""

from dataclasses import dataclass, field
from typing import Literal, TypedDict

from torchtitan_ext.lighthouse import LighthouseConfig


@dataclass(frozen=True)
class Lighthouse(LighthouseConfig):
    enable: bool = False
    """Train with Lighthouse Attention, except in `dense_layers`."""

    dense_layers: list[int] | None = None
    """Layers that keep dense attention, counted from 0. None is the flavor's own list."""


@dataclass
class Attention:
    kernel: Literal["auto", "fa4", "cudnn", "flash", "sdpa"] = "auto"
    """Attention kernel of dense and Lighthouse layers: FlashAttention-4, cuDNN, torch's flash kernel, or the first of
    torch's that works (sdpa). auto is the fastest that is installed and fits GPU, dtype and head dimension."""


@dataclass
class Optimizer:
    override_checkpoint: bool = False
    """Allow another [optimizer] or [lr_scheduler] than the checkpoint's; moments and the schedule's position are kept.
    By default such a launch is rejected."""


@dataclass
class Model:
    name: str = "llama3_lighthouse"
    """Name of the model in torchtitan: llama3 with Lighthouse Attention as a setting."""


@dataclass
class Rope:
    """Frequencies for another length than the flavor's: Llama 3's scaling, a larger theta, or both."""

    theta: float | None = None
    """Base of the frequencies. None, here and below, is the flavor's."""

    scaling_factor: float | None = None
    """How many times slower the slow rotations become; 1 leaves them as they are."""

    original_max_position_embeddings: int | None = None
    """Tokens per sequence before the extension. Rotations that take less than a quarter of them are not scaled."""


@dataclass
class Loss:
    fuse_output: bool = False
    """On a GPU, compute the loss in chunks of tokens, so that the full logits are never stored."""


class Source(TypedDict, total=False):
    dataset: str
    path: str
    text_field: str
    weight: float


@dataclass
class Training:
    text_field: str = "text"
    """The JSON key or column that holds the text, in files of the data set text."""

    mixture: list[Source] = field(default_factory=list)
    """Data sets to mix in place of training.dataset, each a table [[training.mixture]]: dataset ("text" by default),
    path, text_field, and weight, its relative share of the documents (1 by default)."""

    skip_damaged_data: bool = False
    """Skip damaged lines and files of the data set text; the log names and counts them. By default the first stops the
    run. A file that can't be read at all always does."""

    skip_nonfinite_steps: int = 0
    """How many steps in a row may have a non-finite loss or gradient. Such a step changes neither parameters nor
    optimizer state; schedule and data continue. 0 stops at the first."""


@dataclass
class Parallelism:
    fsdp_no_sync: bool = False
    """Reduce gradients once per step, after the last microbatch. Takes the memory of a whole gradient on every rank.
    With fsdp_reshard_after_forward = "never", weights are gathered once per step too. No effect without gradient
    accumulation or with pipeline parallelism."""

    context_parallel_load_balancer: str | None = None
    """'headtail' gives each rank a chunk of the sequence's head and one of its tail, for torch's ring attention
    (rotate method 'alltoall'). Otherwise ranks exchange rows for heads, which needs no balancer."""


@dataclass
class JobConfig:
    model: Model = field(default_factory=Model)
    parallelism: Parallelism = field(default_factory=Parallelism)
    training: Training = field(default_factory=Training)
    attention: Attention = field(default_factory=Attention)
    lighthouse: Lighthouse = field(default_factory=Lighthouse)
    optimizer: Optimizer = field(default_factory=Optimizer)
    rope: Rope = field(default_factory=Rope)
    loss: Loss = field(default_factory=Loss)
