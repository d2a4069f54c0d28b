"""Ranks that share a sequence compute what one process does, forward and backward.

On a CPU in fp64, and in fp32 where torch's ring attention, which merges in fp32, takes the place of ours; with -m gpu
on two GPUs.
"""

from copy import deepcopy
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import ring_attention  # noqa: F401
from helpers.launches import in_group
from helpers.lighthouse_cases import qkv, rotary_table
from helpers.models import args
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module, prepare_context_parallel_input

from torchtitan_ext.lighthouse import LighthouseConfig, context_parallel, lighthouse_attention
from torchtitan_ext.lighthouse.context_parallel import context_parallel_attention
from torchtitan_ext.lighthouse.kernels import causal_attention
from torchtitan_ext.lighthouse.ulysses import UlyssesAttention, chunk_order
from torchtitan_ext.model import Lighthouse
from torchtitan_ext.model.model import LighthouseSelfAttention

SEQ_LEN = 2048
CONFIGS = {  # and how many query heads share a KV head
    f"{levels} levels, {rope}": (LighthouseConfig(levels, p, 32, tile_winners=2, rope=rope), group)
    for levels, p, rope, group in ((2, 4, "selected", 1), (3, 4, "selected", 2), (4, 4, "base", 1))
}


@cache
def mesh(device="cpu"):
    return init_device_mesh(device, (dist.get_world_size(),))


def shards(x, load_balance):
    """Each rank's part of `x`, [B, N, ...]."""
    order = chunk_order(dist.get_world_size(), load_balance)
    chunks = x.chunk(len(order), 1)
    return torch.cat([chunks[i] for i in order], 1).chunk(dist.get_world_size(), 1)


def compare(config, group, load_balance):
    """Greatest differences between the ranks' outputs and gradients and those of one process."""
    dtype = torch.float64
    n_kv_heads = max(4, dist.get_world_size()) // group
    whole = qkv(SEQ_LEN, batch=2, n_kv_heads=n_kv_heads, group=group, dtype=dtype)
    table = rotary_table(SEQ_LEN, 4, dtype.to_complex())
    weights = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = lighthouse_attention(*whole, config, freqs_cis=table)
    gradients = torch.autograd.grad((expected * weights).sum(), whole)

    def mine(x):
        return shards(x.detach(), load_balance)[dist.get_rank()]

    own = [mine(x).requires_grad_() for x in whole]
    shared = {"mesh": mesh(), "load_balance": load_balance}
    shared["attention"] = UlyssesAttention(causal_attention, mesh(), load_balance)
    attend = partial(context_parallel_attention, config=config, freqs_cis=table, **shared)
    out = attend(*own)
    assert attend(*(x[:0] for x in own)).shape == (0, *out.shape[1:])
    got = torch.autograd.grad((out * mine(weights)).sum(), own)
    pairs = zip((out, *got), (expected, *gradients), strict=True)
    return [(a - mine(b)).abs().max().item() for a, b in pairs]


def layers_agree():
    for config, group in CONFIGS.values():
        for load_balance in (True, False):
            worst = compare(config, group, load_balance)
            assert max(worst) < 1e-12, (config, load_balance, worst)


def spill_matters():
    config, group = CONFIGS["3 levels, selected"]
    spill = context_parallel._spill
    for load_balance in (True, False):
        with patch.object(context_parallel, "_spill", lambda *args: 0 * spill(*args)):
            without = compare(config, group, load_balance)
        receives = load_balance or dist.get_rank() > 0  # the sequence's first chunk gets nothing
        assert (without[0] > 1e-3) == receives


def positions_are_torchtitans():
    tokens = torch.arange(SEQ_LEN).expand(2, -1)
    for balancer in ("headtail", None):
        inputs, _, extra = prepare_context_parallel_input(tokens, tokens, {}, mesh(), torch.device("cpu"), balancer)
        assert torch.equal(inputs, extra["positions"].long())
        assert torch.equal(inputs, shards(tokens, balancer is not None)[dist.get_rank()])


def modules_agree(device, dtype, backend, bound):
    """The attention module, eager and compiled, through our attention and, for two ranks, torch's ring."""
    lighthouse = Lighthouse(enable=True, top_k=32, tile_winners=2)
    n_heads = max(4, dist.get_world_size())
    model_args = args(dim=256, n_heads=n_heads, n_kv_heads=2, lighthouse=lighthouse)
    rank, dim, seq_len = dist.get_rank(), model_args.dim, SEQ_LEN
    g = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(1, seq_len, dim, generator=g).to(device, dtype) for _ in range(2))
    table = rotary_table(seq_len, dim // model_args.n_heads, torch.complex64).to(device)
    torch.manual_seed(0)
    one = LighthouseSelfAttention(model_args).to(device, dtype)
    # Exact products: in bf16 those of parts round otherwise, and near ties would be selected otherwise.
    for projection in (one.wq, one.wk, one.wv):
        rows = torch.randperm(dim)[: projection.out_features]
        projection.weight.data.copy_(torch.eye(dim)[rows])
    expected = one(x, table, None)
    gradients = torch.autograd.grad((expected * weights).sum(), one.parameters())
    ways = [("headtail", False), (None, False), ("headtail", True)]
    for balancer, ring in ways[: 3 if dist.get_world_size() == 2 else 2]:
        torch._dynamo.reset()
        shared, load_balance = deepcopy(one), balancer is not None
        shared.context_parallel = {"mesh": mesh(device), "load_balance": load_balance}
        if ring:
            apply_cp_to_attention_module([shared.inner_attention], mesh(device), "sdpa")
        else:
            shared.inner_attention = UlyssesAttention(causal_attention, mesh(device), load_balance)
        tokens = torch.zeros(1, seq_len, device=device, dtype=torch.long)
        extra = prepare_context_parallel_input(*(tokens, tokens, {}, mesh(device), torch.device(device), balancer))[2]
        own, own_weights, own_expected = (shards(t.detach(), load_balance)[rank] for t in (x, weights, expected))
        for run in (shared, torch.compile(shared, fullgraph=True, backend=backend)):
            out = run(own, table, None, extra["positions"])
            got = torch.autograd.grad((out * own_weights).sum(), shared.parameters())
            for gradient in got:
                dist.all_reduce(gradient)
            for a, b in zip((out, *got), (own_expected, *gradients), strict=True):
                assert (a - b).abs().max() < bound * b.abs().max(), (balancer, ring, run)


def run_rank(rank):
    layers_agree()
    positions_are_torchtitans()
    if dist.get_world_size() != 4:  # on two and on eight is enough
        spill_matters()
        modules_agree("cpu", torch.float32, "aot_eager", 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes may share two cores with other tests
@pytest.mark.parametrize("n_ranks", [2, 4, pytest.param(8, marks=pytest.mark.eight)])
def test_ranks_that_share_a_sequence(n_ranks):
    in_group(run_rank, n_ranks)


def run_gpu(rank):
    torch.cuda.set_device(rank)
    modules_agree("cuda", torch.bfloat16, "inductor", 3e-2)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_gpus_that_share_a_sequence():
    in_group(run_gpu, 2, backend="nccl")


@pytest.mark.gpu
def test_kernels_run_on_the_device_of_their_inputs():
    config = LighthouseConfig(levels=3, top_k=16, tile_winners=4)

    def run(device):
        inputs = [x.detach().to(device).requires_grad_() for x in qkv(512, dtype=torch.float32)]
        table = rotary_table(512, 4, torch.complex64).to(device)
        out = lighthouse_attention(*inputs, config, freqs_cis=table)
        return [x.cpu() for x in (out, *torch.autograd.grad(out.sin().sum(), inputs))]

    with torch.cuda.device(0):
        assert all(torch.equal(*pair) for pair in zip(run("cuda:0"), run("cuda:1"), strict=True))
