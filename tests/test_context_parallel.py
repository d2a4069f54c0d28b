"""Ranks that share a sequence compute what one process does, forward and backward.

torch's ring attention has no CPU kernel: an attention that gathers all ranks' rows stands in for it.
"""

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lighthouse_cases import qkv, rotary_table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torchtitan.distributed.context_parallel import prepare_context_parallel_input

from torchtitan_ext.lighthouse import (
    LighthouseConfig,
    context_parallel,
    lighthouse_attention,
)
from torchtitan_ext.lighthouse.attention import causal_sdpa
from torchtitan_ext.lighthouse.context_parallel import chunk_order, context_parallel_attention

SEQ_LEN = 2048
CONFIGS = {
    f"L{levels}-{rope}-{group}": (
        LighthouseConfig(levels=levels, pooling_factor=p, top_k=32, tile_winners=4, rope=rope),
        group,
    )
    for levels, p, rope, group in (
        (2, 4, "selected", 1),
        (3, 4, "base", 2),
        (3, 4, "selected", 2),
        (4, 2, "selected", 1),
        (4, 4, "base", 1),
    )
}


@cache
def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


class GatheringAttention:
    """Causal attention of all ranks' rows, in the sequence's order; keeps this rank's rows."""

    def __init__(self, load_balance):
        order = torch.tensor(chunk_order(dist.get_world_size(), load_balance))
        self.order, self.restore = order, order.argsort()

    def __call__(self, q, k, v, *, enable_gqa):
        def whole(x):
            ranks = DTensor.from_local(x, mesh(), [Shard(2)])
            chunks = ranks.full_tensor(grad_placements=[Partial()]).chunk(len(self.order), 2)
            return torch.cat([chunks[i] for i in self.restore], 2)

        out = causal_sdpa(whole(q), whole(k), whole(v), enable_gqa=enable_gqa)
        chunks = out.chunk(len(self.order), 2)
        out = torch.cat([chunks[i] for i in self.order], 2)
        return out.chunk(dist.get_world_size(), 2)[dist.get_rank()]


def shards(x, load_balance, dim=1):
    """Each rank's part of `x`."""
    order = chunk_order(dist.get_world_size(), load_balance)
    chunks = x.chunk(len(order), dim)
    return torch.cat([chunks[i] for i in order], dim).chunk(dist.get_world_size(), dim)


def compare(config, group, load_balance, dtype=torch.float64):
    """Greatest differences between the ranks' outputs and gradients and those of one process."""
    whole = qkv(SEQ_LEN, batch=2, n_kv_heads=2, group=group, dtype=dtype)
    table = rotary_table(SEQ_LEN, 4, dtype.to_complex())
    weights = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = lighthouse_attention(*whole, config, freqs_cis=table)
    gradients = torch.autograd.grad((expected * weights).sum(), whole)

    def mine(x, dim=1):
        return shards(x.detach(), load_balance, dim)[dist.get_rank()]

    own = [mine(x).requires_grad_() for x in whole]
    out = context_parallel_attention(
        *own,
        config,
        mesh=mesh(),
        load_balance=load_balance,
        attention=GatheringAttention(load_balance),
        freqs_cis=mine(table, 0),
    )
    got = torch.autograd.grad((out * mine(weights)).sum(), own)
    pairs = zip((out, *got), (expected, *gradients), strict=True)
    return [(a - mine(b)).abs().max().item() for a, b in pairs]


def layers_agree():
    for name, (config, group) in CONFIGS.items():
        for load_balance in (True, False):
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
                worst = compare(config, group, load_balance, dtype)
                assert max(worst) < bound, (name, load_balance, dtype, worst)


def spill_matters():
    config, group = CONFIGS["L3-selected-2"]
    context_parallel._spread, kept = lambda *args: 0 * spread(*args), context_parallel._spread
    spread = kept
    outs = compare(config, group, True)
    assert max(outs[0], *outs[1:]) > 1e-3 or dist.get_rank() > 0


def positions_are_torchtitans():
    tokens = torch.arange(SEQ_LEN).expand(2, -1)
    for balancer in ("headtail", None):
        inputs, _, extra = prepare_context_parallel_input(
            tokens, tokens, {}, mesh(), torch.device("cpu"), balancer
        )
        assert torch.equal(inputs, extra["positions"].long())
        assert torch.equal(inputs, shards(tokens, balancer is not None)[dist.get_rank()])


def compiles():
    config, group = CONFIGS["L3-selected-2"]
    own = qkv(SEQ_LEN // dist.get_world_size(), n_kv_heads=2, group=group, dtype=torch.float32)
    table = rotary_table(own[0].shape[1], 4, torch.complex64)
    ranks = mesh()

    def layer(q, k, v):
        return context_parallel_attention(
            *(q, k, v, config),
            mesh=ranks,
            load_balance=True,
            attention=causal_sdpa,
            freqs_cis=table,
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        out = run(*own)
        results.append([out, *torch.autograd.grad(out.square().sum(), own)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def run_rank(rank, n_ranks, store, checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks)
    for check in checks:
        check()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize(
    "check", [layers_agree, spill_matters, positions_are_torchtitans, compiles]
)
def test_ranks(check, n_ranks, tmp_path):
    mp.spawn(run_rank, (n_ranks, tmp_path / "store", [check]), n_ranks)
