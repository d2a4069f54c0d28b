"""Make torch's ring attention use the CPU's kernel, which it doesn't support, when this module is imported."""

from functools import partial

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy, register_op_strategy
from torch.distributed.tensor.experimental._context_parallel import _attention

SEQ_DIM = 2
forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def ring_forward(mesh, q, k, v, dropout_p=0.0, is_causal=False, **kwargs):
    return _attention._templated_ring_attention(
        *(mesh.get_group(), SEQ_DIM, forward, q, k, v, is_causal), dropout_p=dropout_p, **kwargs
    )


def ring_backward(mesh, grad_out, q, k, v, out, logsumexp, dropout_p, is_causal, **kwargs):
    tensors = grad_out, "grad_out", q, k, v, out, logsumexp
    return _attention._templated_ring_attention_backward(
        *(mesh.get_group(), SEQ_DIM, backward, *tensors, is_causal), dropout_p=dropout_p, **kwargs
    )


def dispatch(ring, op, args, kwargs):
    dispatcher = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(op, args, kwargs)
    dispatcher.sharding_propagator.propagate(info)
    results = ring(info.compute_mesh, *info.local_args, **info.local_kwargs)
    return dispatcher.wrap(tuple(results), info.output_sharding.output_spec)


def sharded_sequence(n_outputs, n_inputs, schema):
    placements = [Shard(SEQ_DIM)] * (n_outputs + n_inputs)
    mesh = schema.get_mesh_from_args(validate=False)
    return expand_to_full_mesh_op_strategy(mesh, schema, [placements], input_index=n_outputs)


for op, ring, n_outputs, n_inputs in ((forward, ring_forward, 2, 3), (backward, ring_backward, 3, 6)):
    register_op_strategy(op)(partial(sharded_sequence, n_outputs, n_inputs))
    _attention.custom_ops[op] = partial(dispatch, ring)
