"""Select a tile's entries by counting instead of sorting, in Triton, and write every entry's slot."""

from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Run-time arguments; `key_scores` is the offset from query to key scores.
Sizes = namedtuple("Sizes", "N M n_kv_heads key_scores")


class Spec(NamedTuple):
    """Compile-time constants."""

    p: int
    levels: int
    winners: int
    tiles: int
    coarsest: int  # entries of a tile at the coarsest level
    starts_sequence: bool  # the first chunk is the sequence's first
    chunks: int
    block: int  # candidates that a program holds
    scratch_len: int  # numbers in the scratch of a level, see `_scratch_of`


@triton.jit
def _scratch_of(scratch, LEVEL: tl.constexpr, SPEC: tl.constexpr):
    """Pointers to a level's winners [winners], their ranks among its candidates [winners], and the number of winners
    among its first n candidates [block + 1]."""
    winners = scratch + LEVEL * SPEC.scratch_len
    return winners, winners + SPEC.winners, winners + 2 * SPEC.winners


@triton.jit
def _sortable(score):
    """fp32 scores as uint32 in the same order; -0 equals 0, NaN is greatest."""
    bits = tl.where(score != score, float("nan"), score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _top(key, eligible, COUNT: tl.constexpr):
    """The COUNT greatest eligible keys, ties to the lower position: (chosen, chosen at the threshold)."""
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
def _candidates(scratch, r, tile, LEVEL: tl.constexpr, SPEC: tl.constexpr):
    """Indices of a level's candidates: the tile's entries, or the children of the coarser level's winners."""
    if SPEC.levels - 1 == LEVEL:
        ok = r < SPEC.coarsest
        index = tile * SPEC.coarsest + r
    else:
        ok = r < SPEC.winners * SPEC.p
        parents, _, _ = _scratch_of(scratch, LEVEL + 1, SPEC)
        index = tl.load(parents + r // SPEC.p, mask=ok, other=0) * SPEC.p + r % SPEC.p
    return index, ok


@triton.jit
def _select_kernel(scores, slots, scratch, sizes, SPEC: tl.constexpr):
    """One tile's cascade, coarse to fine, then every entry's slot."""
    LEVELS: tl.constexpr = SPEC.levels
    tile = tl.program_id(0) % SPEC.tiles
    head = (tl.program_id(0) // SPEC.tiles).to(tl.int64)
    r = tl.arange(0, SPEC.block)
    scratch += tl.program_id(0).to(tl.int64) * (LEVELS * SPEC.scratch_len)
    slots += head * sizes.M
    scores += head * sizes.M

    offset = sizes.M
    length = sizes.N // SPEC.p ** (LEVELS - 1)
    for level in tl.static_range(LEVELS - 1, 0, -1):
        winner, rank, won_before = _scratch_of(scratch, level, SPEC)
        offset -= length
        index, ok = _candidates(scratch, r, tile, level, SPEC)
        q_key = _sortable(tl.load(scores + offset + index, mask=ok, other=0.0))
        k_key = _sortable(tl.load(scores + sizes.key_scores + offset + index, mask=ok, other=0.0))
        by_query, weakest = _top(q_key, ok, SPEC.winners // 2)
        by_key, _ = _top(k_key, ok & ~by_query, SPEC.winners // 2)
        won = by_query | by_key
        if SPEC.starts_sequence:
            # The sequence's first entry always wins, or its first positions might get no output.
            dropped = tl.max(tl.where(weakest, r, -1))
            first_tile = (tile == 0) & (head // sizes.n_kv_heads % SPEC.chunks == 0)
            missing = first_tile & (tl.sum((won & (r == 0)).to(tl.int32)) == 0)
            won = tl.where(missing, (won & (r != dropped)) | (r == 0), won)
        count = tl.cumsum(won.to(tl.int32))
        tl.store(winner + count - 1, index, mask=won)
        tl.store(rank + count - 1, r, mask=won)
        tl.store(won_before + r, count - won.to(tl.int32), mask=ok)
        tl.store(won_before + r + 1, count, mask=ok)
        tl.debug_barrier()
        length = length * SPEC.p

    # An entry's slot is the number of rows before it: at its own level the candidates before it, at each coarser
    # level those before its ancestor, at each finer level the children of the winners before its end.
    first_slot = tile * (SPEC.coarsest + (LEVELS - 1) * SPEC.p * SPEC.winners)
    offset = sizes.M
    length = sizes.N // SPEC.p ** (LEVELS - 1)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        offset -= length
        if level < LEVELS - 1:
            n_entries = SPEC.coarsest * SPEC.p ** (LEVELS - 1 - level)
            for start in range(0, n_entries, SPEC.block):
                entry = offset + tile * n_entries + start + r
                tl.store(slots + entry, -1, mask=start + r < n_entries)
            tl.debug_barrier()
        index, ok = _candidates(scratch, r, tile, level, SPEC)
        before = r
        ancestor = r
        for coarser in tl.static_range(level + 1, LEVELS):
            _, rank, _ = _scratch_of(scratch, coarser, SPEC)
            ancestor = tl.load(rank + ancestor // SPEC.p, mask=ok, other=0)
            before += ancestor
        candidates = r + 1
        for j in tl.static_range(level):
            _, _, won_before = _scratch_of(scratch, level - j, SPEC)
            candidates = SPEC.p * tl.load(won_before + candidates, mask=ok, other=0)
            before += candidates
        tl.store(slots + offset + index, first_slot + before, mask=ok)
        length = length * SPEC.p


def select(
    scores: Tensor, seq_len: int, levels: int, p: int, top_k: int, tile_winners: int, starts: Sequence[int]
) -> Tensor:
    """Slots, int32 [B, H_kv, M], of scores [2, B, H_kv, M]."""
    scores = scores.contiguous()
    _, batch, n_kv_heads, n_entries = scores.shape
    tiles = top_k // tile_winners
    coarsest = seq_len // p ** (levels - 1) // tiles
    block = triton.next_power_of_2(max(coarsest, tile_winners * p))
    scratch_len = 2 * tile_winners + block + 1
    spec = Spec(p, levels, tile_winners, tiles, coarsest, starts[0] == 0, len(starts), block, scratch_len)
    n_programs = batch * n_kv_heads * tiles
    slots = scores.new_empty(batch, n_kv_heads, n_entries, dtype=torch.int32)
    scratch = slots.new_empty(n_programs, levels, scratch_len)
    sizes = Sizes(seq_len, n_entries, n_kv_heads, scores.stride(0))
    with torch.cuda.device_of(scores):  # the current device may be another
        _select_kernel[(n_programs,)](scores, slots, scratch, sizes, spec, num_warps=min(max(block // 128, 4), 16))
    return slots
