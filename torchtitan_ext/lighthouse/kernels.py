"""The Triton twins of the layer's operators, as torch.library operators (paper, section 3).

Four kernels. `_score_kernel` reads q and k once and writes every entry's scores; `_select_kernel` runs the
cascade of one tile and writes every entry's slot; `_reduce_kernel` sums each entry's span of a [B, N, H, D]
array into its gathered row; `_spread_kernel` adds the gathered rows back to the positions of their spans.
Reduce and spread are each other's adjoint, so that these two serve the gather (reduce the span that an entry
covers), the scatter (spread to the span that starts at its end) and both backwards. No kernel adds to memory
that another program writes: there are no atomics, every element is written once, and runs repeat bitwise.
"""

import torch
import triton
import triton.language as tl

from .config import LighthouseConfig

_ROWS = 64  # base positions a program reads at once; spans beyond it take a second pass
_NO_ROPE, _ROPE_SELECTED, _ROPE_BASE = 0, 1, 2


@triton.jit
def _row_norm(x, row, ok, d, D):
    """L2 norms of rows of one head, fp32 [R]."""
    values = tl.load(x + row[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    values = values.to(tl.float32)
    return tl.sqrt_rn(tl.sum(values * values, axis=1))


@triton.jit
def _store_levels(out, score, block, N, P: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr):
    """Write R base scores and the maxima over their spans, level after level."""
    offset = 0
    length = N
    for level in tl.static_range(LEVELS):
        if level > 0:
            score = tl.max(tl.reshape(score, (R // P**level, P)), axis=1)
        index = block * (R // P**level) + tl.arange(0, R // P**level)
        tl.store(out + offset + index, score, mask=index < length)
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
    scores, slots, scratch, N, M, key_scores,
    P: tl.constexpr, LEVELS: tl.constexpr, WINNERS: tl.constexpr, TILES: tl.constexpr, COARSEST: tl.constexpr,
    BLOCK: tl.constexpr,
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
        # The sequence's first entry always wins, else its first positions could have no contributor.
        dropped = tl.max(tl.where(weakest, r, -1))
        missing = (tile == 0) & (tl.sum((won & (r == 0)).to(tl.int32)) == 0)
        won = (won & ~(missing & (r == dropped))) | (missing & (r == 0))
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
def _reduce_kernel(
    x, slots, freqs, gathered, sums, n_rows, n_blocks, n_entries, n_heads, D, M, S, offset, stride_b, stride_n,
    GROUP: tl.constexpr, P: tl.constexpr, FIRST_LEVEL: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr,
    MEAN: tl.constexpr, ROPE: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums (or means) over the spans that R rows of one head make, each written to its entry's slot.

    The rows are base positions, or in a second pass the sums of level FIRST_LEVEL. With SHIFT = 1 an entry's
    span starts at its end: the same pyramid, standing on the sequence shifted by one.
    """
    program = tl.program_id(0)
    head = program % n_heads
    block = program // n_heads % n_blocks
    b = (program // n_heads // n_blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = block * R - SHIFT + tl.arange(0, R)
    ok = (row >= 0) & (row < n_rows)
    source = x + b * stride_b + row.to(tl.int64)[:, None] * stride_n + head * D + d[None, :]
    total = tl.load(source, mask=ok[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if ROPE == 2:
        total = _rotated(total, freqs, row, ok, 1, D, R, BLOCK_D)
    slots += (b * (n_heads // GROUP) + head // GROUP) * M
    gathered += (b * n_heads + head) * S * D
    length = n_entries
    for i in tl.static_range(LEVELS):
        if i > 0:
            total = tl.sum(tl.reshape(total, (R // P**i, P, BLOCK_D)), axis=1)
        index = block * (R // P**i) - SHIFT + tl.arange(0, R // P**i)
        ok = (index >= 0) & (index < length)
        if i > 0 or FIRST_LEVEL == 0:
            slot = tl.load(slots + offset + index, mask=ok, other=-1)
            y = total
            if MEAN:
                y = y * (1.0 / P ** (FIRST_LEVEL + i))
            if ROPE == 1:
                end = (index + 1) * P ** (FIRST_LEVEL + i) - 1
                y = _rotated(y, freqs, end, slot >= 0, 1, D, R // P**i, BLOCK_D)
            target = gathered + slot.to(tl.int64)[:, None] * D + d[None, :]
            tl.store(target, y, mask=(slot >= 0)[:, None] & (d < D)[None, :])
        if i == LEVELS - 1 and sums is not None:
            target = sums + ((b * length + index)[:, None] * n_heads + head) * D + d[None, :]
            tl.store(target, total, mask=ok[:, None] & (d < D)[None, :])
        offset += length
        length = length // P


@triton.jit
def _spread_kernel(
    gathered, slots, freqs, out, N, n_heads, D, M, S,
    GROUP: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr,
    ROPE: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_reduce_kernel`: R positions of one head, each the sum of its entries' rows."""
    program = tl.program_id(0)
    head = program % n_heads
    block = program // n_heads % tl.cdiv(N, R)
    b = (program // n_heads // tl.cdiv(N, R)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    t = block * R + tl.arange(0, R)
    slots += (b * (n_heads // GROUP) + head // GROUP) * M
    gathered += (b * n_heads + head) * S * D
    total = tl.zeros((R, BLOCK_D), tl.float32)
    offset = 0
    length = N
    for level in tl.static_range(LEVELS):
        index = (t + SHIFT) // P**level - SHIFT
        slot = tl.load(slots + offset + index, mask=(index >= 0) & (t < N), other=-1)
        source = gathered + slot.to(tl.int64)[:, None] * D + d[None, :]
        y = tl.load(source, mask=(slot >= 0)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if MEAN:
            y = y * (1.0 / P**level)
        if ROPE == 1:
            end = (index + 1) * P**level - 1
            y = _rotated(y, freqs, end, slot >= 0, -1, D, R, BLOCK_D)
        total += y
        offset += length
        length = length // P
    if ROPE == 2:
        total = _rotated(total, freqs, t, t < N, -1, D, R, BLOCK_D)
    target = out + ((b * N + t)[:, None] * n_heads + head) * D + d[None, :]
    tl.store(target, total, mask=(t < N)[:, None] & (d < D)[None, :])


def _levels_in(rows: int, pooling_factor: int, levels: int) -> int:
    """Levels, the rows' own included, whose spans fit `rows` rows."""
    fit = 1
    while fit < levels and rows % pooling_factor**fit == 0:
        fit += 1
    return fit


def _n_entries(seq_len: int, p: int, levels: int) -> int:
    return sum(seq_len // p**level for level in range(levels))


def _rows_of_heads(x: torch.Tensor) -> torch.Tensor:
    """`x` [B, N, H, D] itself where heads stand next to each other in memory, else a copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _reduce(x, slots, freqs, levels, p, gathered_len, shift, mean, rope):
    """Run `_reduce_kernel` over [B, N, H, D]: [B, H, S, D]. Spans longer than a program's rows take further
    passes, each on the fp32 sums of the last."""
    x = _rows_of_heads(x)
    batch, _, n_heads, head_dim = x.shape
    gathered = x.new_empty(batch, n_heads, gathered_len, head_dim)
    first, offset = 0, 0
    while True:
        n_rows = x.shape[1]
        fit = _levels_in(_ROWS, p, levels - first)
        sums = None
        if first + fit < levels:
            n_sums = n_rows // p ** (fit - 1)
            sums = x.new_empty(batch, n_sums, n_heads, head_dim, dtype=torch.float32)
        n_blocks = triton.cdiv(n_rows + shift, _ROWS)
        _reduce_kernel[(batch * n_blocks * n_heads,)](
            x, slots, freqs, gathered, sums, n_rows, n_blocks, n_rows, n_heads, head_dim, slots.shape[-1],
            gathered_len, offset, x.stride(0), x.stride(1),
            GROUP=n_heads // slots.shape[1], P=p, FIRST_LEVEL=first, LEVELS=fit, SHIFT=shift, MEAN=mean,
            ROPE=rope if first == 0 or rope != _ROPE_BASE else _NO_ROPE, R=_ROWS, BLOCK_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
        if sums is None:
            return gathered
        offset += _n_entries(n_rows, p, fit - 1)
        first, x = first + fit - 1, sums


def _spread(gathered, slots, freqs, seq_len, levels, p, shift, mean, rope):
    """Run `_spread_kernel` over [B, H, S, D]: [B, N, H, D]."""
    gathered = gathered.contiguous()
    batch, n_heads, gathered_len, head_dim = gathered.shape
    out = gathered.new_empty(batch, seq_len, n_heads, head_dim)
    _spread_kernel[(batch * triton.cdiv(seq_len, _ROWS) * n_heads,)](
        gathered, slots, freqs, out, seq_len, n_heads, head_dim, slots.shape[-1], gathered_len,
        GROUP=n_heads // slots.shape[1], P=p, LEVELS=levels, SHIFT=shift, MEAN=mean, ROPE=rope, R=_ROWS,
        BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return out


@torch.library.custom_op("lighthouse::score", mutates_args=())
def _score_op(q: torch.Tensor, k: torch.Tensor, levels: int, p: int) -> torch.Tensor:
    q, k = _rows_of_heads(q), _rows_of_heads(k)
    batch, seq_len, n_kv_heads, head_dim = k.shape
    n_entries = _n_entries(seq_len, p, levels)
    scores = q.new_empty(2, batch, n_kv_heads, n_entries, dtype=torch.float32)
    fit = _levels_in(_ROWS, p, levels)
    _score_kernel[(batch * triton.cdiv(seq_len, _ROWS) * n_kv_heads,)](
        q, k, scores, seq_len, n_entries, n_kv_heads, head_dim, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        scores.stride(0),
        GROUP=q.shape[2] // n_kv_heads, P=p, LEVELS=fit, R=_ROWS, BLOCK_D=triton.next_power_of_2(head_dim),
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
    scores: torch.Tensor, seq_len: int, levels: int, p: int, top_k: int, tile_winners: int
) -> torch.Tensor:
    scores = scores.contiguous()
    _, batch, n_kv_heads, n_entries = scores.shape
    tiles = top_k // tile_winners
    coarsest = seq_len // p ** (levels - 1) // tiles
    block = triton.next_power_of_2(max(coarsest, tile_winners * p))
    programs = batch * n_kv_heads * tiles
    slots = scores.new_empty(batch, n_kv_heads, n_entries, dtype=torch.int32)
    scratch = slots.new_empty(programs, levels, 2 * tile_winners + block + 1)
    _select_kernel[(programs,)](
        scores, slots, scratch, seq_len, n_entries, scores.stride(0),
        P=p, LEVELS=levels, WINNERS=tile_winners, TILES=tiles, COARSEST=coarsest, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return slots


@_select_op.register_fake
def _(scores, seq_len, levels, p, top_k, tile_winners):
    return scores.new_empty(scores.shape[1:], dtype=torch.int32)


@torch.library.custom_op("lighthouse::reduce", mutates_args=())
def _reduce_op(
    x: torch.Tensor, slots: torch.Tensor, freqs_cis: torch.Tensor | None,
    levels: int, p: int, gathered_len: int, shift: int, mean: bool, rope: int,
) -> torch.Tensor:  # fmt: skip
    freqs = None if freqs_cis is None else torch.view_as_real(freqs_cis)
    return _reduce(x, slots, freqs, levels, p, gathered_len, shift, mean, rope)


@_reduce_op.register_fake
def _(x, slots, freqs_cis, levels, p, gathered_len, shift, mean, rope):
    return x.new_empty(x.shape[0], x.shape[2], gathered_len, x.shape[3])


@torch.library.custom_op("lighthouse::spread", mutates_args=())
def _spread_op(
    gathered: torch.Tensor, slots: torch.Tensor, freqs_cis: torch.Tensor | None,
    seq_len: int, levels: int, p: int, shift: int, mean: bool, rope: int,
) -> torch.Tensor:  # fmt: skip
    freqs = None if freqs_cis is None else torch.view_as_real(freqs_cis)
    return _spread(gathered, slots, freqs, seq_len, levels, p, shift, mean, rope)


@_spread_op.register_fake
def _(gathered, slots, freqs_cis, seq_len, levels, p, shift, mean, rope):
    return gathered.new_empty(gathered.shape[0], seq_len, *gathered.shape[1::2])


def _setup(ctx, inputs, output):
    x, slots, freqs_cis, *ctx.settings = inputs
    ctx.save_for_backward(slots, freqs_cis)
    ctx.length = x.shape[1]  # of the sequence before a reduce
    ctx.gathered_len = x.shape[2]  # of the gathered rows before a spread


def _reduce_backward(ctx, grad):
    slots, freqs_cis = ctx.saved_tensors
    levels, p, _, *rest = ctx.settings
    grad_x = _spread_op(grad, slots, freqs_cis, ctx.length, levels, p, *rest)
    return grad_x, *[None] * 8


def _spread_backward(ctx, grad):
    slots, freqs_cis = ctx.saved_tensors
    _, levels, p, *rest = ctx.settings
    grad_x = _reduce_op(grad, slots, freqs_cis, levels, p, ctx.gathered_len, *rest)
    return grad_x, *[None] * 8


_reduce_op.register_autograd(_reduce_backward, setup_context=_setup)
_spread_op.register_autograd(_spread_backward, setup_context=_setup)


def score(q: torch.Tensor, k: torch.Tensor, config: LighthouseConfig) -> torch.Tensor:
    """See `operators.score`."""
    return _score_op(q.detach(), k.detach(), config.levels, config.pooling_factor)


def select(scores: torch.Tensor, config: LighthouseConfig) -> torch.Tensor:
    """See `operators.select`."""
    return _select_op(
        scores,
        config.seq_len_of(scores.shape[-1]),
        config.levels,
        config.pooling_factor,
        config.top_k,
        config.tile_winners,
    )


def gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    freqs_cis: torch.Tensor | None,
    slots: torch.Tensor,
    config: LighthouseConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `operators.gather`."""
    geometry = config.levels, config.pooling_factor, config.gathered_len(q.shape[1])
    rope = _NO_ROPE
    if freqs_cis is not None:
        rope = _ROPE_SELECTED if config.rope == "selected" else _ROPE_BASE
    return (
        _reduce_op(q, slots, freqs_cis, *geometry, 0, True, rope),
        _reduce_op(k, slots, freqs_cis, *geometry, 0, True, rope),
        _reduce_op(v, slots, None, *geometry, 0, True, _NO_ROPE),
    )


def scatter(out: torch.Tensor, slots: torch.Tensor, config: LighthouseConfig) -> torch.Tensor:
    """See `operators.scatter`."""
    seq_len = config.seq_len_of(slots.shape[-1])
    return _spread_op(
        out, slots, None, seq_len, config.levels, config.pooling_factor, 1, False, _NO_ROPE
    )
