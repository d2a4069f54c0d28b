"""Dense causal attention over a sequence whose chunks lie on several ranks, as in DeepSpeed-Ulysses.

Ranks exchange rows for heads: each gets all rows of its share of the heads, attends as one device would, and sends the
output rows back (arXiv 2309.14509). A row travels there and back once for any number of ranks, and each head's
attention is one call of the stock kernel.
"""

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from .attention import Attention, call_attention


def chunks_of_ranks(degree: int, load_balance: bool) -> list[list[int]]:
    """Positions in the sequence of the chunks of each of `degree` ranks.

    One chunk per rank; with `load_balance` and several ranks two, one from the head and its mirror from the tail.
    """
    if not load_balance or degree == 1:
        return [[rank] for rank in range(degree)]
    return [[rank, 2 * degree - 1 - rank] for rank in range(degree)]


def chunk_order(degree: int, load_balance: bool) -> list[int]:
    return [chunk for chunks in chunks_of_ranks(degree, load_balance) for chunk in chunks]


def check_heads(n_heads: int, n_kv_heads: int, degree: int) -> None:
    """Raise ValueError, with legal degrees, unless `degree` ranks can divide these heads."""

    def fits(degree: int) -> bool:
        return n_heads % degree == 0 and max(n_kv_heads, degree) % min(n_kv_heads, degree) == 0

    if not fits(degree):
        degrees = ", ".join(str(n) for n in range(1, n_heads + 1) if fits(n))
        heads = f"{n_heads} heads and {n_kv_heads} KV heads"
        raise ValueError(f"{heads} can't be divided among {degree} ranks, only among {degrees}")


def _in_order(rows: Tensor, order: list[int]) -> Tensor:
    """Rows [B, S, ...] with their chunks in `order`."""
    if order == sorted(order):
        return rows
    chunks = rows.unflatten(1, (len(order), -1))
    return torch.cat([chunks[:, i] for i in order], 1)


class UlyssesAttention(nn.Module):
    """Causal attention over a sequence that the ranks of a one-dimensional `mesh` share; each passes its rows.

    `attention` gets whole sequences, as in `lighthouse_attention`. For legal numbers of heads see `check_heads`, for
    `load_balance` see `chunks_of_ranks`; the work is balanced with either.
    """

    def __init__(self, attention: Attention, mesh: DeviceMesh, load_balance: bool) -> None:
        super().__init__()
        self.attention = attention
        self.group = mesh.get_group()
        self.degree = mesh.size()
        self.order = chunk_order(self.degree, load_balance)
        self.places = sorted(range(len(self.order)), key=self.order.__getitem__)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False) -> Tensor:
        """[B, H, S, D] and 2 x [B, H_kv, S, D] of this rank's chunks, concatenated -> [B, H, S, D]."""
        check_heads(q.shape[1], k.shape[1], self.degree)
        return self._heads_for_rows(call_attention(self.attention, *self._rows_for_heads(q, k, v)))

    def _all_to_all(self, x: Tensor) -> Tensor:
        """Send the i-th part of dimension 0 to rank i; return the received parts by rank."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def _rows_for_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Exchange all heads of own rows for all rows of own heads: [B, H, S, D] -> [B, H / ranks, S x ranks, D]."""
        parts = []
        for x in tensors:
            if x.shape[1] < self.degree:
                x = x.repeat_interleave(self.degree // x.shape[1], 1)
            parts.append(x.transpose(1, 2).unflatten(2, (self.degree, -1)).movedim(2, 0))
        # sent [ranks, B, S, heads of all tensors / ranks, D], received [B, ranks x S, ...]
        rows = self._all_to_all(torch.cat(parts, 3)).movedim(0, 1).flatten(1, 2)
        rows = _in_order(rows, self.places)
        return [x.transpose(1, 2) for x in rows.split([x.shape[3] for x in parts], 2)]

    def _heads_for_rows(self, out: Tensor) -> Tensor:
        """The inverse: [B, H / ranks, S x ranks, D] -> [B, H, S, D]."""
        rows = _in_order(out.transpose(1, 2), self.order)
        rows = rows.unflatten(1, (self.degree, -1)).movedim(1, 0)  # [ranks, B, S, H / ranks, D]
        heads = self._all_to_all(rows).movedim(0, 2)  # [B, S, ranks, H / ranks, D]
        return heads.flatten(2, 3).transpose(1, 2)
