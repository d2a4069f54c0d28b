"""Lighthouse attention over a sequence whose chunks lie on several ranks: the same function as on one.

Tiles end at the chunks' borders, so pooling, scoring and selection are local. The gathered sequence is the gathered
rows of all chunks, in the layout of the sequence. Only the output of a chunk's last entries crosses a border: it
belongs to positions of the next chunk.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .attention import Attention, Rotary, call_attention, checked_inputs, gather, ops_for, select_slots
from .config import LighthouseConfig
from .ulysses import chunk_order, chunks_of_ranks


def check_context_parallel(config: LighthouseConfig, seq_len: int, degree: int, load_balance: bool) -> None:
    """Raise ValueError, with legal values, unless `degree` ranks can share `seq_len` tokens."""
    try:
        config.check_seq_len(seq_len, len(chunk_order(degree, load_balance)))
    except ValueError as error:
        where = f"at a context-parallel degree of {degree}, " if degree > 1 else ""
        powers = (2**i for i in range(degree.bit_length()))  # of 2, which divide the heads of most models
        degrees = [n for n in powers if config.allows(seq_len, len(chunk_order(n, load_balance)))]
        allowed = f"; allowed: context_parallel_degree = {' or '.join(map(str, degrees))}" if degrees else ""
        raise ValueError(f"{where}{error}{allowed}") from None


def _spill(out: Tensor, slots: Tensor, config: LighthouseConfig, n_chunks: int) -> Tensor:
    """Rows of each chunk's last entry of each pooled level, 0 where it has no slot.

    [B, H, chunks x S, D] and slots [B x chunks, H_kv, M] -> [chunks, B, L - 1, H, D].
    """
    n_heads, head_dim = out.shape[1], out.shape[3]
    offsets = config.level_offsets(config.seq_len_of(slots.shape[-1]))
    last = torch.stack([slots[..., end - 1] for end in offsets[2:]], -1)
    last = last.unflatten(0, (-1, n_chunks)).transpose(0, 1)  # [chunks, B, H_kv, L - 1]
    last = last.repeat_interleave(n_heads // last.shape[2], 2).unsqueeze(-1)
    chunks = out.unflatten(2, (n_chunks, -1)).movedim(2, 0)
    rows = chunks.gather(3, last.clamp(min=0).long().expand(*last.shape[:-1], head_dim))
    return rows.masked_fill(last < 0, 0).transpose(2, 3)


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    *,
    mesh: DeviceMesh,
    load_balance: bool,
    attention: Attention,
    freqs_cis: Rotary = None,
) -> Tensor:
    """`lighthouse_attention` of a sequence of N x ranks tokens that the ranks of `mesh` share.

    Each rank passes q [B, N, H, D], k and v [B, N, H_kv, D] of its chunks (see `chunks_of_ranks`), concatenated, and
    gets their output. Arguments, result and errors are those of `lighthouse_attention`, but `config` and `freqs_cis`
    belong to the whole sequence, and `attention` gets this rank's gathered rows and attends causally to all ranks'.

    mesh: the ranks, in one dimension. load_balance: whether a rank holds two chunks, from head and tail, or one.
    """
    degree, rank = mesh.size(), mesh.get_local_rank()
    q, k, freqs_cis = checked_inputs(q, k, v, config, freqs_cis, degree)
    check_context_parallel(config, q.shape[1] * degree, degree, load_balance)
    ops, order = ops_for(q), chunk_order(degree, load_balance)
    chunks = chunks_of_ranks(degree, load_balance)[rank]
    config = replace(config, top_k=config.top_k // len(order))
    batch, per_rank, chunk_len = q.shape[0], len(chunks), q.shape[1] // len(chunks)
    starts = [chunk * chunk_len for chunk in chunks]
    q, k, v = (x.unflatten(1, (per_rank, chunk_len)).flatten(0, 1) for x in (q, k, v))
    slots = select_slots(q, k, v, config, freqs_cis, starts=starts)
    rows = gather(q, k, v, freqs_cis, slots, config, starts)
    out = call_attention(attention, *rows)

    spill = DTensor.from_local(_spill(out, slots, config, per_rank), mesh, [Shard(0)])
    spill = spill.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    # The first chunk takes zeros: a rank that used no row would be missing in backward.
    spill = torch.cat([spill, torch.zeros_like(spill[:1])])
    before = [order.index(chunk - 1) if chunk else -1 for chunk in chunks]
    out = ops.scatter(out, slots, config, torch.stack([spill[i] for i in before], 1))
    return out.unflatten(0, (batch, per_rank)).flatten(1, 2)
