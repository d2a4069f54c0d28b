"""Lighthouse Attention: select, gather, attend, scatter back (paper, section 3)."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from . import torch_ops
from .config import LighthouseConfig
from .kernels import causal_attention
from .torch_ops import Selection, entries, gathered_rows

try:
    from . import triton_ops
except ImportError:  # no Triton on this platform
    triton_ops = None  # type: ignore[assignment]

Attention = Callable[..., Tensor]
Rotary = Tensor | tuple[Tensor, Tensor] | None


def ops_for(x: Tensor) -> ModuleType:
    """The Triton operators where they run, else torch's."""
    return triton_ops if triton_ops and x.is_cuda and x.dtype != torch.float64 else torch_ops


def checked_inputs(
    q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, freqs_cis: Rotary, degree: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and the complex table that rotates their adjacent pairs, on one of `degree` ranks.

    A tuple (cos, sin) rotates channels i and i + D/2. These become adjacent in both q and k, which changes no score and
    no norm. Raises ValueError unless all fit each other and `config`."""
    table = None if isinstance(freqs_cis, tuple) else freqs_cis
    if isinstance(freqs_cis, tuple):
        cos, sin = (x[0] if x.ndim == 3 and len(x) == 1 else x for x in freqs_cis)  # transformers adds a batch of one
        if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != q.shape[-1] or cos.is_complex():
            given = f"{tuple(cos.shape)} and {tuple(sin.shape)} of {cos.dtype}"
            raise ValueError(f"freqs_cis = (cos, sin), {given}: must be two real [at least N, D = {q.shape[-1]}]")
        table = torch.complex(*(x[:, : x.shape[1] // 2].to(torch_ops.accumulator(x)) for x in (cos, sin)))
    fit = q.ndim == 4 and k.shape == v.shape and k.shape == (*q.shape[:2], *k.shape[2:3], q.shape[3])
    if not fit or 0 in (*q.shape[2:], k.shape[2]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be [B, N, H, D]"
            " and twice [B, N, H_kv, D], with H, H_kv and D at least 1"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads: must be a multiple of {k.shape[2]} KV heads")
    seq_len, head_dim = q.shape[1] * degree, q.shape[3]
    config.check_seq_len(seq_len)
    for name, x in (("k", k), ("v", v), ("freqs_cis", table)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} on {x.device}: must be on q's device, {q.device}")
    if table is not None:
        if head_dim % 2:
            raise ValueError(f"head dimension D = {head_dim}: must be even, because freqs_cis rotates pairs")
        if not table.is_complex() or table.shape[1:] != (head_dim // 2,) or table.shape[0] < seq_len:
            given = f"{tuple(table.shape)}, {table.dtype}"
            raise ValueError(f"freqs_cis {given}: must be complex [at least N = {seq_len}, D/2 = {head_dim // 2}]")
        if table.requires_grad:
            raise ValueError("freqs_cis requires a gradient, but gets none: pass freqs_cis.detach()")
    if isinstance(freqs_cis, tuple):
        q, k = (x.unflatten(-1, (2, -1)).mT.flatten(-2) for x in (q, k))
    return q, k, table


@torch.no_grad()
def select_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    freqs_cis: Tensor | None,
    attention: Attention = causal_attention,
    starts: Sequence[int] = (0,),
) -> Tensor:
    """Slots [B, H_kv, M] of the pyramid's entries. With RoPE placement `base`, scorers see rotated q and k.

    The scorer `dilated` attends with the kernel `attention.kernel`, by default torch's choice. Only a `per_token`
    scorer can score chunks of a sequence; `starts` is as in `torch_ops`."""
    ops = ops_for(q)
    if freqs_cis is not None and config.rope == "base" and config.scorer != "norm":  # norms stay as they are
        table = torch.stack([freqs_cis[start : start + q.shape[1]] for start in starts])
        table = table.repeat(q.shape[0] // len(starts), 1, 1).unsqueeze(2)
        q, k = torch_ops.rotate(q, table), torch_ops.rotate(k, table)
    scores = ops.score(q, k, v, config, getattr(attention, "kernel", "sdpa"))
    return ops.select(scores, config, starts)


def call_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on gathered rows: [B, H, S, D] and 2 x [B, H_kv, S, D] -> [B, H, S, D] in q's dtype.

    Raises ValueError if `attention` returns another shape."""
    shape, dtype = q.shape, q.dtype
    # Under dynamic shapes the comparison is not a bool.
    enable_gqa = True if q.shape[1] > k.shape[1] else False  # noqa: SIM210
    out = attention(q, k, v, enable_gqa=enable_gqa)
    returned = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if returned != tuple(shape):
        raise ValueError(f"attention returned {returned}: must return [B, H, S, D] = {tuple(shape)}, as q")
    return out.to(dtype)  # autocast or attention may change it


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs_cis: Tensor | None,
    slots: Tensor,
    config: LighthouseConfig,
    starts: Sequence[int] = (0,),
) -> list[Tensor]:
    """The gathered rows of q, k and v, the first two rotated; see `torch_ops.gather`."""
    tables = ((q, freqs_cis), (k, freqs_cis), (v, None))
    return [ops_for(q).gather(x, slots, config, table, starts) for x, table in tables]


def select_entries(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, *, freqs_cis: Rotary = None) -> Selection:
    """The entries that `lighthouse_attention` gathers for these arguments, in gathered order."""
    q, k, freqs_cis = checked_inputs(q, k, v, config, freqs_cis)
    slots, seq_len = select_slots(q, k, v, config, freqs_cis), q.shape[1]
    return entries(gathered_rows(slots, config.gathered_len(seq_len)), config, seq_len)


def lighthouse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    *,
    freqs_cis: Rotary = None,
    attention: Attention = causal_attention,
) -> Tensor:
    """Hierarchical attention over an adaptively gathered short sequence; for training only.

    For a fixed selection, output t depends only on inputs up to t. The selection itself sees whole tiles, including the
    future: finish training under dense attention.

    Args:
        q: [B, N, H, D] query projections, not rotated; any float dtype.
        k, v: [B, N, H_kv, D] key projections, not rotated, and value projections; H is a multiple of H_kv.
        config: the layer's settings; they must be legal for N.
        freqs_cis: complex [at least N, D/2] rotary table of adjacent pairs, or transformers' (cos, sin), each real
            [at least N, D] or [1, at least N, D], for the pairs i, i + D/2; without a gradient. None for no rotation.
        attention: causal attention on the gathered rows: `attention(q, k, v, enable_gqa=...)` takes [B, H, S, D] and
            twice [B, H_kv, S, D] and returns [B, H, S, D].

    Returns: [B, N, H, D] in q's dtype.

    Raises ValueError, with legal values, for shapes that don't fit each other or the settings, and NotImplementedError
    for forward-mode differentiation on a GPU.
    """
    q, k, freqs_cis = checked_inputs(q, k, v, config, freqs_cis)
    ops = ops_for(q)
    slots = select_slots(q, k, v, config, freqs_cis, attention)
    rows = gather(q, k, v, freqs_cis, slots, config)
    return ops.scatter(call_attention(attention, *rows), slots, config)


class LighthouseAttention(nn.Module):
    """`lighthouse_attention` as a module without parameters."""

    def __init__(self, config: LighthouseConfig, attention: Attention = causal_attention) -> None:
        super().__init__()
        self.config, self.attention = config, attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, freqs_cis: Rotary = None) -> Tensor:
        """[B, N, H, D] and 2 x [B, N, H_kv, D] -> [B, N, H, D]."""
        return lighthouse_attention(q, k, v, self.config, freqs_cis=freqs_cis, attention=self.attention)
