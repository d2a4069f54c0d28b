"""Ranks that share a sequence compute what one process does, forward and backward.

On a CPU in fp64. train/test_degrees.py does so for a whole model, and train/test_resume.py on two GPUs.
"""

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from helpers.launches import in_group
from helpers.lighthouse_cases import qkv, rotary_table
from torch.distributed.device_mesh import init_device_mesh

from torchtitan_ext.lighthouse import LighthouseConfig, lighthouse_attention
from torchtitan_ext.lighthouse.context_parallel import context_parallel_attention
from torchtitan_ext.lighthouse.kernels import causal_attention
from torchtitan_ext.lighthouse.ulysses import UlyssesAttention, chunk_order

SEQ_LEN = 2048


def layers_agree(rank):
    n_ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n_ranks,))
    table = rotary_table(SEQ_LEN, 4)
    settings = (2, "selected", 1), (3, "selected", 2), (4, "base", 1)
    for (levels, rope, group), load_balance in product(settings, (True, False)):
        config = LighthouseConfig(levels, 4, 32, tile_winners=2, rope=rope)
        order = chunk_order(n_ranks, load_balance)

        def mine(x, order=order):
            chunks = x.detach().chunk(len(order), 1)
            return torch.cat([chunks[i] for i in order], 1).chunk(n_ranks, 1)[rank]

        whole = qkv(SEQ_LEN, batch=2, n_kv_heads=max(4, n_ranks) // group, group=group)
        weights = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = lighthouse_attention(*whole, config, freqs_cis=table)
        gradients = torch.autograd.grad((expected * weights).sum(), whole)

        shared = {"mesh": mesh, "load_balance": load_balance}
        shared["attention"] = UlyssesAttention(causal_attention, mesh, load_balance)
        attend = partial(context_parallel_attention, config=config, freqs_cis=table, **shared)
        own = [mine(x).requires_grad_() for x in whole]
        out = attend(*own)
        assert attend(*(x[:0] for x in own)).shape == (0, *out.shape[1:])
        got = torch.autograd.grad((out * mine(weights)).sum(), own)
        for a, b in zip((out, *got), (expected, *gradients), strict=True):
            assert (a - mine(b)).abs().max() < 1e-12, (config, load_balance)


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes may share two cores with other tests
@pytest.mark.parametrize("n_ranks", [2, 4, pytest.param(8, marks=pytest.mark.eight)])
def test_ranks_that_share_a_sequence(n_ranks):
    in_group(layers_agree, n_ranks)


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
