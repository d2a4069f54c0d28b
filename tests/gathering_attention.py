"""Attention for ranks that share a sequence where torch's ring attention has no kernel: on a CPU.

Importing it puts it in the place of torch's in what this process parallelizes.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.models.llama3.model.model import Attention
from torchtitan.tools.utils import device_type

from torchtitan_ext.lighthouse.attention import causal_sdpa
from torchtitan_ext.lighthouse.context_parallel import chunk_order
from torchtitan_ext.model import train_spec


class GatheringAttention(nn.Module):
    """Causal attention of all ranks' rows, in the sequence's order; keeps this rank's rows."""

    def __init__(self, mesh, load_balance):
        super().__init__()
        self.mesh = mesh
        self.order = chunk_order(mesh.size(), load_balance)

    def forward(self, q, k, v, *, enable_gqa):
        def whole(x):
            ranks = DTensor.from_local(x, self.mesh, [Shard(2)])
            ranks = ranks.redistribute(placements=[Replicate()])
            chunks = ranks.to_local(grad_placements=[Partial()]).chunk(len(self.order), 2)
            return torch.cat([chunks[self.order.index(i)] for i in range(len(chunks))], 2)

        out = causal_sdpa(whole(q), whole(k), whole(v), enable_gqa=enable_gqa)
        chunks = out.chunk(len(self.order), 2)
        out = torch.cat([chunks[i] for i in self.order], 2)
        return out.chunk(self.mesh.size(), 2)[self.mesh.get_local_rank()]


parallelize_llama = train_spec.parallelize_llama


def parallelize(model, parallel_dims, job_config):
    model = parallelize_llama(model, parallel_dims, job_config)
    if parallel_dims.cp_enabled:
        load_balance = job_config.parallelism.context_parallel_load_balancer is not None
        for module in model.modules():
            if isinstance(module, Attention):
                module.inner_attention = GatheringAttention(
                    parallel_dims.get_mesh("cp"), load_balance
                )
    return model


if device_type == "cpu":
    train_spec.parallelize_llama = parallelize
