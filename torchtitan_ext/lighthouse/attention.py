"""Lighthouse Attention: pool, select, gather, attend, scatter back (paper, section 3).

Each operator is a plain function of tensors in vectorised torch, for any device and float dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .config import LighthouseConfig

Attention = Callable[..., torch.Tensor]


class Selection(NamedTuple):
    """The gathered entries of each (batch, KV head), in gathered order; all int64.

    Attributes:
        level: [B, H_kv, S], the entry's level, 0 for the base.
        index: [B, H_kv, S], the entry's index in its level; it covers the base positions
            `index * p**level ... (index + 1) * p**level - 1`.
    """

    level: torch.Tensor
    index: torch.Tensor


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_scores(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norms of each token's query and key, [B, N, H, D] and [B, N, H_kv, D] -> 2 x [B, H_kv, N], fp32.

    With grouped queries a KV head's query score is the largest of its group.
    """
    acc, n_kv_heads = _accumulator(q), k.shape[2]
    q_norm = torch.linalg.vector_norm(q, dim=-1, dtype=acc).unflatten(2, (n_kv_heads, -1))
    k_norm = torch.linalg.vector_norm(k, dim=-1, dtype=acc)
    return q_norm.amax(-1).transpose(1, 2), k_norm.transpose(1, 2)


def score(
    q: torch.Tensor, k: torch.Tensor, config: LighthouseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Base-level query and key scores of the configured scorer, each [B, H_kv, N]; no autograd graph.

    Raises:
        NotImplementedError: for a scorer that is not available yet.
    """
    if config.scorer != "norm":
        raise NotImplementedError(
            f"scorer = {config.scorer!r}: not available yet; use scorer = 'norm'"
        )
    with torch.no_grad():
        return norm_scores(q, k)


def _tile_winners(q_score: torch.Tensor, k_score: torch.Tensor, m: int) -> torch.Tensor:
    """Positions of each tile's m winners, ascending: [B, H, T, C] scores -> [B, H, T, m].

    Candidates stand in ascending order, so that a stable sort gives ties to the lower index.
    """
    by_query = q_score.sort(dim=-1, descending=True, stable=True).indices[..., : m // 2]
    won = torch.zeros_like(q_score, dtype=torch.bool).scatter_(-1, by_query, True)
    by_key = k_score.sort(dim=-1, descending=True, stable=True).indices
    rest_first = won.gather(-1, by_key).sort(dim=-1, stable=True).indices[..., : m // 2]
    won.scatter_(-1, by_key.gather(-1, rest_first), True)
    # The sequence's first entry always wins, else its first positions could have no contributor.
    first, weakest = won[:, :, 0], by_query[:, :, 0, -1:]
    first.scatter_(-1, weakest, first.gather(-1, weakest) & first[..., :1])
    first[..., 0] = True
    return won.sort(dim=-1, descending=True, stable=True).indices[..., :m]


@torch.no_grad()
def select(q_score: torch.Tensor, k_score: torch.Tensor, config: LighthouseConfig) -> Selection:
    """The coarse-to-fine cascade: base scores, each [B, H_kv, N], to the gathered entries in order.

    Every candidate joins the gathered sequence; winners only decide whose children are candidates.
    Sorting by end, finer first, puts children before their parent.
    """
    batch, heads, _ = q_score.shape
    p, levels, tiles, m = config.pooling_factor, config.levels, config.n_tiles, config.tile_winners
    q_pyramid, k_pyramid = [q_score], [k_score]
    for _ in range(levels - 1):
        for pyramid in (q_pyramid, k_pyramid):
            pyramid.append(pyramid[-1].unflatten(-1, (-1, p)).amax(-1))

    children = torch.arange(p, device=q_score.device)
    candidates = torch.arange(q_pyramid[-1].shape[-1], device=q_score.device)
    candidates = candidates.view(tiles, -1).expand(batch, heads, -1, -1)
    gathered_level, gathered_index = [], []
    for level in reversed(range(levels)):
        gathered_level.append(torch.full_like(candidates, level))
        gathered_index.append(candidates)
        if level == 0:
            break
        q_tile, k_tile = (
            pyramid[level].gather(-1, candidates.flatten(2)).view(candidates.shape)
            for pyramid in (q_pyramid, k_pyramid)
        )
        winners = candidates.gather(-1, _tile_winners(q_tile, k_tile, m))
        candidates = (winners.unsqueeze(-1) * p + children).flatten(-2)

    level, index = torch.cat(gathered_level, -1), torch.cat(gathered_index, -1)
    order = (entry_end(level, index, p) * levels + level).argsort(dim=-1)
    return Selection(level.gather(-1, order).flatten(2), index.gather(-1, order).flatten(2))


def entry_end(level: torch.Tensor, index: torch.Tensor, pooling_factor: int) -> torch.Tensor:
    """Last base position that each entry covers."""
    return (index + 1) * pooling_factor**level - 1


def rotate(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate the adjacent pairs of `x` [..., D] by the complex `freqs_cis`, broadcast to [..., D/2]."""
    acc = _accumulator(x)
    pairs = torch.view_as_complex(x.to(acc).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs_cis.to(pairs.dtype)).flatten(-2).to(x.dtype)


def pool(x: torch.Tensor, config: LighthouseConfig) -> torch.Tensor:
    """Mean over every entry's span, the levels one after another: [B, N, H, D] -> [B, M, H, D]."""
    rows, mean = [x], x.to(_accumulator(x))
    for _ in range(config.levels - 1):
        mean = mean.unflatten(1, (-1, config.pooling_factor)).mean(2)
        rows.append(mean.to(x.dtype))
    return torch.cat(rows, 1)


def _flat_rows(rows: torch.Tensor, n_rows: int, heads_last: bool) -> torch.Tensor:
    """Row numbers `rows` [B, H, S] of a [B, n_rows, H] or [B, H, n_rows] array, flattened."""
    batch, heads, _ = rows.shape
    b = torch.arange(batch, device=rows.device).view(-1, 1, 1)
    h = torch.arange(heads, device=rows.device).view(1, -1, 1)
    return (b * n_rows + rows) * heads + h if heads_last else (b * heads + h) * n_rows + rows


def gather(x: torch.Tensor, selection: Selection, config: LighthouseConfig) -> torch.Tensor:
    """The selected entries' means: [B, N, H, D] -> [B, H, S, D]; H is a multiple of the KV heads."""
    offsets = torch.tensor(config.level_offsets(x.shape[1]), device=x.device)
    rows = offsets[selection.level] + selection.index
    rows = rows.repeat_interleave(x.shape[2] // rows.shape[1], 1)
    pyramid = pool(x, config)
    flat = _flat_rows(rows, pyramid.shape[1], heads_last=True)
    return pyramid.flatten(0, 2).index_select(0, flat.flatten()).view(*rows.shape, -1)


def scatter(
    out: torch.Tensor, selection: Selection, config: LighthouseConfig, seq_len: int
) -> torch.Tensor:
    """Add each entry's output to the positions `end ... end + p**level - 1`: [B, H, S, D] -> [B, N, H, D].

    Read as a gather: position t looks up, at each level, the one entry that can reach it.
    """
    batch, heads, gathered_len, _ = out.shape
    offsets = config.level_offsets(seq_len)
    rows = torch.tensor(offsets, device=out.device)[selection.level] + selection.index
    slots = torch.arange(gathered_len, device=out.device).expand_as(rows)
    slot_of = torch.full((*rows.shape[:2], offsets[-1]), -1, device=out.device)
    slot_of = slot_of.scatter(-1, rows, slots).repeat_interleave(heads // rows.shape[1], 1)

    acc = _accumulator(out)
    padded = torch.cat([out.flatten(0, 2), out.new_zeros(1, out.shape[-1])])
    positions = torch.arange(seq_len, device=out.device)
    total = torch.zeros((), dtype=acc, device=out.device)
    for level in range(config.levels):
        index = (positions + 1) // config.span(level) - 1
        slot = slot_of[..., offsets[level] + index.clamp(min=0)]
        flat = _flat_rows(slot, gathered_len, heads_last=False)
        flat = flat.masked_fill((slot < 0) | (index < 0), len(padded) - 1).transpose(1, 2)
        total = total + padded.index_select(0, flat.flatten()).to(acc)
    return total.to(out.dtype).view(batch, seq_len, heads, -1)


def causal_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
) -> torch.Tensor:
    """The stock kernel, causal: [B, H, S, D] and 2 x [B, H_kv, S, D] -> [B, H, S, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)


def _check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    freqs_cis: torch.Tensor | None,
) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}:"
            " must be [B, N, H, D] and twice [B, N, H_kv, D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads: must be a multiple of {k.shape[2]} KV heads")
    config.check_seq_len(q.shape[1])
    if freqs_cis is not None and (
        freqs_cis.shape[0] < q.shape[1] or freqs_cis.shape[1:] != (q.shape[3] // 2,)
    ):
        raise ValueError(
            f"freqs_cis {tuple(freqs_cis.shape)}: must be complex"
            f" [at least N = {q.shape[1]}, D/2 = {q.shape[3] // 2}]"
        )


def select_entries(q: torch.Tensor, k: torch.Tensor, config: LighthouseConfig) -> Selection:
    """The entries that `lighthouse_attention` gathers for these projections, in gathered order.

    Args:
        q: [B, N, H, D] raw query projections.
        k: [B, N, H_kv, D] raw key projections.
    """
    _check_inputs(q, k, k, config, None)
    return select(*score(q, k, config), config)


def lighthouse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    freqs_cis: torch.Tensor | None = None,
    attention: Attention = causal_sdpa,
) -> torch.Tensor:
    """Hierarchical attention over an adaptively gathered short sequence; for training only.

    With the selection held fixed, output t depends on inputs up to t alone. The selection itself looks
    at whole tiles, the future included: finish training under dense attention.

    Args:
        q: [B, N, H, D] query projections, not rotated; any float dtype.
        k: [B, N, H_kv, D] key projections, not rotated; H is a multiple of H_kv.
        v: [B, N, H_kv, D] value projections.
        config: the layer's settings; they must be legal for N.
        freqs_cis: complex [at least N, D/2] rotary table of adjacent pairs; None for no rotation.
        attention: what attends on the gathered rows, causally: `attention(q, k, v, enable_gqa=...)`
            on [B, H, S, D] and twice [B, H_kv, S, D].

    Returns:
        [B, N, H, D] in q's dtype.

    Raises:
        ValueError: shapes that don't fit each other or the settings; the message says what would be right.
        NotImplementedError: a scorer that is not available yet.
    """
    _check_inputs(q, k, v, config, freqs_cis)
    seq_len = q.shape[1]
    selection = select(*score(q, k, config), config)
    if freqs_cis is not None and config.rope == "base":
        table = freqs_cis[:seq_len].unsqueeze(1)
        q, k = rotate(q, table), rotate(k, table)
    q, k, v = (gather(x, selection, config) for x in (q, k, v))
    if freqs_cis is not None and config.rope == "selected":
        table = freqs_cis[entry_end(*selection, config.pooling_factor)]
        k = rotate(k, table)
        q = rotate(q, table.repeat_interleave(q.shape[1] // k.shape[1], 1))
    out = attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])
    return scatter(out, selection, config, seq_len)


class LighthouseAttention(nn.Module):
    """`lighthouse_attention` as a module without parameters, so that it can stand for an attention layer.

    Args:
        config: the layer's settings.
        attention: what attends on the gathered rows; see `lighthouse_attention`.
    """

    def __init__(self, config: LighthouseConfig, attention: Attention = causal_sdpa) -> None:
        super().__init__()
        self.config = config
        self.attention = attention

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `lighthouse_attention`: [B, N, H, D] and 2 x [B, N, H_kv, D] -> [B, N, H, D]."""
        return lighthouse_attention(
            q, k, v, self.config, freqs_cis=freqs_cis, attention=self.attention
        )
