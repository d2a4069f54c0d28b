"""Settings of a Lighthouse layer, their rules, and every length derived from them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

from .scorers import SCORERS

ROPE_PLACEMENTS = ("selected", "base")


@dataclass(frozen=True)
class LighthouseConfig:
    """Settings of one Lighthouse Attention layer (paper, section 3).

    Raises ValueError, with legal values, for a setting that is illegal at every sequence length.
    """

    levels: int = 3
    """Levels of the pyramid, the base included (at least 2)."""

    pooling_factor: int = 4
    """Entries of one level that one entry of the next level summarizes (a power of two)."""

    top_k: int = 1536
    """Winners per head and level: a multiple of `tile_winners`."""

    scorer: str = "norm"
    """How tokens are scored: by norms of q and k (norm), of the outputs of softmax attention within residue classes of
    the positions (dilated), or of the outputs of gated linear attention (gla)."""

    dilation: int = 4
    """Interleaved residue classes of the `dilated` scorer; must divide the sequence length."""

    rope: str = "selected"
    """Rotate each gathered row at its entry's end (selected), or every token before pooling (base)."""

    tile_winners: int = 128
    """Winners per tile, half by query score and half by key score (even)."""

    def __post_init__(self) -> None:
        def require(legal: bool, field: str, rule: str) -> None:
            if not legal:
                raise ValueError(f"{field} = {getattr(self, field)!r}: {rule}")

        for field in ("levels", "pooling_factor", "top_k", "dilation", "tile_winners"):
            require(isinstance(getattr(self, field), int), field, "must be of type int")
        require(self.levels >= 2, "levels", "must be at least 2 (the base and one pooled level)")
        p = self.pooling_factor
        require(p >= 2 and p & (p - 1) == 0, "pooling_factor", "must be a power of two, 2 or more")
        m = self.tile_winners
        require(m >= 2 and m % 2 == 0, "tile_winners", "must be even and at least 2")
        require(self.scorer in SCORERS, "scorer", f"must be one of {', '.join(SCORERS)}")
        require(self.dilation >= 1, "dilation", "must be at least 1")
        require(self.rope in ROPE_PLACEMENTS, "rope", f"must be one of {', '.join(ROPE_PLACEMENTS)}")
        # Last, because its proposal relies on the other rules.
        nearest = max(m, (self.top_k + m // 2) // m * m)
        rule = f"must be a multiple of tile_winners = {m}, for example {nearest}"
        require(self.top_k >= m and self.top_k % m == 0, "top_k", rule)

    @property
    def n_tiles(self) -> int:
        """Contiguous tiles that the sequence is cut into."""
        return self.top_k // self.tile_winners

    def span(self, level: int) -> int:
        """Base positions that one entry of `level` covers."""
        return self.pooling_factor**level

    def level_offsets(self, seq_len: int) -> list[int]:
        """Row of each level's first entry in the pyramid (levels one after another), then its length."""
        return list(accumulate((seq_len // self.span(level) for level in range(self.levels)), initial=0))

    def seq_len_of(self, n_entries: int) -> int:
        """Sequence length whose pyramid has `n_entries` entries."""
        coarsest = n_entries // sum(self.span(level) for level in range(self.levels))
        return coarsest * self.span(self.levels - 1)

    def gathered_len(self, seq_len: int) -> int:
        """Rows S of the gathered sequence: the whole coarsest level and every winner's children."""
        coarsest = seq_len // self.span(self.levels - 1)
        return coarsest + (self.levels - 1) * self.pooling_factor * self.top_k

    def allows(self, seq_len: int, n_chunks: int = 1) -> bool:
        """Whether `seq_len` is legal for sequences in `n_chunks` chunks that end where tiles do."""
        return self._broken_rule(seq_len, n_chunks) is None

    def _broken_rule(self, seq_len: int, n_chunks: int) -> str | None:
        span, m, top_k = self.span(self.levels - 1), self.tile_winners, self.top_k
        unit = span * self.n_tiles
        if n_chunks > 1 and not SCORERS[self.scorer].per_token:
            return f"scorer = {self.scorer!r}: is not `per_token`, so it needs the tokens of other chunks"
        if seq_len % unit:
            rule = f"must be a multiple of pooling_factor^(levels - 1) x tiles = {span} x {self.n_tiles} = {unit}"
            return f"seq_len = {seq_len}: {rule}"
        if self.n_tiles % n_chunks:
            rule = f"must be a multiple of tile_winners x chunks = {m} x {n_chunks} = {m * n_chunks}"
            return f"top_k = {top_k}: {rule}, so that tiles end at the chunks' borders"
        if seq_len // span < top_k:
            rule = f"a tile of seq_len = {seq_len} has {seq_len // unit} entries at the coarsest level"
            return f"top_k = {top_k}: {rule}, fewer than tile_winners = {m}"
        if self.gathered_len(seq_len) >= seq_len:
            return f"top_k = {top_k}: gathers {self.gathered_len(seq_len)} rows, no fewer than seq_len = {seq_len}"
        if self.scorer == "dilated" and seq_len % self.dilation:
            return f"dilation = {self.dilation}: must divide seq_len = {seq_len}"
        return None

    def check_seq_len(self, seq_len: int, n_chunks: int = 1) -> None:
        """Raise ValueError unless `allows` is true. It lists the nearest legal values of each field, others unchanged,
        and for top_k also the value nearest to the recipe's, seq_len / 64."""
        problem = self._broken_rule(seq_len, n_chunks)
        if problem is None:
            return

        def legal(field: str, values: Iterable) -> list:
            return [value for value in values if replace(self, **{field: value}).allows(seq_len, n_chunks)]

        span, m = self.span(self.levels - 1), self.tile_winners
        unit, coarsest = span * self.n_tiles, seq_len // span
        # Legal lengths are the multiples of `step` with at least `least` entries at the coarsest level.
        step = math.lcm(unit, self.dilation) if self.scorer == "dilated" else unit
        children = (self.levels - 1) * self.pooling_factor * self.top_k
        least = max(self.top_k, children // (span - 1) + 1)
        below = seq_len // step * step
        above = max(below + step, -(-least * span // step) * step)
        top_ks = legal("top_k", (k for k in range(m, coarsest + 1, m) if coarsest % (k // m) == 0))
        near = sorted(top_ks, key=lambda k: abs(k - self.top_k))[:2]
        near += sorted(top_ks, key=lambda k: abs(k - seq_len / 64))[:1]
        dilations = legal("dilation", (n for n in range(1, seq_len + 1) if seq_len % n == 0))
        proposed: dict[str, list] = {
            "scorer": [repr(name) for name in legal("scorer", SCORERS if n_chunks > 1 else ())],
            "seq_len": [n for n in (below, above) if self.allows(n, n_chunks)],
            "top_k": [*dict.fromkeys(near)],  # each once
            "dilation": sorted(dilations, key=lambda n: abs(n - self.dilation))[:2],
        }
        nearest = [f"{field} = {' or '.join(map(str, values))}" for field, values in proposed.items() if values]
        raise ValueError("; nearest: ".join(filter(None, (problem, "; ".join(nearest)))))
