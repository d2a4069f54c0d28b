"""Causal attention by named kernels: torch's own, or FlashAttention-4 as one operator."""

from importlib import import_module
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    # EFFICIENT_ATTENTION serves fp32 on a GPU
    "sdpa": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
KERNELS = ("fa4", *BACKENDS)  # fastest first; `sdpa` always runs
_FA4 = "flash_attn.cute.interface"


def unusable_reason(
    kernel: str, dtype: torch.dtype, head_dim: int, deterministic: bool = False, device: str = "cuda"
) -> str | None:
    """Why a kernel can't train heads of `head_dim` channels in `dtype` on a CUDA device; None if it can."""
    if kernel == "sdpa":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if kernel == "fa4":
        try:
            attrgetter("_flash_attn_fwd", "_flash_attn_bwd")(import_module(_FA4))
        except Exception as error:  # whatever versions that don't fit raise
            return f"flash-attn-4 can't be imported ({error}); pip install 'torchtitan-lighthouse[fa4]'"
        major, minor = torch.cuda.get_device_capability(device)
        most = {9: 256, 10: 128}.get(major, 0)  # channels of a head
        if dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= most:
            return None
        here = f"here are heads of {head_dim} in {dtype} on capability {major}.{minor}"
        return f"it is for compute capability 9 and 10, 16 bits, heads of 8, 16, ... 256 channels (on 10: 128); {here}"
    if kernel == "cudnn" and deterministic:
        return "its backward pass does not repeat bitwise"
    x = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device, requires_grad=True)
    params = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, True, False)
    is_usable = getattr(torch.backends.cuda, f"can_use_{kernel}_attention")
    with sdpa_kernel(BACKENDS[kernel]):
        return None if is_usable(params) else f"torch can't run it here for heads of {head_dim} channels in {dtype}"


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "sdpa", enable_gqa: bool = False) -> Tensor:
    """[B, H, S, D] and 2 x [B, H_kv, S, D] -> [B, H, S, D], by a kernel of KERNELS; H > H_kv needs enable_gqa.

    Under torch.use_deterministic_algorithms the backward pass repeats bitwise; `cudnn` raises.
    """
    if kernel == "fa4":
        return flash_attention_4(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)
    with sdpa_kernel(BACKENDS[kernel], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "sdpa") -> Tensor:
    """`causal_attention` of [B, N, H, D] and 2 x [B, N, H_kv, D]: -> [B, N, H, D]."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return causal_attention(*heads, kernel=kernel, enable_gqa=q.shape[2] > k.shape[2]).transpose(1, 2)


class CausalAttention(nn.Module):
    def __init__(self, kernel: str = "sdpa") -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel = {kernel!r}: must be one of {', '.join(KERNELS)}")
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False) -> Tensor:
        return causal_attention(q, k, v, kernel=self.kernel, enable_gqa=enable_gqa)


# Private functions, because flash-attn-4 has no public backward pass.
@torch.library.custom_op("lighthouse::flash_attention_4", mutates_args=())
def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B, S, H, D] over k and v [B, S, H_kv, D]: the output [B, S, H, D] and, for the
    backward pass, logarithms of the sums of weights, fp32 [B, H, S]."""
    with torch.cuda.device_of(q):
        out, lse, *_ = import_module(_FA4)._flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, lse


@flash_attention_4.register_fake
def _(q, k, v):
    batch, seq_len, n_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, n_heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("lighthouse::flash_attention_4_backward", mutates_args=())
def _flash_attention_4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.device_of(q):
        return import_module(_FA4)._flash_attn_bwd(q, k, v, out, grad, lse, causal=True, deterministic=deterministic)


@_flash_attention_4_backward.register_fake
def _(grad, q, k, v, out, lse):
    return tuple(map(torch.empty_like, (q, k, v)))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    return _flash_attention_4_backward(grad, *ctx.saved_tensors)


flash_attention_4.register_autograd(_backward, setup_context=_save)
