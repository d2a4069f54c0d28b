"""Dense causal attention over a sequence whose chunks lie on several ranks.

A rank sends each of its chunks' keys and values, once, to the ranks that attend to it. While those of the others
arrive it attends to its own, then to all that came in one call a chunk, and merges the two by their log-sum-exps. In
backward the gradients of what came travel back while those of its own are computed. torch's ring attention computes
the same in a call, a merge and an exchange a rank.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

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
    """The stock kernel: [B, H, S, D] and 2 x [B, H_kv, S', D] -> [B, H, S, D], log-sum-exp [B, H, S]."""
    if q.is_cuda:
        results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
        return results[0], results[1].squeeze(-1)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What these keys and values add to the gradients, where `out` and `lse` are of all that q attends to."""
    if q.is_cuda:
        saved = (out, lse.unsqueeze(-1).contiguous())
        unused = [torch.empty((), dtype=torch.int64, device=q.device)] * 2  # dropout's random state
        lens = (None, None, None, q.shape[2], k.shape[2])
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, *saved, *unused, *lens, 0.0, causal
        )
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal
    )


class _Transfer(NamedTuple):
    """A chunk that one rank sends another: the `place`-th of its own, the `slot`-th of what the other gets."""

    sender: int
    place: int
    receiver: int
    slot: int


def _transfers(held: list[list[int]]) -> Iterator[_Transfer]:
    """What is sent, where each rank holds these chunks: a chunk to all ranks with a later one."""
    for sender, sent in enumerate(held):
        for receiver, own in enumerate(held):
            for place, chunk in enumerate(sent):
                if sender != receiver and chunk < own[-1]:
                    slot = chunk - sum(other < chunk for other in own)
                    yield _Transfer(sender, place, receiver, slot)


class _Layout:
    """Who holds which chunks, and what this rank does with its own and the others'.

    Of the other ranks' chunks it gets those before its own last one, in the sequence's order.
    """

    def __init__(self, n_rows: int, load_balance: bool, rank: int, degree: int):
        held = chunks_of_ranks(degree, load_balance)
        self.n_chunks = len(held[rank])
        self.chunk_len = n_rows // self.n_chunks
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
        self.received = [t for t in transfers if t.receiver == rank]

    def rows(self, place: int) -> slice:
        return slice(place * self.chunk_len, (place + 1) * self.chunk_len)


_layout = cache(_Layout)


def _exchange(
    group: dist.ProcessGroup,
    sends: list[tuple[torch.Tensor, int]],
    gets: list[tuple[torch.Tensor, int]],
) -> list[dist.Work]:
    """Start to send and to receive: tensors, each with the rank it goes to or comes from."""
    calls = [(dist.isend, *send) for send in sends] + [(dist.irecv, *get) for get in gets]
    return dist.batch_isend_irecv(
        [dist.P2POp(call, x, group=group, group_peer=peer) for call, x, peer in calls]
    )


def _fetch(
    group: dist.ProcessGroup, layout: _Layout, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, list[dist.Work]]:
    """Keys and values of the others, [n_received, 2, B, H_kv, D] once the works are done."""
    own = k.new_empty(k.shape[2], 2, *k.shape[:2], k.shape[3])
    for target, x in zip(own.permute(1, 2, 3, 0, 4), (k, v), strict=True):
        target.copy_(x)
    others = own.new_empty(layout.n_received, *own.shape[1:])
    sends = [(own[layout.rows(t.place)], t.receiver) for t in layout.sent]
    gets = [(others[layout.rows(t.slot)], t.sender) for t in layout.received]
    return others, _exchange(group, sends, gets)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _laid_out_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with the strides of `torch.empty_like(like)`, which is what the compiler is told."""
    target = torch.empty_like(like)
    return x if x.stride() == target.stride() else target.copy_(x)


def _ranks_and_layout(
    q: torch.Tensor, load_balance: bool, group: str
) -> tuple[dist.ProcessGroup, _Layout]:
    ranks = _resolve_process_group(group)  # type: ignore[arg-type]
    return ranks, _layout(q.shape[2], load_balance, ranks.rank(), ranks.size())


@torch.library.custom_op("lighthouse::shared_attention", mutates_args=())
def _attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, load_balance: bool, keep: bool, group: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranks, layout = _ranks_and_layout(q, load_balance, group)
    others, works = _fetch(ranks, layout, k, v)
    out, lse = _forward(q, k, v, True)
    lse = lse.contiguous()
    _wait(works)
    k, v = others.permute(1, 2, 3, 0, 4)
    for rows, n in layout.parts:
        more, more_lse = _forward(q[:, :, rows], k[:, :, :n], v[:, :, :n], False)
        of_rows, lse_of_rows = out[:, :, rows], lse[:, :, rows]
        weight = torch.sigmoid(more_lse - lse_of_rows).unsqueeze(-1)
        torch.addcmul(of_rows * (1 - weight), more, weight, out=of_rows)  # in the weights' fp32
        torch.logaddexp(lse_of_rows, more_lse, out=lse_of_rows)
    return _laid_out_as(out, q), lse, others if keep else others.new_empty(0)


@_attention_op.register_fake
def _attention_fake(q, k, v, load_balance, keep, group):
    accumulated = torch.promote_types(q.dtype, torch.float32)
    n_received = _ranks_and_layout(q, load_balance, group)[1].n_received
    others = k.new_empty((n_received, 2, *k.shape[:2], k.shape[3]) if keep else 0)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulated), others


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
    other_k, other_v = others.permute(1, 2, 3, 0, 4)
    grads = torch.empty_like(others)
    parts: list[tuple[slice, torch.Tensor]] = []
    for rows, n in reversed(layout.parts):  # the last of them reaches all that came
        dq, *of_keys = _backward(
            *(grad[:, :, rows], q[:, :, rows], other_k[:, :, :n], other_v[:, :, :n]),
            *(out[:, :, rows], lse[:, :, rows], False),
        )
        for target, part in zip(grads[:n].permute(1, 2, 3, 0, 4), of_keys, strict=True):
            if parts:
                target += part
            else:
                target.copy_(part)
        parts.append((rows, dq))

    came = others.new_empty(len(layout.sent), layout.chunk_len, *others.shape[1:])
    sends = [(grads[layout.rows(t.slot)], t.sender) for t in layout.received]
    gets = [(x, t.receiver) for x, t in zip(came, layout.sent, strict=True)]
    works = _exchange(ranks, sends, gets)
    dq, dk, dv = _backward(grad, q, k, v, out, lse, True)
    for rows, part in parts:
        dq[:, :, rows] += part
    _wait(works)
    for place in range(layout.n_chunks):
        pieces = [x for x, t in zip(came, layout.sent, strict=True) if t.place == place]
        if pieces:
            # added up in fp32, rounded once
            total = pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)
            for target, part in zip((dk, dv), total.permute(1, 2, 3, 0, 4), strict=True):
                target[:, :, layout.rows(place)] += part
    return _laid_out_as(dq, q), _laid_out_as(dk, k), _laid_out_as(dv, v)


@_backward_op.register_fake
def _backward_fake(grad, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


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
        return _attention_op(q, k, v, self.load_balance, self.keep, self.group)[0]
