"""The Triton twins of `torch_ops`, as torch.library operators (paper, section 3).

The kernels are in `triton_score` (scores of all entries), `triton_select` (the cascade and its order) and
`triton_spans` (reduce and spread, which gather, scatter and take either's gradient).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import torch_ops, triton_score, triton_select, triton_spans
from .config import LighthouseConfig

_MOST_CANDIDATES = 16_384  # of a tile that one program holds; beyond it the torch operator selects

_score_op = torch.library.custom_op("lighthouse::score", triton_score.score, mutates_args=())
_select_op = torch.library.custom_op("lighthouse::select", triton_select.select, mutates_args=())
_SPANS = """(Tensor x, Tensor slots, Tensor? freqs_cis, SymInt length,
    int levels, int p, int shift, str rope, bool carry, SymInt[] starts) -> Tensor"""
_reduce_op = torch.library.custom_op("lighthouse::reduce", triton_spans.reduce, mutates_args=(), schema=_SPANS)
_spread_op = torch.library.custom_op("lighthouse::spread", triton_spans.spread, mutates_args=(), schema=_SPANS)


@_score_op.register_fake
def _(q, k, levels, p):
    batch, seq_len, n_kv_heads, _ = k.shape
    n_entries = triton_score.n_entries(seq_len, p, levels)
    return q.new_empty(2, batch, n_kv_heads, n_entries, dtype=torch.float32)


@_select_op.register_fake
def _(scores, seq_len, levels, p, top_k, tile_winners, starts):
    return scores.new_empty(scores.shape[1:], dtype=torch.int32)


@_reduce_op.register_fake
def _(x, slots, freqs_cis, gathered_len, levels, p, shift, rope, carry, starts):
    return triton_spans.empty_rows(x, gathered_len, len(starts))


@_spread_op.register_fake
def _(gathered, slots, freqs_cis, seq_len, levels, p, shift, rope, carry, starts):
    return gathered.new_empty(slots.shape[0], seq_len, *gathered.shape[1::2])


def _setup(ctx, inputs, output):
    x, slots, freqs_cis, _, *ctx.settings = inputs
    ctx.save_for_backward(slots, freqs_cis)
    ctx.seq_len = x.shape[1]  # before a reduce
    ctx.gathered_len = x.shape[2] // len(ctx.settings[-1])  # before a spread


def _reduce_backward(ctx, grad):
    return _spread_op(grad, *ctx.saved_tensors, ctx.seq_len, *ctx.settings), *[None] * 9


def _spread_backward(ctx, grad):
    return _reduce_op(grad, *ctx.saved_tensors, ctx.gathered_len, *ctx.settings), *[None] * 9


_reduce_op.register_autograd(_reduce_backward, setup_context=_setup)
_spread_op.register_autograd(_spread_backward, setup_context=_setup)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError in forward-mode differentiation, for which custom operators give zeros."""
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            remedy = "the Triton operators of Lighthouse have a backward pass only; use torch.autograd.grad"
            raise NotImplementedError(f"forward-mode differentiation (torch.func.jvp): {remedy}")


def score(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, kernel: str = "sdpa") -> Tensor:
    """See `torch_ops.score`."""
    if config.scorer != "norm":
        return torch_ops.score(q, k, v, config, kernel)
    return _score_op(q.detach(), k.detach(), config.levels, config.pooling_factor)


def select(scores: Tensor, config: LighthouseConfig, starts: Sequence[int] = (0,)) -> Tensor:
    """See `torch_ops.select`."""
    seq_len = config.seq_len_of(scores.shape[-1])
    if seq_len // config.span(config.levels - 1) // config.n_tiles > _MOST_CANDIDATES:
        return torch_ops.select(scores, config, starts)
    return _select_op(scores, seq_len, config.levels, config.pooling_factor, config.top_k, config.tile_winners, starts)


def gather(
    x: Tensor, slots: Tensor, config: LighthouseConfig, freqs_cis: Tensor | None = None, starts: Sequence[int] = (0,)
) -> Tensor:
    """See `torch_ops.gather`."""
    _refuse_tangents(x, freqs_cis)
    geometry = config.gathered_len(x.shape[1]), config.levels, config.pooling_factor, 0
    return _reduce_op(x, slots, freqs_cis, *geometry, "none" if freqs_cis is None else config.rope, False, starts)


def scatter(out: Tensor, slots: Tensor, config: LighthouseConfig, carry: Tensor | None = None) -> Tensor:
    """See `torch_ops.scatter`."""
    _refuse_tangents(out)
    geometry = config.seq_len_of(slots.shape[-1]), config.levels, config.pooling_factor, 1
    starts = [0]
    if carry is not None:
        out, starts = torch_ops.with_carry(out, carry), starts * carry.shape[1]
    return _spread_op(out, slots, None, *geometry, "none", carry is not None, starts)
