"""The Triton twins of the layer's operators, as torch.library operators (paper, section 3).

Four kernels. `_score_kernel` reads q and k once and writes every entry's scores; `_select_kernel` runs the
cascade of one tile and writes every entry's slot; `_reduce_kernel` sums each entry's span of a [B, N, H, D]
array into its gathered row; `_spread_kernel` adds the gathered rows back to the positions of their spans.
Reduce and spread are each other's adjoint, so that these two serve the gather (reduce the span that an entry
covers), the scatter (spread to the span that starts at its end) and both backwards. No program writes what
another one does: there are no atomics, no output is filled beforehand, and runs repeat bitwise.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch.autograd import forward_ad

from . import operators
from .config import LighthouseConfig

_MOST_CANDIDATES = 16_384  # of a tile that one program holds; beyond it the torch operator selects
_SCORE_ROWS = 64  # base positions a program of the score kernel reads
# Rows of a span that a program loads before it uses the first, so that enough bytes are in flight; the spread
# kernel loads from rows that few entries have, and keeps more programs on the chip with less.
_REDUCE_AT_ONCE, _SPREAD_AT_ONCE = 16, 4
_NO_ROPE, _ROPE_SELECTED, _ROPE_BASE = 0, 1, 2


@triton.jit
def _row_norm(x, row, ok, d, D):
    """L2 norms of rows of one head, the bits of fp32 [R]: as integers they keep their order, a NaN the greatest."""
    values = tl.load(x + row[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    values = values.to(tl.float32)
    return tl.sqrt_rn(tl.sum(values * values, axis=1)).to(tl.uint32, bitcast=True)


@triton.jit
def _store_levels(out, score, block, N, P: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr):
    """Write R base scores, given as bits, and the maxima over their spans, level after level."""
    offset = 0
    length = N
    for level in tl.static_range(LEVELS):
        if level > 0:
            score = tl.max(tl.reshape(score, (R // P**level, P)), axis=1)
        index = block * (R // P**level) + tl.arange(0, R // P**level)
        tl.store(out + offset + index, score.to(tl.float32, bitcast=True), mask=index < length)
        offset += length
        length = length // P


@triton.jit
def _score_kernel(
    q, k, scores, N, M, n_kv_heads, D, q_stride_b, q_stride_n, k_stride_b, k_stride_n, key_scores,
    GROUP: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of R positions, and of the entries they make, of one KV head."""
    program = tl.program_id(0)
    head = program % n_kv_heads
    block = program // n_kv_heads % tl.cdiv(N, R)
    b = program // n_kv_heads // tl.cdiv(N, R)
    t = block * R + tl.arange(0, R)
    d = tl.arange(0, BLOCK_D)
    ok = t < N
    q_row = b.to(tl.int64) * q_stride_b + t.to(tl.int64) * q_stride_n + head * GROUP * D
    k_row = b.to(tl.int64) * k_stride_b + t.to(tl.int64) * k_stride_n + head * D
    score = _row_norm(q, q_row, ok, d, D)
    for g in range(1, GROUP):
        score = tl.maximum(score, _row_norm(q, q_row + g * D, ok, d, D))
    out = scores + (b * n_kv_heads + head).to(tl.int64) * M
    _store_levels(out, score, block, N, P, LEVELS, R)
    _store_levels(out + key_scores, _row_norm(k, k_row, ok, d, D), block, N, P, LEVELS, R)


@triton.jit
def _sortable(score):
    """fp32 scores as uint32 of the same order; -0 equals 0 and every NaN comes first."""
    bits = tl.where(score != score, float("nan"), score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _top(key, eligible, COUNT: tl.constexpr):
    """The COUNT greatest eligible keys, ties to the lower position: (chosen, those that tie for last)."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        enough = tl.sum((eligible & (key >= (threshold | bit))).to(tl.int32)) >= COUNT
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    above = eligible & (key > threshold)
    tied = eligible & (key == threshold)
    fits = tl.cumsum(tied.to(tl.int32)) <= COUNT - tl.sum(above.to(tl.int32))
    return above | (tied & fits), tied & fits


@triton.jit
def _select_kernel(
    scores, slots, scratch, N, M, key_scores, n_kv_heads,
    P: tl.constexpr, LEVELS: tl.constexpr, WINNERS: tl.constexpr, TILES: tl.constexpr, COARSEST: tl.constexpr,
    STARTS_SEQUENCE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cascade of one tile. In `scratch`, for each level: the winners' indices, their ranks among the
    level's candidates, and how many of the first n candidates won."""
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    r = tl.arange(0, BLOCK)
    of_level = 2 * WINNERS + BLOCK + 1
    scratch += tl.program_id(0).to(tl.int64) * (LEVELS * of_level)
    slots += head * M
    scores += head * M

    offset = M
    length = N // P ** (LEVELS - 1)
    for level in tl.static_range(LEVELS - 1, 0, -1):
        winner = scratch + level * of_level
        rank = winner + WINNERS
        won_before = rank + WINNERS
        offset -= length
        if level == LEVELS - 1:
            ok = r < COARSEST
            index = tile * COARSEST + r
        else:
            ok = r < WINNERS * P
            index = tl.load(winner + of_level + r // P, mask=ok, other=0) * P + r % P
        q_key = _sortable(tl.load(scores + offset + index, mask=ok, other=0.0))
        k_key = _sortable(tl.load(scores + key_scores + offset + index, mask=ok, other=0.0))
        by_query, weakest = _top(q_key, ok, WINNERS // 2)
        by_key, _ = _top(k_key, ok & ~by_query, WINNERS // 2)
        won = by_query | by_key
        if STARTS_SEQUENCE:
            # The sequence's first entry always wins, else its first positions could have no contributor.
            dropped = tl.max(tl.where(weakest, r, -1))
            first_tile = (tile == 0) & (head // n_kv_heads % CHUNKS == 0)
            missing = first_tile & (tl.sum((won & (r == 0)).to(tl.int32)) == 0)
            won = tl.where(missing, (won & (r != dropped)) | (r == 0), won)
        count = tl.cumsum(won.to(tl.int32))
        tl.store(winner + count - 1, index, mask=won)
        tl.store(rank + count - 1, r, mask=won)
        tl.store(won_before + r, count - won.to(tl.int32), mask=ok)
        tl.store(won_before + r + 1, count, mask=ok)
        tl.debug_barrier()
        length = length * P

    # An entry's slot counts what stands before it: at its own level the candidates before it, at each coarser
    # level those before its ancestor, at each finer level the children of the winners before its end.
    first_slot = tile * (COARSEST + (LEVELS - 1) * P * WINNERS)
    offset = M
    length = N // P ** (LEVELS - 1)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        offset -= length
        if level == LEVELS - 1:
            ok = r < COARSEST
            index = tile * COARSEST + r
        else:
            n_entries = COARSEST * P ** (LEVELS - 1 - level)
            for start in range(0, n_entries, BLOCK):
                entry = offset + tile * n_entries + start + r
                tl.store(slots + entry, -1, mask=start + r < n_entries)
            tl.debug_barrier()
            ok = r < WINNERS * P
            index = tl.load(scratch + (level + 1) * of_level + r // P, mask=ok, other=0) * P + r % P
        before = r
        ancestor = r
        for coarser in tl.static_range(level + 1, LEVELS):
            ancestor = tl.load(
                scratch + coarser * of_level + WINNERS + ancestor // P, mask=ok, other=0
            )
            before += ancestor
        candidates = r + 1
        for j in tl.static_range(level):
            won_before = scratch + (level - j) * of_level + 2 * WINNERS
            candidates = P * tl.load(won_before + candidates, mask=ok, other=0)
            before += candidates
        tl.store(slots + offset + index, first_slot + before, mask=ok)
        length = length * P


@triton.jit
def _rotated(
    x, freqs, position, ok, DIRECTION: tl.constexpr, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rotate the adjacent pairs of x [ROWS, BLOCK_D] by the angle of each row's position."""
    d = tl.arange(0, BLOCK_D)
    angle = tl.load(
        freqs + position.to(tl.int64)[:, None] * D + d[None, :],
        mask=ok[:, None] & (d < D)[None, :],
        other=0.0,
    )
    cos, sin = tl.split(tl.reshape(angle, (ROWS, BLOCK_D // 2, 2)))
    real, imag = tl.split(tl.reshape(x, (ROWS, BLOCK_D // 2, 2)))
    sin = sin * DIRECTION
    return tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (ROWS, BLOCK_D))


@triton.jit
def _level_slots(slots, index, N, carried, LEVEL: tl.constexpr, P: tl.constexpr):
    """Slots of entries of a level, -1 outside the sequence but for the last entry before it, which has the slot of
    its level among those that begin at `carried`."""
    length = N
    for _ in tl.static_range(LEVEL):
        slots += length
        length = length // P
    slot = tl.load(slots + index, mask=(index >= 0) & (index < length), other=-1)
    if LEVEL > 0:
        slot = tl.where(index == -1, carried + LEVEL - 1, slot)
    return slot


@triton.jit
def _write_entries(
    total, slot, index, gathered, freqs, stride_s, D, SPAN: tl.constexpr, MEAN: tl.constexpr, ROPE: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the sums over some entries' spans, or their means, to the slots of those that have one."""
    if tl.max(slot) >= 0:  # most of the finer entries have none
        d = tl.arange(0, BLOCK_D)
        y = total.to(tl.float32)
        if MEAN:
            y = y * (1.0 / SPAN)
        if ROPE == 1:
            y = _rotated(y, freqs, (index + 1) * SPAN - 1, slot >= 0, 1, D, ENTRIES, BLOCK_D)
        target = gathered + slot.to(tl.int64)[:, None] * stride_s + d[None, :]
        tl.store(target, y, mask=(slot >= 0)[:, None] & (d < D)[None, :])


@triton.jit
def _entry_rows(slot, gathered, stride_s, D, BLOCK_D: tl.constexpr):
    """Gathered rows of some entries, 0 for those without a slot."""
    d = tl.arange(0, BLOCK_D)
    source = gathered + slot.to(tl.int64)[:, None] * stride_s + d[None, :]
    return tl.load(source, mask=(slot >= 0)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _plus_entries(
    total, y, slot, index, freqs, D, SPAN: tl.constexpr, MEAN: tl.constexpr, ROPE: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_write_entries`: `total` plus what the gathered rows y of some entries contribute."""
    if tl.max(slot) >= 0:
        row = y.to(tl.float32)
        if MEAN:
            row = row * (1.0 / SPAN)
        if ROPE == 1:
            row = _rotated(row, freqs, (index + 1) * SPAN - 1, slot >= 0, -1, D, ENTRIES, BLOCK_D)
        total += row
    return total


@triton.jit
def _slots_below(
    slots, index, N, carried, LEVEL: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr
):
    """Slots of the entries `index` of a level and of all below them: for each level, finest first, a tuple."""
    found = ()
    for level in tl.static_range(LEVEL + 1):
        of_level = ()
        for j in tl.static_range(P ** (LEVEL - level)):
            entry = (index + SHIFT) * P ** (LEVEL - level) - SHIFT + j
            of_level = of_level + (_level_slots(slots, entry, N, carried, level, P),)
        found = found + (of_level,)
    return found


@triton.jit
def _sum_spans(
    x, slots, freqs, gathered, index, N, carried, stride_n, stride_s, D,
    LEVEL: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr, ROPE: tl.constexpr,
    AT_ONCE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over the spans of the entries `index` of a level, fp32 [ENTRIES, BLOCK_D].

    On the way every sum, of this level and of the finer ones, is written to its slot if it has one. Up to
    AT_ONCE rows of a span are loaded before any is used, so that enough bytes are in flight.
    """
    if P**LEVEL > AT_ONCE:
        slot = _level_slots(slots, index, N, carried, LEVEL, P)
        total = tl.zeros((ENTRIES, BLOCK_D), tl.float32)
        for child in range(P):
            total += _sum_spans(
                x, slots, freqs, gathered, (index + SHIFT) * P - SHIFT + child, N, carried, stride_n, stride_s, D,
                LEVEL - 1, P, SHIFT, MEAN, ROPE, AT_ONCE, ENTRIES, BLOCK_D,
            )  # fmt: skip
        _write_entries(
            total, slot, index, gathered, freqs, stride_s, D, P**LEVEL, MEAN, ROPE, ENTRIES, BLOCK_D
        )
    else:
        d = tl.arange(0, BLOCK_D)
        sums = ()
        for j in tl.static_range(P**LEVEL):
            row = (index + SHIFT) * P**LEVEL - SHIFT + j
            ok = (row >= 0) & (row < N)
            source = x + row.to(tl.int64)[:, None] * stride_n + d[None, :]
            y = tl.load(source, mask=ok[:, None] & (d < D)[None, :], other=0.0)
            if ROPE == 2:
                y = _rotated(y.to(tl.float32), freqs, row, ok, 1, D, ENTRIES, BLOCK_D)
            sums = sums + (y,)
        found = _slots_below(slots, index, N, carried, LEVEL, P, SHIFT)
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
                _write_entries(
                    sums[j], found[level][j], (index + SHIFT) * P ** (LEVEL - level) - SHIFT + j,
                    gathered, freqs, stride_s, D, P**level, MEAN, ROPE, ENTRIES, BLOCK_D,
                )  # fmt: skip
        total = sums[0]
    return total


@triton.jit
def _spread_spans(
    total, gathered, slots, freqs, out, index, N, carried, stride_n, stride_s, D,
    LEVEL: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr, ROPE: tl.constexpr,
    AT_ONCE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_sum_spans`: write to each position of the spans of the entries `index` of a level the
    sum of `total`, what the coarser levels contribute, and of the rows that this level and the finer ones do."""
    if P**LEVEL > AT_ONCE:
        slot = _level_slots(slots, index, N, carried, LEVEL, P)
        rows = _entry_rows(slot, gathered, stride_s, D, BLOCK_D)
        total = _plus_entries(
            total, rows, slot, index, freqs, D, P**LEVEL, MEAN, ROPE, ENTRIES, BLOCK_D
        )
        for child in range(P):
            _spread_spans(
                total, gathered, slots, freqs, out, (index + SHIFT) * P - SHIFT + child, N, carried, stride_n, stride_s, D,
                LEVEL - 1, P, SHIFT, MEAN, ROPE, AT_ONCE, ENTRIES, BLOCK_D,
            )  # fmt: skip
    else:
        found = _slots_below(slots, index, N, carried, LEVEL, P, SHIFT)
        rows = ()
        for level in tl.static_range(LEVEL + 1):
            of_level = ()
            for j in tl.static_range(P ** (LEVEL - level)):
                of_level = of_level + (
                    _entry_rows(found[level][j], gathered, stride_s, D, BLOCK_D),
                )
            rows = rows + (of_level,)
        sums = (total,)
        for level in tl.static_range(LEVEL, -1, -1):
            finer = ()
            for j in tl.static_range(P ** (LEVEL - level)):
                entry = (index + SHIFT) * P ** (LEVEL - level) - SHIFT + j
                y = _plus_entries(
                    sums[j],
                    rows[level][j],
                    found[level][j],
                    entry,
                    freqs,
                    D,
                    P**level,
                    MEAN,
                    ROPE,
                    ENTRIES,
                    BLOCK_D,
                )
                if level > 0:
                    for _ in tl.static_range(P):
                        finer = finer + (y,)
                else:
                    finer = finer + (y,)
            sums = finer
        d = tl.arange(0, BLOCK_D)
        for j in tl.static_range(P**LEVEL):
            row = (index + SHIFT) * P**LEVEL - SHIFT + j
            ok = (row >= 0) & (row < N)
            y = sums[j]
            if ROPE == 2:
                y = _rotated(y, freqs, row, ok, -1, D, ENTRIES, BLOCK_D)
            target = out + row.to(tl.int64)[:, None] * stride_n + d[None, :]
            tl.store(target, y, mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def _reduce_kernel(
    x, slots, freqs, gathered, N, n_blocks, n_heads, D, M, S, carried, stride_b, stride_n, first_start, last_start,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr,
    ROPE: tl.constexpr, AT_ONCE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums (or means) over the spans of ENTRIES entries of the coarsest level, of one head, and of all entries
    below them, each written to its slot. With SHIFT = 1 an entry's span starts at its end: the same pyramid,
    standing on the sequence shifted by one.
    """
    head = tl.program_id(0) % n_heads
    block = tl.program_id(0) // n_heads % n_blocks
    b = (tl.program_id(0) // n_heads // n_blocks).to(tl.int64)
    index = block * ENTRIES - SHIFT + tl.arange(0, ENTRIES)
    if ROPE > 0:
        freqs += tl.where(b % CHUNKS == 0, first_start, last_start).to(tl.int64) * D
    _sum_spans(
        x + b * stride_b + head * D, slots + (b * (n_heads // GROUP) + head // GROUP) * M,
        freqs, gathered + (b * S * n_heads + head) * D, index, N, carried, stride_n, n_heads * D, D,
        LEVELS - 1, P, SHIFT, MEAN, ROPE, AT_ONCE, ENTRIES, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _spread_kernel(
    gathered, slots, freqs, out, N, n_blocks, n_heads, D, M, S, carried, stride_b, stride_n, first_start, last_start,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr,
    ROPE: tl.constexpr, AT_ONCE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_reduce_kernel`: every position of the spans of ENTRIES entries of the coarsest level, of
    one head, gets the sum of its entries' rows."""
    head = tl.program_id(0) % n_heads
    block = tl.program_id(0) // n_heads % n_blocks
    b = (tl.program_id(0) // n_heads // n_blocks).to(tl.int64)
    index = block * ENTRIES - SHIFT + tl.arange(0, ENTRIES)
    if ROPE > 0:
        freqs += tl.where(b % CHUNKS == 0, first_start, last_start).to(tl.int64) * D
    _spread_spans(
        tl.zeros((ENTRIES, BLOCK_D), tl.float32), gathered + (b * S * n_heads + head) * D,
        slots + (b * (n_heads // GROUP) + head // GROUP) * M,
        freqs, out + b * stride_b + head * D,
        index, N, carried, stride_n, n_heads * D, D, LEVELS - 1, P, SHIFT, MEAN, ROPE, AT_ONCE, ENTRIES, BLOCK_D,
    )  # fmt: skip


def _launch(kernel, n_programs, x, *args, **settings):
    """Run the kernel on the device of x, its first argument; the current one may be another."""
    with torch.cuda.device_of(x):
        kernel[(n_programs,)](x, *args, **settings)


def _n_entries(seq_len: int, p: int, levels: int) -> int:
    return sum(seq_len // p**level for level in range(levels))


def _rows_of_heads(x: torch.Tensor) -> torch.Tensor:
    """`x` [B, N, H, D] itself where heads stand next to each other in memory, else a copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _cos_and_sin(freqs_cis: torch.Tensor | None) -> torch.Tensor | None:
    """The rotary table as the kernels read it, whatever its layout and precision: fp32 [N, D/2, 2]."""
    if freqs_cis is None:
        return None
    return torch.view_as_real(freqs_cis.to(torch.complex64).contiguous())


def _pair_launch(x, slots, gathered_len, levels, p, shift, carry, starts):
    """Programs and common arguments of the reduce and the spread kernel for heads-last `x` [B, N, H, D]."""
    batch, seq_len, n_heads, head_dim = x.shape
    block_d = triton.next_power_of_2(head_dim)
    entries = max(32 * 8 // block_d, 1)  # one warp, 8 adjacent elements a thread
    n_blocks = triton.cdiv(seq_len // p ** (levels - 1) + shift, entries)
    sizes = (
        seq_len,
        n_blocks,
        n_heads,
        head_dim,
        slots.shape[-1],
        gathered_len,
        gathered_len - (levels - 1) if carry else -levels,  # the latter: none
        x.stride(0),
        x.stride(1),
    )
    constants = {
        "CHUNKS": len(starts),
        "GROUP": n_heads // slots.shape[1],
        "P": p,
        "LEVELS": levels,
        "SHIFT": shift,
        "ENTRIES": entries,
        "BLOCK_D": block_d,
        "num_warps": 1,
    }
    return batch * n_blocks * n_heads, (*sizes, starts[0], starts[-1]), constants


@torch.library.custom_op("lighthouse::score", mutates_args=())
def _score_op(q: torch.Tensor, k: torch.Tensor, levels: int, p: int) -> torch.Tensor:
    q, k = _rows_of_heads(q), _rows_of_heads(k)
    batch, seq_len, n_kv_heads, head_dim = k.shape
    n_entries = _n_entries(seq_len, p, levels)
    scores = q.new_empty(2, batch, n_kv_heads, n_entries, dtype=torch.float32)
    fit = next(n for n in range(levels, 0, -1) if p ** (n - 1) <= _SCORE_ROWS)
    _launch(
        _score_kernel, batch * triton.cdiv(seq_len, _SCORE_ROWS) * n_kv_heads,
        q, k, scores, seq_len, n_entries, n_kv_heads, head_dim, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        scores.stride(0),
        GROUP=q.shape[2] // n_kv_heads, P=p, LEVELS=fit, R=_SCORE_ROWS, BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    for level in range(fit, levels):
        start, length = _n_entries(seq_len, p, level), seq_len // p**level
        finer = scores[..., start - length * p : start].unflatten(-1, (length, p))
        torch.amax(finer, -1, out=scores[..., start : start + length])
    return scores


@_score_op.register_fake
def _(q, k, levels, p):
    batch, seq_len, n_kv_heads, _ = k.shape
    return q.new_empty(2, batch, n_kv_heads, _n_entries(seq_len, p, levels), dtype=torch.float32)


@torch.library.custom_op("lighthouse::select", mutates_args=())
def _select_op(
    scores: torch.Tensor, seq_len: int, levels: int, p: int, top_k: int, tile_winners: int,
    starts: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    scores = scores.contiguous()
    _, batch, n_kv_heads, n_entries = scores.shape
    tiles = top_k // tile_winners
    coarsest = seq_len // p ** (levels - 1) // tiles
    block = triton.next_power_of_2(max(coarsest, tile_winners * p))
    programs = batch * n_kv_heads * tiles
    slots = scores.new_empty(batch, n_kv_heads, n_entries, dtype=torch.int32)
    scratch = slots.new_empty(programs, levels, 2 * tile_winners + block + 1)
    _launch(
        _select_kernel, programs, scores, slots, scratch, seq_len, n_entries, scores.stride(0), n_kv_heads,
        P=p, LEVELS=levels, WINNERS=tile_winners, TILES=tiles, COARSEST=coarsest,
        STARTS_SEQUENCE=starts[0] == 0, CHUNKS=len(starts), BLOCK=block,
        num_warps=min(max(block // 128, 4), 16),
    )  # fmt: skip
    return slots


@_select_op.register_fake
def _(scores, seq_len, levels, p, top_k, tile_winners, starts):
    return scores.new_empty(scores.shape[1:], dtype=torch.int32)


def _empty_rows(x, gathered_len, starts):
    """For what is gathered from x [B, N, H, D]: [batch, H, chunks x S, D], in memory [batch, chunks x S, H, D].

    Not a view, which autograd would not let `attention` change in place."""
    n_rows, n_heads, head_dim = len(starts) * gathered_len, *x.shape[2:]
    return x.new_empty_strided(
        (x.shape[0] // len(starts), n_heads, n_rows, head_dim),
        (n_rows * n_heads * head_dim, head_dim, n_heads * head_dim, 1),
    )


@torch.library.custom_op("lighthouse::reduce", mutates_args=())
def _reduce_op(
    x: torch.Tensor, slots: torch.Tensor, freqs_cis: torch.Tensor | None,
    levels: int, p: int, gathered_len: int, shift: int, mean: bool, rope: int, carry: bool, starts: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    x = _rows_of_heads(x)
    gathered = _empty_rows(x, gathered_len, starts)
    n_programs, sizes, constants = _pair_launch(
        x, slots, gathered_len, levels, p, shift, carry, starts
    )
    _launch(
        _reduce_kernel, n_programs, x, slots, _cos_and_sin(freqs_cis), gathered, *sizes,
        MEAN=mean, ROPE=rope, AT_ONCE=_REDUCE_AT_ONCE, **constants,
    )  # fmt: skip
    return gathered


@_reduce_op.register_fake
def _(x, slots, freqs_cis, levels, p, gathered_len, shift, mean, rope, carry, starts):
    return _empty_rows(x, gathered_len, starts)


@torch.library.custom_op("lighthouse::spread", mutates_args=())
def _spread_op(
    gathered: torch.Tensor, slots: torch.Tensor, freqs_cis: torch.Tensor | None,
    levels: int, p: int, seq_len: int, shift: int, mean: bool, rope: int, carry: bool, starts: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    gathered = gathered.transpose(1, 2).contiguous()
    out = gathered.new_empty(slots.shape[0], seq_len, *gathered.shape[2:])
    gathered_len = gathered.shape[1] // len(starts)
    n_programs, sizes, constants = _pair_launch(
        out, slots, gathered_len, levels, p, shift, carry, starts
    )
    _launch(
        _spread_kernel, n_programs, gathered, slots, _cos_and_sin(freqs_cis), out, *sizes,
        MEAN=mean, ROPE=rope, AT_ONCE=_SPREAD_AT_ONCE, **constants,
    )  # fmt: skip
    return out


@_spread_op.register_fake
def _(gathered, slots, freqs_cis, levels, p, seq_len, shift, mean, rope, carry, starts):
    return gathered.new_empty(slots.shape[0], seq_len, *gathered.shape[1::2])


def _setup(ctx, inputs, output):
    x, slots, freqs_cis, ctx.levels, ctx.p, _, *ctx.settings = inputs
    ctx.save_for_backward(slots, freqs_cis)
    ctx.seq_len = x.shape[1]  # before a reduce
    ctx.gathered_len = x.shape[2] // len(ctx.settings[-1])  # before a spread


def _reduce_backward(ctx, grad):
    geometry = ctx.levels, ctx.p, ctx.seq_len
    return _spread_op(grad, *ctx.saved_tensors, *geometry, *ctx.settings), *[None] * 10


def _spread_backward(ctx, grad):
    geometry = ctx.levels, ctx.p, ctx.gathered_len
    return _reduce_op(grad, *ctx.saved_tensors, *geometry, *ctx.settings), *[None] * 10


_reduce_op.register_autograd(_reduce_backward, setup_context=_setup)
_spread_op.register_autograd(_spread_backward, setup_context=_setup)


def _refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError in forward-mode differentiation, for which custom operators give zeros."""
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "forward-mode differentiation (torch.func.jvp): the Triton operators of Lighthouse"
                " have a backward pass only; use torch.autograd.grad"
            )


def score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> torch.Tensor:
    """See `operators.score`."""
    if config.scorer != "norm":
        return operators.score(q, k, v, config)
    return _score_op(q.detach(), k.detach(), config.levels, config.pooling_factor)


def select(
    scores: torch.Tensor, config: LighthouseConfig, starts: Sequence[int] = (0,)
) -> torch.Tensor:
    """See `operators.select`."""
    seq_len = config.seq_len_of(scores.shape[-1])
    if seq_len // config.span(config.levels - 1) // config.n_tiles > _MOST_CANDIDATES:
        return operators.select(scores, config, starts)
    return _select_op(
        scores,
        seq_len,
        config.levels,
        config.pooling_factor,
        config.top_k,
        config.tile_winners,
        starts,
    )


def gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    freqs_cis: torch.Tensor | None,
    slots: torch.Tensor,
    config: LighthouseConfig,
    starts: Sequence[int] = (0,),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `operators.gather`."""
    _refuse_tangents(q, k, v, freqs_cis)
    geometry = config.levels, config.pooling_factor, config.gathered_len(q.shape[1])
    rope = _NO_ROPE
    if freqs_cis is not None:
        rope = _ROPE_SELECTED if config.rope == "selected" else _ROPE_BASE
    return (
        _reduce_op(q, slots, freqs_cis, *geometry, 0, True, rope, False, starts),
        _reduce_op(k, slots, freqs_cis, *geometry, 0, True, rope, False, starts),
        _reduce_op(v, slots, None, *geometry, 0, True, _NO_ROPE, False, starts),
    )


def scatter(
    out: torch.Tensor,
    slots: torch.Tensor,
    config: LighthouseConfig,
    carry: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `operators.scatter`."""
    _refuse_tangents(out, carry)
    geometry = config.levels, config.pooling_factor, config.seq_len_of(slots.shape[-1])
    starts = (0,)
    if carry is not None:
        out, starts = operators.with_carry(out, carry), starts * carry.shape[1]
    has_carry = carry is not None
    return _spread_op(out, slots, None, *geometry, 1, False, _NO_ROPE, has_carry, starts)
