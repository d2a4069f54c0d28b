"""Scores of a pyramid's entries by the norms of queries and keys, in Triton: q and k are read once."""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # base positions that a program reads

# Run-time arguments (`key_scores`: offset from query to key scores) and compile-time constants.
Sizes = namedtuple("Sizes", "N M D n_kv_heads q_stride_b q_stride_n k_stride_b k_stride_n key_scores")
Spec = namedtuple("Spec", "p levels group rows block_d")


@triton.jit
def _norms(x, row, ok, D, SPEC: tl.constexpr):
    """L2 norms of rows of one head as the bits of fp32 [rows], whose integer order is theirs, NaN greatest."""
    d = tl.arange(0, SPEC.block_d)
    values = tl.load(x + row[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    values = values.to(tl.float32)
    return tl.sqrt_rn(tl.sum(values * values, axis=1)).to(tl.uint32, bitcast=True)


@triton.jit
def _store_levels(out, score, block, N, SPEC: tl.constexpr):
    """Write base scores, given as bits, and the maxima over spans, level after level."""
    LEVELS: tl.constexpr = SPEC.levels
    offset = 0
    length = N
    for level in tl.static_range(LEVELS):
        if level > 0:
            score = tl.max(tl.reshape(score, (SPEC.rows // SPEC.p**level, SPEC.p)), axis=1)
        index = block * (SPEC.rows // SPEC.p**level) + tl.arange(0, SPEC.rows // SPEC.p**level)
        tl.store(out + offset + index, score.to(tl.float32, bitcast=True), mask=index < length)
        offset += length
        length = length // SPEC.p


@triton.jit
def _score_kernel(q, k, scores, sizes, SPEC: tl.constexpr):
    """Scores of SPEC.rows positions of one KV head, and of the entries above them."""
    head = tl.program_id(0) % sizes.n_kv_heads
    n_blocks = tl.cdiv(sizes.N, SPEC.rows)
    block = tl.program_id(0) // sizes.n_kv_heads % n_blocks
    b = tl.program_id(0) // sizes.n_kv_heads // n_blocks
    t = block * SPEC.rows + tl.arange(0, SPEC.rows)
    ok = t < sizes.N
    q_row = b.to(tl.int64) * sizes.q_stride_b + t.to(tl.int64) * sizes.q_stride_n + head * SPEC.group * sizes.D
    k_row = b.to(tl.int64) * sizes.k_stride_b + t.to(tl.int64) * sizes.k_stride_n + head * sizes.D
    score = _norms(q, q_row, ok, sizes.D, SPEC)
    for g in range(1, SPEC.group):
        score = tl.maximum(score, _norms(q, q_row + g * sizes.D, ok, sizes.D, SPEC))
    out = scores + (b * sizes.n_kv_heads + head).to(tl.int64) * sizes.M
    _store_levels(out, score, block, sizes.N, SPEC)
    _store_levels(out + sizes.key_scores, _norms(k, k_row, ok, sizes.D, SPEC), block, sizes.N, SPEC)


def n_entries(seq_len: int, p: int, levels: int) -> int:
    return sum(seq_len // p**level for level in range(levels))


def heads_together(x: Tensor) -> Tensor:
    """`x` [B, N, H, D] if its heads are adjacent in memory, else a copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def score(q: Tensor, k: Tensor, levels: int, p: int) -> Tensor:
    """Scores, fp32 [2, B, H_kv, M], of q [B, N, H, D] and k [B, N, H_kv, D]."""
    q, k = heads_together(q), heads_together(k)
    batch, seq_len, n_kv_heads, head_dim = k.shape
    scores = q.new_empty(2, batch, n_kv_heads, n_entries(seq_len, p, levels), dtype=torch.float32)
    fit = next(n for n in range(levels, 0, -1) if p ** (n - 1) <= _ROWS)
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1), scores.stride(0)
    sizes = Sizes(seq_len, scores.shape[-1], head_dim, n_kv_heads, *strides)
    spec = Spec(p, fit, q.shape[2] // n_kv_heads, _ROWS, triton.next_power_of_2(head_dim))
    grid = (batch * triton.cdiv(seq_len, _ROWS) * n_kv_heads,)
    with torch.cuda.device_of(q):  # the current device may be another
        # Fused multiply-adds depend on the lane: a level's maxima would differ from the scores below.
        _score_kernel[grid](q, k, scores, sizes, spec, enable_fp_fusion=False)
    for level in range(fit, levels):
        start, length = n_entries(seq_len, p, level), seq_len // p**level
        finer = scores[..., start - length * p : start].unflatten(-1, (length, p))
        torch.amax(finer, -1, out=scores[..., start : start + length])
    return scores
