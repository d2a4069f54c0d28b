"""Cross entropy from the last hidden states, so that a GPU never stores the full logits of a sequence."""

from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX, LossFunction, build_cross_entropy_loss, cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

try:
    if device_type != "cuda":
        raise ImportError  # it wouldn't run, and takes a second to import
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
except ImportError:  # no Triton on this platform
    liger_fused_linear_cross_entropy = None

_CHUNK = 4096  # tokens whose logits exist at once; with fewer the products take longer


class ProjectionForLoss(nn.Module):  # not an nn.Linear, which model converters (float8) would replace
    """The output projection, left to the loss: forward hands on its input and its weight."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, vocab_size, bias=False).weight

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return as_product(hidden, self.weight)


def as_product(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, dim] and [vocab_size, dim], in the dtype that their product would have."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def liger_chunk(n_tokens: int, vocab_size: int, dim: int) -> tuple[int, int]:
    """Tokens per chunk of Liger-Kernel's loss, and the setting that leads to them, a chunk's logits in multiples of
    the hidden states. The tokens are a power of two: `_CHUNK`, or the nearest above that a setting leads to."""
    multiple = max(1, vocab_size // (dim * max(1, n_tokens // _CHUNK)))
    n_chunks = -(-vocab_size // (multiple * dim))
    chunk = 1 << (-(-n_tokens // n_chunks) - 1).bit_length()
    return min(chunk, n_tokens), multiple


def linear_cross_entropy_loss(pred: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Summed cross entropy, fp32: torchtitan's `cross_entropy_loss` of the logits, without the logits.

    That is Liger-Kernel's, on a CUDA device; elsewhere the logits are stored. torch's own `linear_cross_entropy` (from
    2.13) returns the sum in the dtype of its input: in bf16 it is off by some tenths of a percent, more than the
    differences that a training curve has to show.

    pred: what `ProjectionForLoss` returns. labels: [B, N], int64; `IGNORE_INDEX` is left out.
    """
    hidden, weight = pred
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    if hidden.is_cuda and liger_fused_linear_cross_entropy:
        # Its defaults sum the weight's gradient in the weight's dtype, over chunks whose size depends on the tokens.
        chunks = {"accum_dtype": torch.float32, "chunk_mem_const": liger_chunk(len(hidden), *weight.shape)[1]}
        options = {"ignore_index": IGNORE_INDEX, "reduction": "sum"} | chunks
        return liger_fused_linear_cross_entropy(hidden, weight, labels, **options)
    return cross_entropy_loss((hidden @ weight.T).unsqueeze(0), labels.unsqueeze(0))


def build_loss(job_config: JobConfig, parallel_dims: ParallelDims, **kwargs: Any) -> LossFunction:
    """torchtitan's loss, or `linear_cross_entropy_loss` if `loss.fuse_output` is true."""
    if job_config.loss.fuse_output:
        if device_type == "cuda" and not liger_fused_linear_cross_entropy:
            logger.warning("Liger-Kernel can't be imported: the full logits are stored, as without loss.fuse_output")
        loss_fn = linear_cross_entropy_loss
    else:
        loss_fn = build_cross_entropy_loss(job_config, **kwargs)
    if not parallel_dims.dp_replicate_enabled or parallel_dims.fsdp_enabled:
        return loss_fn

    def loss_under_ddp(pred: Any, labels: Tensor) -> Tensor:
        # DDP averages gradients over ranks, but the trainer has divided each loss by the tokens of all ranks.
        loss = loss_fn(pred, labels)
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad * parallel_dims.dp_replicate)
        return loss

    return loss_under_ddp
