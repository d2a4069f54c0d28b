"""Dense causal attention over a sequence whose chunks lie on several ranks.

A rank sends each of its chunks' keys and values, once and as they lie in memory, to the ranks that attend to it.
While those of the others arrive it attends to its own, then to all that came in one call a chunk, and merges the two
by their log-sum-exps. In backward the gradients of what came travel back while those of its own are computed. torch's
ring attention computes the same in a call, a merge and an exchange a rank.
"""

from collections.abc import Iterator
from functools import cache, reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from .attention import _operators_for

aten = torch.ops.aten


def chunks_of_ranks(degree: int, load_balance: bool) -> list[list[int]]:
    """Places in the sequence of the chunks that each of `degree` ranks holds.

    One chunk a rank; with `load_balance` two, one from the sequence's head and its mirror from the tail.
    """
    if not load_balance:
        return [[rank] for rank in range(degree)]
    return [[rank, 2 * degree - 1 - rank] for rank in range(degree)]


def chunk_order(degree: int, load_balance: bool) -> list[int]:
    """The places of `chunks_of_ranks`, rank after rank."""
    return [chunk for chunks in chunks_of_ranks(degree, load_balance) for chunk in chunks]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock kernel: [B, S, H, D] and 2 x [B, S', H_kv, D] -> [B, S, H, D], log-sum-exp [B, H, S]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
        lse = lse.squeeze(-1)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    n_chunks: int = 1,
) -> tuple[torch.Tensor, ...]:
    """What these keys and values add to the gradients, where `out` and `lse` are of all that q attends to.

    Chunks of q become items of the batch: cuDNN divides the work by item, head and keys, and the keys of one chunk
    are too few for a whole GPU.
    """
    grad, q, out = (x.unflatten(1, (n_chunks, -1)).flatten(0, 1) for x in (grad, q, out))
    lse = lse.unflatten(2, (n_chunks, -1)).movedim(2, 1).flatten(0, 1).contiguous()
    k, v = (x.unsqueeze(1).expand(-1, n_chunks, -1, -1, -1).flatten(0, 1) for x in (k, v))
    # contiguous, because cuDNN may refuse an item that is repeated without a copy
    inputs = [x.transpose(1, 2) for x in (grad, q, k.contiguous(), v.contiguous(), out)]
    if q.is_cuda:
        unused = [torch.empty((), dtype=torch.int64, device=q.device)] * 2  # dropout's random state
        lens = (None, None, None, q.shape[1], k.shape[1])
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, lse.unsqueeze(-1), *unused, *lens, 0.0, causal
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, lse, 0.0, causal)
    dq, dk, dv = (x.transpose(1, 2).contiguous().unflatten(0, (-1, n_chunks)) for x in grads)
    return dq.flatten(1, 2), *(reduce(torch.add, x.unbind(1)) for x in (dk, dv))


class _Transfer(NamedTuple):
    """A chunk that one rank sends another: the `place`-th of its own, the `slot`-th of what the other gets."""

    sender: int
    place: int
    receiver: int
    slot: int


def _transfers(held: list[list[int]]) -> Iterator[_Transfer]:
    """What is sent, where each rank holds these chunks: a chunk to all ranks with a later one."""
    for sender, sent in enumerate(held):
        for place, chunk in enumerate(sent):
            for receiver, own in enumerate(held):
                if sender != receiver and chunk < own[-1]:
                    slot = chunk - sum(other < chunk for other in own)
                    yield _Transfer(sender, place, receiver, slot)


class _Layout:
    """Who holds which chunks, and what this rank does with its own and the others'.

    Of the other ranks' chunks it gets those before its own last one, in the sequence's order.
    """

    def __init__(self, n_rows: int, load_balance: bool, rank: int, degree: int):
        held = chunks_of_ranks(degree, load_balance)
        self.chunk_len = n_rows // len(held[rank])
        # Own rows, and how many of those that came they attend to; chunks with nothing between them together.
        self.parts: list[tuple[slice, int]] = []
        for place, chunk in enumerate(held[rank]):
            rows, n_keys = self.rows(place), (chunk - place) * self.chunk_len
            if self.parts and self.parts[-1][1] == n_keys:
                self.parts[-1] = (slice(self.parts[-1][0].start, rows.stop), n_keys)
            elif n_keys:
                self.parts.append((rows, n_keys))
        self.n_received = self.parts[-1][1] if self.parts else 0
        transfers = list(_transfers(held))
        self.sent = [t for t in transfers if t.sender == rank]
        self.n_receivers = [sum(t.place == i for t in self.sent) for i in range(len(held[rank]))]
        self.received = [t for t in transfers if t.receiver == rank]

    def rows(self, place: int) -> slice:
        return slice(place * self.chunk_len, (place + 1) * self.chunk_len)


_layout = cache(_Layout)


def _exchange(
    group: dist.ProcessGroup,
    sends: list[tuple[torch.Tensor, int]],
    gets: list[tuple[torch.Tensor, int]],
) -> list[dist.Work]:
    """Start to send and to receive rows [B, S, H, D], each with the rank they go to or come from."""
    calls = [(dist.isend, *send) for send in sends] + [(dist.irecv, *get) for get in gets]
    # The rows of an item of the batch are one piece of memory.
    pieces = [(call, item, peer) for call, rows, peer in calls for item in rows]
    return dist.batch_isend_irecv(
        [dist.P2POp(call, x, group=group, group_peer=peer) for call, x, peer in pieces]
    )


def _fetch(
    group: dist.ProcessGroup, layout: _Layout, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, list[dist.Work]]:
    """Keys and values of the others, [2, B, n_received, H_kv, D] once the works are done."""
    own = (k.contiguous(), v.contiguous())
    others = k.new_empty(2, k.shape[0], layout.n_received, *k.shape[2:])
    sends = [(x[:, layout.rows(t.place)], t.receiver) for t in layout.sent for x in own]
    gets = [(x[:, layout.rows(t.slot)], t.sender) for t in layout.received for x in others]
    return others, _exchange(group, sends, gets)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _ranks_and_layout(
    q: torch.Tensor, load_balance: bool, group: str
) -> tuple[dist.ProcessGroup, _Layout]:
    ranks = _resolve_process_group(group)  # type: ignore[arg-type]
    return ranks, _layout(q.shape[1], load_balance, ranks.rank(), ranks.size())


@torch.library.custom_op("lighthouse::shared_attention", mutates_args=())
def _attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, load_balance: bool, keep: bool, group: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranks, layout = _ranks_and_layout(q, load_balance, group)
    others, works = _fetch(ranks, layout, k, v)
    out, lse = _forward(q, k, v, True)
    _wait(works)
    k, v = others
    for rows, n in layout.parts:
        more = _forward(q[:, rows], k[:, :n], v[:, :n], False)
        _operators_for(out).merge(out[:, rows], lse[:, :, rows], *more)
    return out, lse, others if keep else others.new_empty(0)


@_attention_op.register_fake
def _attention_fake(q, k, v, load_balance, keep, group):
    accumulated = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulated)
    n_received = _ranks_and_layout(q, load_balance, group)[1].n_received
    others = k.new_empty((2, k.shape[0], n_received, *k.shape[2:]) if keep else 0)
    return q.new_empty(q.shape), lse, others


@torch.library.custom_op("lighthouse::shared_attention_backward", mutates_args=())
def _backward_op(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    others: torch.Tensor,
    load_balance: bool,
    keep: bool,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranks, layout = _ranks_and_layout(q, load_balance, group)
    if not keep:
        others, works = _fetch(ranks, layout, k, v)
        _wait(works)
    other_k, other_v = others
    of_others: list[torch.Tensor] = []
    of_queries: list[tuple[slice, torch.Tensor]] = []
    for rows, n in reversed(layout.parts):  # the last of them reaches all that came
        dq, *of_keys = _backward(
            *(grad[:, rows], q[:, rows], other_k[:, :n], other_v[:, :n]),
            *(out[:, rows], lse[:, :, rows], False, (rows.stop - rows.start) // layout.chunk_len),
        )
        of_queries.append((rows, dq))
        for total, part in zip(of_others, of_keys, strict=False):
            total[:, :n] += part
        of_others = of_others or of_keys

    came = k.new_empty(len(layout.sent), 2, len(k), layout.chunk_len, *k.shape[2:])
    sends = [(x[:, layout.rows(t.slot)], t.sender) for t in layout.received for x in of_others]
    gets = [(x, t.receiver) for pair, t in zip(came, layout.sent, strict=True) for x in pair]
    works = _exchange(ranks, sends, gets)
    dq, dk, dv = _backward(grad, q, k, v, out, lse, True)
    for rows, part in of_queries:
        dq[:, rows] += part
    _wait(works)
    for place, pieces in enumerate(came.split(layout.n_receivers)):
        if len(pieces):
            total = pieces[0] if len(pieces) == 1 else pieces.sum(0)  # in fp32, rounded once
            for target, part in zip((dk, dv), total, strict=True):
                target[:, layout.rows(place)] += part
    return dq, dk, dv


@_backward_op.register_fake
def _backward_fake(grad, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    *qkv, ctx.load_balance, ctx.keep, ctx.group = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(*output[1:])


def _of_op(ctx, grad, *_):
    settings = (ctx.load_balance, ctx.keep, ctx.group)
    return *_backward_op(grad, *ctx.saved_tensors, *settings), None, None, None


_attention_op.register_autograd(_of_op, setup_context=_setup)


class SharedAttention(nn.Module):
    """Causal attention of a sequence that the ranks of `mesh` share, each of which calls it with its rows.

    On CUDA devices it needs cuDNN's attention, which takes bfloat16 and float16.

    Args:
        mesh: the ranks, in one dimension.
        load_balance: whether a rank holds two chunks, from head and tail, or one; see `chunks_of_ranks`.
        keep: keep what came from other ranks for the backward pass, up to S x ranks rows of k and v, in place of
            fetching it again.
    """

    def __init__(self, mesh: DeviceMesh, load_balance: bool, keep: bool) -> None:
        super().__init__()
        self.load_balance, self.keep = load_balance, keep
        self.group = mesh.get_group().group_name

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """[B, H, S, D] and 2 x [B, H_kv, S, D] of this rank's chunks, one after another -> [B, H, S, D]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = _attention_op(q, k, v, self.load_balance, self.keep, self.group)[0]
        return out.transpose(1, 2)
