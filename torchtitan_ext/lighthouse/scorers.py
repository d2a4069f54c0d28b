"""Scorers: one query score and one key score per token and KV head, without parameters (paper, section 3).

With grouped queries a KV head's score is the largest of its group. No score carries a gradient.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import dense_attention

LOG_GATE = math.log(0.5) / 16
"""Log of `gla`'s decay per token: log(sigmoid(0)) / 16, in every head."""

_GLA_CHUNK = 128  # tokens; near head_dim, where chunks' pairs and states take equal memory
_HAS_FLA = find_spec("fla") is not None


def accumulator(x: Tensor) -> torch.dtype:
    """Dtype of sums over `x`: fp64 for fp64, else fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def norm_scores(query_rows: Tensor, key_rows: Tensor, n_kv_heads: int) -> Tensor:
    """Largest L2 norm of each group, fp32, of rows [B, N, H or H_kv, D]: [2, B, H_kv, N]."""
    norms = (torch.linalg.vector_norm(x, dim=-1, dtype=accumulator(x)) for x in (query_rows, key_rows))
    return torch.stack([x.unflatten(2, (n_kv_heads, -1)).amax(-1) for x in norms]).transpose(2, 3)


def output_scores(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Norms of the outputs of A(q, k, v) and of A(k, q, v): q [B, N, H, D], k and v [B, N, H_kv, D] -> [2, B, H_kv, N].

    Each query head uses the key and the value of its KV head, all in v's dtype: under autocast q's may be another.
    """
    n_kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    q, k, v = q.to(v.dtype), *(x.to(v.dtype).unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3) for x in (k, v))
    return norm_scores(attend(q, k, v), attend(k, q, v), n_kv_heads)


def chunked_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention under the constant gate: three [B, N, H, D] -> [B, N, H, D], fp32 (fp64).

    Row t is the sum over s <= t of exp(LOG_GATE * (t - s)) * (q_t . k_s) / sqrt(D) * v_s: all pairs within a chunk,
    and a state [D, D] for the chunks before it.
    """
    seq_len, scale = q.shape[1], q.shape[3] ** -0.5
    q, k, v = (
        F.pad(x.to(accumulator(x)), (0, 0, 0, 0, 0, -seq_len % _GLA_CHUNK))
        .unflatten(1, (-1, _GLA_CHUNK))
        .permute(0, 3, 1, 2, 4)  # [B, H, chunks, C, D]
        for x in (q, k, v)
    )
    place = torch.arange(_GLA_CHUNK, device=q.device, dtype=q.dtype).unsqueeze(-1)
    out = (q @ k.mT * torch.exp(LOG_GATE * (place - place.mT)).tril()) @ v
    state = (k * torch.exp(LOG_GATE * (_GLA_CHUNK - 1 - place))).mT @ v  # at each chunk's end
    reach = 1
    while reach < state.shape[2]:  # adds the chunks before it, doubling their number
        decay = math.exp(LOG_GATE * _GLA_CHUNK * reach)
        state[:, :, reach:] += decay * state[:, :, :-reach]
        reach *= 2
    out[:, :, 1:] += (q[:, :, 1:] * torch.exp(LOG_GATE * (place + 1))) @ state[:, :, :-1]
    return scale * out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :seq_len]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`chunked_linear_attention`, by flash-linear-attention's kernels if installed, on a GPU and in 16 bits; in fp32
    they would multiply in tf32."""
    if _HAS_FLA and q.is_cuda and q.element_size() == 2:
        from fla.ops.simple_gla import chunk_simple_gla

        log_gate = q.new_full(q.shape[2:3], LOG_GATE, dtype=torch.float32)
        return chunk_simple_gla(q, k, v, g_gamma=log_gate, scale=q.shape[3] ** -0.5)[0]
    return chunked_linear_attention(q, k, v)


def dilated_scores(q: Tensor, k: Tensor, v: Tensor, dilation: int, kernel: str) -> Tensor:
    """Norms of causal attention's outputs within each residue class of the positions.

    q [B, N, H, D], k and v [B, N, H_kv, D] -> [2, B, H_kv, N], fp32; N is a multiple of `dilation`.
    """
    # [B * dilation, N / dilation, ...]
    classes = (x.unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    scores = output_scores(partial(dense_attention, kernel=kernel), *classes)
    return scores.unflatten(1, (-1, dilation)).permute(0, 1, 3, 4, 2).flatten(3)


class Scorer(NamedTuple):
    """A way to score tokens."""

    # q [B, N, H, D], k and v [B, N, H_kv, D], dilation, attention kernel -> [2, B, H_kv, N], fp32 (fp64)
    scores: Callable[[Tensor, Tensor, Tensor, int, str], Tensor]
    flops: Callable[[int, int, int], float]  # N, D, dilation -> FLOPs per token and query head
    per_token: bool = False  # uses only a token's own rows: ranks can share a sequence


SCORERS = {
    "norm": Scorer(lambda q, k, *_: norm_scores(q, k, k.shape[2]), lambda *_: 0, per_token=True),
    # two passes: over half of a residue class, or over a state as large as D keys
    "dilated": Scorer(dilated_scores, lambda n, d, dilation: 8 * d * n / dilation / 2),
    "gla": Scorer(lambda q, k, v, *_: output_scores(linear_attention, q, k, v), lambda n, d, _: 8 * d * d),
}


# One operator: no graph break in torch.compile, and one output that activation checkpointing can keep.
@torch.library.custom_op("lighthouse::base_scores", mutates_args=())
def base_scores(q: Tensor, k: Tensor, v: Tensor, scorer: str, dilation: int, kernel: str) -> Tensor:
    """Scores of each token without a gradient; see `Scorer.scores`."""
    with torch.autocast(q.device.type, enabled=False):
        scores = SCORERS[scorer].scores(q, k, v, dilation, kernel)
    expected = f"{(2, k.shape[0], k.shape[2], k.shape[1])}, {accumulator(k)}"
    returned = f"{tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
    if returned != expected:
        raise ValueError(f"scorer {scorer!r} returned {returned}: must return [2, B, H_kv, N] = {expected}")
    return scores.contiguous()


@base_scores.register_fake
def _(q, k, v, scorer, dilation, kernel):
    batch, seq_len, n_kv_heads, _ = k.shape
    return k.new_empty(2, batch, n_kv_heads, seq_len, dtype=accumulator(k))
