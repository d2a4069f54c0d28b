"""Shapes and inputs shared by the tests of the layer."""

import torch
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseConfig, torch_ops
from torchtitan_ext.lighthouse.scorers import SCORERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ||x - reference|| / ||reference||, the reference in fp32 or fp64 on the same inputs and selection
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

SCORES = ("random", "clustered", "constant", "tied", "zero", "infinite", "minus_infinite", "nan")


def hard_scores(kind, shape, seed=0):
    """Score arrays that try a selection: ties, zeros and infinities of both signs, clusters, NaN."""
    g = torch.Generator().manual_seed(seed)
    random, sign = torch.rand(shape, generator=g), torch.randint(0, 2, shape, generator=g) * 2 - 1
    return {
        "random": random,
        "constant": torch.full(shape, 3.0),
        "tied": torch.randint(0, 3, shape, generator=g).float(),
        "clustered": torch.where(torch.arange(shape[-1]) < 12, 1.0 + random, random * 1e-6),
        "zero": 0.0 * sign,
        "infinite": torch.where(random < 0.5, torch.inf, random),
        "minus_infinite": torch.where(random < 0.9, -torch.inf, random),
        "nan": torch.where(random < 0.2, torch.nan, random / (random > 0.3)) * sign,
    }[kind]


def selected(scores, config, starts=(0,), ops=torch_ops):
    """Slots and gathered entries for base scores [2, B, H_kv, N]."""
    slots, seq_len = ops.select(torch_ops.score_pyramid(scores, config), config, starts), scores.shape[-1]
    return slots, torch_ops.entries(torch_ops.gathered_rows(slots, config.gathered_len(seq_len)), config, seq_len)


def pairs(selection, b, h):
    """The entries (level, index) of one head."""
    return list(zip(selection.level[b, h].tolist(), selection.index[b, h].tolist(), strict=True))


def error(x, reference):
    return ((x.detach().cpu() - reference.cpu()).norm() / reference.norm()).item()


def proposals_of(message):
    """What an error of the settings proposes: {field: values, each of which alone should be legal}."""
    fields = [part.rpartition(": ")[2].split(" = ") for part in message.split("; ")[1:]]
    return {field: values.split(" or ") for field, values in fields}


@st.composite
def cases(draw, max_seq_len=256):
    """A legal (config, seq_len) with ragged budgets: tiles at their minimum and well above it."""
    levels = draw(st.integers(2, 4))
    p = draw(st.sampled_from([p for p in (2, 4, 8) if 2 * p ** (levels - 1) <= max_seq_len]))
    span = p ** (levels - 1)
    least = {m: max(m, (levels - 1) * p * m // (span - 1) + 1) for m in (2, 4, 6, 8)}  # a tile's coarsest entries
    m = draw(st.sampled_from([m for m in least if least[m] * span <= max_seq_len]))
    tiles = draw(st.integers(1, min(4, max_seq_len // span // least[m])))
    seq_len = tiles * span * draw(st.integers(least[m], min(4 * m, max_seq_len // span // tiles)))
    scorer, rope = draw(st.sampled_from([*SCORERS])), draw(st.sampled_from(("selected", "base")))
    dilation = draw(st.sampled_from([n for n in (1, 2, 3, 4) if seq_len % n == 0]))
    return LighthouseConfig(levels, p, m * tiles, scorer, dilation, rope, m), seq_len


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
