"""Score, select, gather and scatter in vectorized torch, for any device and float dtype (paper, section 3).

They share two arrays over the pyramid's M entries, level after level: scores [2, B, H_kv, M], query scores then key
scores, and slots [B, H_kv, M], each entry's row in the gathered sequence or -1.

With context parallelism, each of a rank's chunks is an item of the batch with N positions and S gathered rows. `starts`
are the chunks' first positions in the sequence. B counts chunks, except for gathered rows, [batch, H, chunks x S, D].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LighthouseConfig
from .scorers import accumulator, base_scores


class Selection(NamedTuple):
    """The gathered entries of each (batch, KV head), in gathered order; both int64 [B, H_kv, S]."""

    level: Tensor  # 0 for the base
    index: Tensor  # type: ignore[assignment]  # spans positions from index * p**level on; hides tuple.index


def score_pyramid(base: Tensor, config: LighthouseConfig) -> Tensor:
    """Maximum score over every entry's span: [2, B, H_kv, N] -> [2, B, H_kv, M]."""
    levels = [base]
    for _ in range(config.levels - 1):
        levels.append(levels[-1].unflatten(-1, (-1, config.pooling_factor)).amax(-1))
    return torch.cat(levels, -1)


@torch.no_grad()
def score(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, kernel: str = "sdpa") -> Tensor:
    """Scores [2, B, H_kv, M] of the pyramid's entries by `config.scorer`, without a graph."""
    return score_pyramid(base_scores(q, k, v, config.scorer, config.dilation, kernel), config)


def _tile_winners(q_score: Tensor, k_score: Tensor, m: int, starts: Sequence[int]) -> Tensor:
    """Positions of each tile's m winners, ascending: [B, H, T, C] scores -> [B, H, T, m].

    Candidates ascend, so a stable sort gives ties to the lower index.
    """
    by_query = q_score.sort(dim=-1, descending=True, stable=True).indices[..., : m // 2]
    won = torch.zeros_like(q_score, dtype=torch.bool).scatter_(-1, by_query, True)
    by_key = k_score.sort(dim=-1, descending=True, stable=True).indices
    rest_first = won.gather(-1, by_key).sort(dim=-1, stable=True).indices[..., : m // 2]
    won.scatter_(-1, by_key.gather(-1, rest_first), True)
    if starts[0] == 0:
        # The sequence's first entry always wins, or its first positions might get no output.
        first, weakest = won[:: len(starts), :, 0], by_query[:: len(starts), :, 0, -1:]
        first.scatter_(-1, weakest, first.gather(-1, weakest) & first[..., :1])
        first[..., 0] = True
    return won.sort(dim=-1, descending=True, stable=True).indices[..., :m]


def select(scores: Tensor, config: LighthouseConfig, starts: Sequence[int] = (0,)) -> Tensor:
    """The coarse-to-fine cascade: scores [2, B, H_kv, M] -> slots [B, H_kv, M], int32.

    Every candidate is gathered; winners decide whose children are candidates at the next level.
    Sorting by end, finer first, puts children before their parent.
    """
    _, batch, heads, n_entries = scores.shape
    p, levels = config.pooling_factor, config.levels
    offsets = config.level_offsets(config.seq_len_of(n_entries))
    children = torch.arange(p, device=scores.device)
    candidates = torch.arange(offsets[-1] - offsets[-2], device=scores.device)
    candidates = candidates.view(config.n_tiles, -1).expand(batch, heads, -1, -1)
    rows, order = [], []
    for level in reversed(range(levels)):
        rows.append(candidates + offsets[level])
        order.append((candidates + 1) * p**level * levels + level)
        if level == 0:
            break
        tile_rows = rows[-1].flatten(2).expand(2, -1, -1, -1)
        q_score, k_score = scores.gather(-1, tile_rows).view(2, *candidates.shape)
        winners = _tile_winners(q_score, k_score, config.tile_winners, starts)
        winners = candidates.gather(-1, winners)
        candidates = (winners.unsqueeze(-1) * p + children).flatten(-2)
    in_order = torch.cat(order, -1).argsort(dim=-1)
    rows = torch.cat(rows, -1).gather(-1, in_order).flatten(2)
    slots = torch.full((batch, heads, n_entries), -1, dtype=torch.int32, device=scores.device)
    return slots.scatter(-1, rows, torch.arange(rows.shape[-1], device=rows.device, dtype=slots.dtype).expand_as(rows))


def gathered_rows(slots: Tensor, gathered_len: int) -> Tensor:
    """The pyramid row of each gathered row, int64: slots [B, H_kv, M] -> [B, H_kv, S]."""
    target = slots.long().masked_fill(slots < 0, gathered_len)
    rows = torch.arange(slots.shape[-1], device=slots.device).expand_as(target)
    return target.new_empty(*slots.shape[:2], gathered_len + 1).scatter(-1, target, rows)[..., :-1]


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the adjacent pairs of `x` [..., D] by the complex `freqs_cis`, broadcast to [..., D/2]."""
    pairs = torch.complex(*x.to(accumulator(x)).unflatten(-1, (-1, 2)).unbind(-1))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


def pool(x: Tensor, config: LighthouseConfig) -> Tensor:
    """Mean over every entry's span: [B, N, H, D] -> [B, M, H, D]."""
    rows, mean = [x], x.to(accumulator(x))
    for _ in range(config.levels - 1):
        mean = mean.unflatten(1, (-1, config.pooling_factor)).mean(2)
        rows.append(mean.to(x.dtype))
    return torch.cat(rows, 1)


def gather(
    x: Tensor, slots: Tensor, config: LighthouseConfig, freqs_cis: Tensor | None = None, starts: Sequence[int] = (0,)
) -> Tensor:
    """The selected entries' means of q, k or v, rotated with `freqs_cis`: [B, N, H, D] -> [batch, H, chunks x S, D]."""
    n_chunks, seq_len, n_heads = len(starts), *x.shape[1:3]
    rows = gathered_rows(slots, config.gathered_len(seq_len))
    group = n_heads // rows.shape[1]
    if freqs_cis is not None and config.rope == "base":
        table = torch.stack([freqs_cis[start : start + seq_len] for start in starts]).unsqueeze(2)
        x = rotate(x.unflatten(0, (-1, n_chunks)), table).flatten(0, 1)
    b, h = (torch.arange(n, device=x.device) for n in x.shape[::2])
    x = pool(x, config)[b.view(-1, 1, 1), rows.repeat_interleave(group, 1), h.view(-1, 1)]
    if freqs_cis is not None and config.rope == "selected":
        level, index = entries(rows, config, seq_len)
        start = torch.tensor(starts, device=x.device).repeat(x.shape[0] // n_chunks).view(-1, 1, 1)
        table = freqs_cis[start + (index + 1) * config.pooling_factor**level - 1]
        x = rotate(x, table.repeat_interleave(group, 1))
    return x.unflatten(0, (-1, n_chunks)).transpose(1, 2).flatten(2, 3)


def with_carry(out: Tensor, carry: Tensor) -> Tensor:
    """`out` [batch, H, chunks x S, D] with `carry`, as in `scatter`, after the gathered rows of each chunk."""
    out = out.transpose(1, 2).unflatten(1, (carry.shape[1], -1))
    return torch.cat([out, carry], 2).flatten(1, 2).transpose(1, 2)


def scatter(out: Tensor, slots: Tensor, config: LighthouseConfig, carry: Tensor | None = None) -> Tensor:
    """Add each entry's output to the positions `end ... end + p**level - 1`: [B, H, S, D] -> [B, N, H, D].

    Computed as a gather: position t looks up the one entry per level that reaches it. For a chunk's first positions
    that is the previous chunk's last entry. With context parallelism, `carry` [batch, chunks, L - 1, H, D] has those
    entries' rows, level 1 first.
    """
    if carry is not None:
        out = with_carry(out, carry).unflatten(2, (carry.shape[1], -1)).transpose(1, 2).flatten(0, 1)
    batch, heads, n_rows, head_dim = out.shape
    seq_len = config.seq_len_of(slots.shape[-1])
    slots = slots.repeat_interleave(heads // slots.shape[1], 1)
    padded = F.pad(out.flatten(0, 2), (0, 0, 0, 1))
    head = torch.arange(batch * heads, device=out.device).view(batch, heads, 1)
    positions = torch.arange(seq_len, device=out.device)
    total = torch.zeros((), dtype=accumulator(out), device=out.device)
    for level, offset in enumerate(config.level_offsets(seq_len)[:-1]):
        index = (positions + 1) // config.span(level) - 1
        before = n_rows - config.levels + level if carry is not None else -1
        slot = slots[..., offset + index].where(index >= 0, before)
        flat = (head * n_rows + slot).masked_fill(slot < 0, padded.shape[0] - 1).transpose(1, 2)
        total = total + padded.index_select(0, flat.flatten()).to(total.dtype)
    return total.to(out.dtype).view(batch, seq_len, heads, head_dim)


def entries(rows: Tensor, config: LighthouseConfig, seq_len: int) -> Selection:
    """Level and index of each pyramid row of `rows`, int64 [...]."""
    offsets = torch.tensor(config.level_offsets(seq_len)[:-1], device=rows.device)
    level = torch.searchsorted(offsets, rows.contiguous(), right=True) - 1
    return Selection(level, rows - offsets[level])
