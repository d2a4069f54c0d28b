"""Shapes and inputs shared by the tests of the layer."""

import torch
from hypothesis import assume
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseConfig
from torchtitan_ext.lighthouse.config import SCORERS

SCORES = ("random", "constant", "tied", "clustered", "zero", "infinite", "minus_infinite", "nan")


def adversarial_scores(kind, shape, seed=0):
    """Score arrays that try a selection: ties, zeros, infinities of both signs, clusters, NaN."""
    g = torch.Generator().manual_seed(seed)
    random = torch.rand(shape, generator=g)
    match kind:
        case "random":
            return random
        case "constant":
            return torch.full(shape, 3.0)
        case "tied":
            return torch.randint(0, 3, shape, generator=g).float()
        case "clustered":
            return torch.where(torch.arange(shape[-1]) % shape[-1] < 12, 1.0 + random, random * 1e-6)
        case "zero":
            return torch.zeros(shape)
        case "infinite":
            return torch.where(random < 0.5, torch.inf, random)
        case "minus_infinite":
            return torch.where(random < 0.9, -torch.inf, random)
        case "nan":
            sign = torch.where(random < 0.1, -1.0, 1.0)
            return torch.where(random < 0.2, torch.nan, (random - 0.2) / (random > 0.3)) * sign


def proposals_of(message):
    """What an error of the settings proposes: {field: values, each of which alone should be legal}."""
    fields = [part.rpartition(": ")[2].split(" = ") for part in message.split("; ")[1:]]
    return {field: values.split(" or ") for field, values in fields}


@st.composite
def cases(draw, max_seq_len=256):
    """A legal (config, seq_len) with ragged budgets: tiles at their minimum and well above it."""
    levels = draw(st.integers(2, 4))
    p = draw(st.sampled_from((2, 4, 8)))
    m = draw(st.sampled_from((2, 4, 6, 8)))
    tiles = draw(st.integers(1, 4))
    per_tile = draw(st.integers(m, 4 * m))
    seq_len = per_tile * tiles * p ** (levels - 1)
    config = LighthouseConfig(
        levels=levels,
        pooling_factor=p,
        top_k=m * tiles,
        scorer=draw(st.sampled_from(SCORERS)),
        dilation=draw(st.sampled_from([n for n in (1, 2, 3, 4) if seq_len % n == 0])),
        rope=draw(st.sampled_from(("selected", "base"))),
        tile_winners=m,
    )
    assume(seq_len <= max_seq_len and config.gathered_len(seq_len) < seq_len)
    return config, seq_len


def qkv(seq_len, batch=1, n_kv_heads=1, group=1, head_dim=4, dtype=torch.float64, seed=0, device="cpu"):
    """Random projections that require gradients: q [B, N, H, D], k and v [B, N, H_kv, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(batch, seq_len, heads, head_dim, generator=generator, dtype=dtype, device=device).requires_grad_()
        for heads in (n_kv_heads * group, n_kv_heads, n_kv_heads)
    ]


def rotary_table(seq_len, head_dim, dtype=torch.complex128):
    """A rotary table of adjacent pairs, complex [N, D/2]."""
    freqs = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(seq_len, dtype=torch.float64)[:, None] * freqs
    return torch.polar(torch.ones_like(angles), angles).to(dtype)
