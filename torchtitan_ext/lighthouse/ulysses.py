"""Dense causal attention over a sequence whose chunks lie on several ranks, as in DeepSpeed-Ulysses.

The ranks exchange rows for heads: each gets all rows of its share of the heads, attends to them as one device would,
and sends every row of the output back to where its chunk lies (arXiv 2309.14509). Whatever the number of ranks, a row
travels there and back once, and every head's attention is one call of the stock kernel. Long sequences go head by
head, so that one head's rows are under way while another's are attended to.
"""

from math import gcd
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .attention import Attention, _attend

# Rows with which one head's attention alone fills a GPU: 512 blocks of 128 queries.
LONG = 65536


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


def check_heads(n_heads: int, n_kv_heads: int, degree: int) -> None:
    """Raise ValueError, naming what would be right, unless `degree` ranks can share these heads out."""

    def fits(degree: int) -> bool:
        return n_heads % degree == 0 and max(n_kv_heads, degree) % min(n_kv_heads, degree) == 0

    if not fits(degree):
        degrees = ", ".join(str(n) for n in range(1, n_heads + 1) if fits(n))
        raise ValueError(
            f"{n_heads} heads and {n_kv_heads} KV heads can't be shared out to {degree} ranks, but to {degrees}"
        )


def _in_order(rows: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Rows [B, S, ...] with their chunks in this order, an empty one for that in which they are."""
    if not order:
        return rows
    chunks = rows.unflatten(1, (len(order), -1))
    return torch.cat([chunks[:, i] for i in order], 1)


def _exchange(x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Starts to send the i-th of `ranks` parts of dimension 0 to rank i. What comes lies there rank after rank, once
    it has been waited for."""
    splits = [x.shape[0] // ranks] * ranks
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), splits, splits, group)


class _Send(torch.autograd.Function):
    """Starts an exchange. Backward, waits for that of the gradient, which `_Receive` started."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        return _exchange(x, ranks, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.ops._c10d_functional.wait_tensor(grad), None, None


class _Receive(torch.autograd.Function):
    """Waits for an exchange. Backward, starts that of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        ctx.ranks, ctx.group = ranks, group
        return torch.ops._c10d_functional.wait_tensor(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _exchange(grad, ctx.ranks, ctx.group), None, None


class UlyssesAttention(nn.Module):
    """Causal attention of a sequence that the ranks of `mesh` share, each of which calls it with its rows.

    Args:
        attention: what attends, causally, to whole sequences: `attention(q, k, v, enable_gqa=...)` on [B, H, S, D]
            and twice [B, H_kv, S, D].
        mesh: the ranks, in one dimension; the heads must divide among them, see `check_heads`.
        load_balance: whether a rank holds two chunks, from head and tail, or one; see `chunks_of_ranks`. The work
            is balanced either way, and with one chunk nothing has to be put in order.
    """

    def __init__(self, attention: Attention, mesh: DeviceMesh, load_balance: bool) -> None:
        super().__init__()
        self.attention = attention
        self.group = mesh.get_group().group_name
        self.degree = mesh.size()
        order = chunk_order(self.degree, load_balance)
        self.order = order if order != sorted(order) else []
        self.places = sorted(range(len(self.order)), key=self.order.__getitem__)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """[B, H, S, D] and 2 x [B, H_kv, S, D] of this rank's chunks, one after another -> [B, H, S, D]."""
        heads = [self._by_rank(x) for x in (q, k, v)]
        long = q.shape[2] * self.degree >= LONG
        n_parts = gcd(*(x.shape[3] for x in heads)) if long else 1
        parts = [*zip(*(x.chunk(n_parts, 3) for x in heads), strict=True)]
        # Whatever can be sent is under way before anything is waited for.
        sent = [self._send(torch.cat(part, 3)) for part in parts]
        back = []
        for rows, part in zip(sent, parts, strict=True):
            whole = self._whole(self._receive(rows), [x.shape[3] for x in part])
            back.append(self._send(self._by_place(_attend(self.attention, *whole))))
        out = torch.cat([self._receive(x) for x in back], 3)
        return out.movedim(0, 2).flatten(2, 3).transpose(1, 2)

    def _send(self, x: torch.Tensor) -> torch.Tensor:
        return _Send.apply(x, self.degree, self.group)

    def _receive(self, x: torch.Tensor) -> torch.Tensor:
        return _Receive.apply(x, self.degree, self.group)

    def _by_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Own rows by the rank that attends with them: [B, H, S, D] -> [ranks, B, S, H / ranks, D]."""
        if x.shape[1] < self.degree:
            x = x.repeat_interleave(self.degree // x.shape[1], 1)
        return x.transpose(1, 2).unflatten(2, (self.degree, -1)).movedim(2, 0)

    def _whole(self, rows: torch.Tensor, heads: list[int]) -> list[torch.Tensor]:
        """What came, [ranks, B, S, sum of heads, D], in the sequence's order: of each, [B, heads, S x ranks, D]."""
        rows = _in_order(rows.movedim(0, 1).flatten(1, 2), self.places)
        return [x.transpose(1, 2) for x in rows.split(heads, 2)]

    def _by_place(self, out: torch.Tensor) -> torch.Tensor:
        """All rows by the rank whose they are: [B, heads, S x ranks, D] -> [ranks, B, S, heads, D]."""
        rows = _in_order(out.transpose(1, 2), self.order)
        return rows.unflatten(1, (self.degree, -1)).movedim(1, 0)
