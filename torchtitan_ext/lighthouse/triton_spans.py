"""Sums over the spans of a pyramid's entries (reduce) and their adjoint (spread), in Triton (paper, section 3).

Reduce sums each entry's span of a [B, N, H, D] array into its gathered row; spread adds the rows back to the positions
of their spans. They serve the gather (reduce the span that an entry covers, shift 0), the scatter (spread to the span
that starts at its end, shift 1) and both backwards.

A program has a few entries of the coarsest level of one head and all entries below them. No program writes what
another one does, so there are no atomics, and runs repeat bitwise.
"""

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_score import heads_together

# Rows of a span that a program loads before it uses the first, so that enough bytes are in flight. Spread loads
# fewer, because few entries have a row to load: more programs then fit on the chip.
_REDUCE_AT_ONCE, _SPREAD_AT_ONCE = tl.constexpr(16), tl.constexpr(4)


# Run-time arguments.
Sizes = namedtuple("Sizes", "N M S D n_heads n_blocks stride_b stride_n first_start last_start")
# One head's arrays: `rows` [N, D], `gathered` [S, D], `slots` [M] and the rotary `table` [N, D / 2, 2]. `carried` is
# the slot of the entry before a level's first, less the level; negative where it has none.
Head = namedtuple("Head", "rows row_stride gathered gathered_stride slots table N D carried")


class Spec(NamedTuple):
    """Constants that the kernels are compiled for."""

    p: int
    levels: int
    shift: int  # 0 for the gather, which takes means, 1 for the scatter, which takes sums
    rope: str  # "none", or what is rotated: "selected" gathered rows, or all "base" rows
    carry: bool  # whether the last gathered rows are those of the entries before the first
    chunks: int
    group: int
    entries: int
    block_d: int


@triton.jit
def _below(index, j, DEPTH: tl.constexpr, SPEC: tl.constexpr):
    """The j-th entry DEPTH levels below the entries `index`; below level DEPTH that is a position."""
    return (index + SPEC.shift) * SPEC.p**DEPTH - SPEC.shift + j


@triton.jit
def _elements(row, ok, stride, D, SPEC: tl.constexpr):
    """Offsets of the elements of some rows, and which of them exist."""
    d = tl.arange(0, SPEC.block_d)
    return row.to(tl.int64)[:, None] * stride + d[None, :], ok[:, None] & (d < D)[None, :]


@triton.jit
def _zeros(SPEC: tl.constexpr):
    ENTRIES: tl.constexpr = SPEC.entries
    BLOCK_D: tl.constexpr = SPEC.block_d
    return tl.zeros((ENTRIES, BLOCK_D), tl.float32)


@triton.jit
def _rotated(x, position, ok, DIRECTION: tl.constexpr, head, SPEC: tl.constexpr):
    """Rotate the adjacent pairs of x [entries, block_d] by the angle of each row's position."""
    offset, exists = _elements(position, ok, head.D, head.D, SPEC)
    angle = tl.load(head.table + offset, mask=exists, other=0.0)
    cos, sin = tl.split(tl.reshape(angle, (x.shape[0], x.shape[1] // 2, 2)))
    real, imag = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    sin = sin * DIRECTION
    return tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), x.shape)


@triton.jit
def _weighted(y, slot, index, LEVEL: tl.constexpr, DIRECTION: tl.constexpr, head, SPEC: tl.constexpr):
    """Sums over entries' spans as the gathered rows hold them, or back: means, rotated at the entries' ends."""
    y = y.to(tl.float32)
    if SPEC.shift == 0:
        y = y * (1.0 / SPEC.p**LEVEL)
    if SPEC.rope == "selected":
        y = _rotated(y, (index + 1) * SPEC.p**LEVEL - 1, slot >= 0, DIRECTION, head, SPEC)
    return y


@triton.jit
def _slots_of(index, LEVEL: tl.constexpr, head, SPEC: tl.constexpr):
    """Slots of entries of a level, -1 outside the sequence, except for a carried entry before the first."""
    slots = head.slots
    length = head.N
    for _ in tl.static_range(LEVEL):
        slots += length
        length = length // SPEC.p
    slot = tl.load(slots + index, mask=(index >= 0) & (index < length), other=-1)
    if LEVEL > 0:
        slot = tl.where(index == -1, head.carried + LEVEL, slot)
    return slot


@triton.jit
def _slots_below(index, LEVEL: tl.constexpr, head, SPEC: tl.constexpr):
    """Slots of the entries `index` of a level and of all below them: for each level, finest first, a tuple."""
    slots = ()
    for level in tl.static_range(LEVEL + 1):
        per_level = ()
        for j in tl.static_range(SPEC.p ** (LEVEL - level)):
            per_level = per_level + (_slots_of(_below(index, j, LEVEL - level, SPEC), level, head, SPEC),)
        slots = slots + (per_level,)
    return slots


@triton.jit
def _write_entries(total, slot, index, LEVEL: tl.constexpr, head, SPEC: tl.constexpr):
    """Write the sums over some entries' spans, or their means, to the slots of those that have one."""
    if tl.max(slot) >= 0:  # most of the finer entries have none
        y = _weighted(total, slot, index, LEVEL, 1, head, SPEC)
        offset, exists = _elements(slot, slot >= 0, head.gathered_stride, head.D, SPEC)
        tl.store(head.gathered + offset, y, mask=exists)


@triton.jit
def _entry_rows(slot, head, SPEC: tl.constexpr):
    """Gathered rows of some entries, 0 for those without a slot."""
    offset, exists = _elements(slot, slot >= 0, head.gathered_stride, head.D, SPEC)
    return tl.load(head.gathered + offset, mask=exists, other=0.0)


@triton.jit
def _plus_entries(total, y, slot, index, LEVEL: tl.constexpr, head, SPEC: tl.constexpr):
    """The adjoint of `_write_entries`: `total` plus what the gathered rows y of some entries contribute."""
    if tl.max(slot) >= 0:
        total += _weighted(y, slot, index, LEVEL, -1, head, SPEC)
    return total


@triton.jit
def _sum_spans(index, LEVEL: tl.constexpr, head, SPEC: tl.constexpr):
    """Sums over the spans of the entries `index` of a level, fp32 [entries, block_d].

    On the way every sum, of this level and of the finer ones, is written to its slot if it has one.
    """
    P: tl.constexpr = SPEC.p
    if P**LEVEL > _REDUCE_AT_ONCE:
        slot = _slots_of(index, LEVEL, head, SPEC)
        total = _zeros(SPEC)
        for child in range(P):
            total += _sum_spans(_below(index, child, 1, SPEC), LEVEL - 1, head, SPEC)
        _write_entries(total, slot, index, LEVEL, head, SPEC)
    else:
        sums = ()
        for j in tl.static_range(P**LEVEL):
            position = _below(index, j, LEVEL, SPEC)
            ok = (position >= 0) & (position < head.N)
            offset, exists = _elements(position, ok, head.row_stride, head.D, SPEC)
            y = tl.load(head.rows + offset, mask=exists, other=0.0)
            if SPEC.rope == "base":
                y = _rotated(y.to(tl.float32), position, ok, 1, head, SPEC)
            sums = sums + (y,)
        slots = _slots_below(index, LEVEL, head, SPEC)
        for level in tl.static_range(LEVEL + 1):
            if level > 0:
                coarser = ()
                for j in tl.static_range(P ** (LEVEL - level)):
                    total = sums[j * P].to(tl.float32)
                    for child in tl.static_range(1, P):
                        total += sums[j * P + child].to(tl.float32)
                    coarser = coarser + (total,)
                sums = coarser
            for j in tl.static_range(P ** (LEVEL - level)):
                _write_entries(sums[j], slots[level][j], _below(index, j, LEVEL - level, SPEC), level, head, SPEC)
        total = sums[0]
    return total


@triton.jit
def _spread_spans(total, index, LEVEL: tl.constexpr, head, SPEC: tl.constexpr):
    """The adjoint of `_sum_spans`: to each position of the spans of the entries `index` of a level, write the sum of
    `total`, from the coarser levels, and the rows of its entries of this level and below."""
    P: tl.constexpr = SPEC.p
    if P**LEVEL > _SPREAD_AT_ONCE:
        slot = _slots_of(index, LEVEL, head, SPEC)
        total = _plus_entries(total, _entry_rows(slot, head, SPEC), slot, index, LEVEL, head, SPEC)
        for child in range(P):
            _spread_spans(total, _below(index, child, 1, SPEC), LEVEL - 1, head, SPEC)
    else:
        slots = _slots_below(index, LEVEL, head, SPEC)
        rows = ()
        for level in tl.static_range(LEVEL + 1):
            per_level = ()
            for j in tl.static_range(P ** (LEVEL - level)):
                per_level = per_level + (_entry_rows(slots[level][j], head, SPEC),)
            rows = rows + (per_level,)
        sums = (total,)
        for level in tl.static_range(LEVEL, -1, -1):
            finer = ()
            for j in tl.static_range(P ** (LEVEL - level)):
                entry = _below(index, j, LEVEL - level, SPEC)
                y = _plus_entries(sums[j // P], rows[level][j], slots[level][j], entry, level, head, SPEC)
                finer = finer + (y,)
            sums = finer
        for j in tl.static_range(P**LEVEL):
            position = _below(index, j, LEVEL, SPEC)
            ok = (position >= 0) & (position < head.N)
            y = sums[j]
            if SPEC.rope == "base":
                y = _rotated(y, position, ok, -1, head, SPEC)
            offset, exists = _elements(position, ok, head.row_stride, head.D, SPEC)
            tl.store(head.rows + offset, y, mask=exists)


@triton.jit
def _place(rows, slots, freqs, gathered, sizes, SPEC: tl.constexpr):
    """A program's head, and its entries of the coarsest level."""
    head = tl.program_id(0) % sizes.n_heads
    block = tl.program_id(0) // sizes.n_heads % sizes.n_blocks
    b = (tl.program_id(0) // sizes.n_heads // sizes.n_blocks).to(tl.int64)
    rows += b * sizes.stride_b + head * sizes.D
    gathered += (b * sizes.S * sizes.n_heads + head) * sizes.D
    own_slots = slots + (b * (sizes.n_heads // SPEC.group) + head // SPEC.group) * sizes.M
    if SPEC.rope == "none":
        table = slots  # unused: no function returns the None that `freqs` is
    else:
        start = tl.where(b % SPEC.chunks == 0, sizes.first_start, sizes.last_start)
        table = freqs + start.to(tl.int64) * sizes.D
    carried = sizes.S - SPEC.levels if SPEC.carry else -SPEC.levels
    gathered_stride = sizes.n_heads * sizes.D
    arrays = Head(rows, sizes.stride_n, gathered, gathered_stride, own_slots, table, sizes.N, sizes.D, carried)
    return arrays, block * SPEC.entries - SPEC.shift + tl.arange(0, SPEC.entries)


@triton.jit
def _reduce_kernel(x, slots, freqs, gathered, sizes, SPEC: tl.constexpr):
    """Write the sums (or means) over the spans of some entries of one head, and of all below them, to their slots."""
    head, index = _place(x, slots, freqs, gathered, sizes, SPEC)
    _sum_spans(index, SPEC.levels - 1, head, SPEC)


@triton.jit
def _spread_kernel(out, slots, freqs, gathered, sizes, SPEC: tl.constexpr):
    """The adjoint of `_reduce_kernel`: every position of the spans gets the sum of its entries' rows."""
    head, index = _place(out, slots, freqs, gathered, sizes, SPEC)
    _spread_spans(_zeros(SPEC), index, SPEC.levels - 1, head, SPEC)


def _launch(kernel, x, gathered, gathered_len, slots, freqs_cis, levels, p, shift, rope, carry, starts):
    """Run a kernel on x [B, N, H, D] and what is gathered from it, in memory [batch, chunks x S, H, D]."""
    batch, seq_len, n_heads, head_dim = x.shape
    block_d = triton.next_power_of_2(head_dim)
    entries = max(32 * 8 // block_d, 1)  # one warp, 8 adjacent elements per thread
    n_blocks = triton.cdiv(seq_len // p ** (levels - 1) + shift, entries)
    lengths = seq_len, slots.shape[-1], gathered_len, head_dim
    sizes = Sizes(*lengths, n_heads, n_blocks, x.stride(0), x.stride(1), starts[0], starts[-1])
    group = n_heads // slots.shape[1]
    spec = Spec(p, levels, shift, rope, carry, len(starts), group, entries, block_d)
    if freqs_cis is not None:  # as the kernels read it, whatever its layout and precision: fp32 [N, D/2, 2]
        freqs_cis = torch.view_as_real(freqs_cis.to(torch.complex64).contiguous())
    with torch.cuda.device_of(x):  # the current device may be another
        kernel[(batch * n_blocks * n_heads,)](x, slots, freqs_cis, gathered, sizes, spec, num_warps=1)


def empty_rows(x: Tensor, gathered_len: int, n_chunks: int) -> Tensor:
    """For what is gathered from x [B, N, H, D]: [batch, H, chunks x S, D], in memory [batch, chunks x S, H, D].

    Not a view, which autograd would not let `attention` change in place."""
    batch, n_rows, n_heads, head_dim = x.shape[0] // n_chunks, n_chunks * gathered_len, *x.shape[2:]
    shape = batch, n_heads, n_rows, head_dim
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)


def reduce(x, slots, freqs_cis, gathered_len, levels, p, shift, rope, carry, starts):
    """Rows [batch, H, chunks x S, D] of x [B, N, H, D]; `slots`, `freqs_cis` and `starts` are as in `torch_ops`."""
    x = heads_together(x)
    gathered = empty_rows(x, gathered_len, len(starts))
    _launch(_reduce_kernel, x, gathered, gathered_len, slots, freqs_cis, levels, p, shift, rope, carry, starts)
    return gathered


def spread(gathered, slots, freqs_cis, seq_len, levels, p, shift, rope, carry, starts):
    """Positions [B, N, H, D] of rows [batch, H, chunks x S, D]."""
    gathered = gathered.transpose(1, 2).contiguous()
    out = gathered.new_empty(slots.shape[0], seq_len, *gathered.shape[2:])
    gathered_len = gathered.shape[1] // len(starts)
    _launch(_spread_kernel, out, gathered, gathered_len, slots, freqs_cis, levels, p, shift, rope, carry, starts)
    return out
