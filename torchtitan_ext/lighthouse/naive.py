"""Reference implementation of the method for the tests: loops and plain indexing."""

import math
from itertools import product

import torch
from torch import Tensor

from .config import LighthouseConfig


def naive_select(q_score: Tensor, k_score: Tensor, config: LighthouseConfig) -> list[tuple[int, int]]:
    """Gathered entries (level, index), in order, of one head's base scores, each [N]."""
    p, m, n_tiles = config.pooling_factor, config.tile_winners, config.n_tiles
    seq_len = len(q_score)

    def score_of(scores: Tensor, level: int, index: int) -> tuple[bool, float]:
        span = scores[index * p**level : (index + 1) * p**level].tolist()
        return max((True, 0.0) if math.isnan(score) else (False, score) for score in span)

    def best(scores: Tensor, level: int, among: list[int]) -> list[int]:
        return sorted(among, key=lambda index: score_of(scores, level, index), reverse=True)[: m // 2]

    entries = []
    coarsest = seq_len // p ** (config.levels - 1)
    for tile in range(n_tiles):
        per_tile = coarsest // n_tiles
        candidates = list(range(tile * per_tile, (tile + 1) * per_tile))
        for level in range(config.levels - 1, -1, -1):
            entries += [(level, index) for index in candidates]
            if level == 0:
                break
            by_query = best(q_score, level, candidates)
            rest = [index for index in candidates if index not in by_query]
            winners = by_query + best(k_score, level, rest)
            if tile == 0 and 0 not in winners:
                winners.remove(by_query[-1])
                winners.append(0)
            candidates = [p * index + child for index in sorted(winners) for child in range(p)]
    return sorted(entries, key=lambda entry: ((entry[1] + 1) * p ** entry[0] - 1, entry[0]))


def naive_scores(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig) -> tuple[Tensor, Tensor]:
    """Query and key scores, each [N], of one KV head: q [N, group, D], k and v [N, D]."""
    if config.scorer == "norm":
        return q.norm(dim=-1).amax(-1), k.norm(dim=-1)

    def output(t: int, queries: Tensor, keys: Tensor) -> Tensor:
        step = {"dilated": config.dilation, "gla": 1}[config.scorer]
        past = torch.arange(t % step, t + 1, step)
        weights = keys[past] @ queries[t] / math.sqrt(q.shape[-1])
        if config.scorer == "dilated":
            weights = torch.softmax(weights, 0)
        else:
            log_gate = math.log(1 / (1 + math.exp(0))) / 16
            weights = weights * torch.exp(log_gate * (t - past).to(q.dtype))
        return weights @ v[past]

    heads = q.unbind(1)
    q_score = [max(output(t, head, k).norm() for head in heads) for t in range(len(k))]
    k_score = [max(output(t, k, head).norm() for head in heads) for t in range(len(k))]
    return torch.stack(q_score), torch.stack(k_score)


def naive_rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rows [..., D], their adjacent pairs rotated by the complex [..., D/2] `angle`."""
    a, b, c = x[..., ::2], x[..., 1::2], angle
    return torch.stack((a * c.real - b * c.imag, a * c.imag + b * c.real), -1).flatten(-2)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, freqs_cis: Tensor | None = None
) -> Tensor:
    """Reference of `lighthouse_attention`: float64 [B, N, H, D] in and out."""
    batch, seq_len, n_heads, head_dim = q.shape
    group, p = n_heads // k.shape[2], config.pooling_factor
    if freqs_cis is not None and config.rope == "base":
        q, k = (naive_rotate(x, freqs_cis[:seq_len, None]) for x in (q, k))

    def means(x: Tensor, entries: list[tuple[int, int]]) -> Tensor:
        return torch.stack([x[index * p**level : (index + 1) * p**level].mean(0) for level, index in entries])

    heads_out = []
    for b, head in product(range(batch), range(n_heads)):
        kv_head = head // group
        group_queries = q[b, :, kv_head * group : (kv_head + 1) * group].detach()
        scores = naive_scores(group_queries, k[b, :, kv_head].detach(), v[b, :, kv_head].detach(), config)
        entries = naive_select(*scores, config)
        ends = [(index + 1) * p**level - 1 for level, index in entries]
        queries, keys = means(q[b, :, head], entries), means(k[b, :, kv_head], entries)
        values = means(v[b, :, kv_head], entries)
        if freqs_cis is not None and config.rope == "selected":
            queries, keys = (naive_rotate(x, freqs_cis[ends]) for x in (queries, keys))
        positions = [torch.zeros(head_dim, dtype=q.dtype) for _ in range(seq_len)]
        for row, (level, _) in enumerate(entries):
            logits = keys[: row + 1] @ queries[row] / math.sqrt(head_dim)
            out = torch.softmax(logits, 0) @ values[: row + 1]
            for t in range(ends[row], min(ends[row] + p**level, seq_len)):
                positions[t] = positions[t] + out
        heads_out.append(torch.stack(positions))
    return torch.stack(heads_out).view(batch, n_heads, seq_len, head_dim).transpose(1, 2)
