"""The settings of a Lighthouse layer, their rules, and every length derived from them."""

import math
from dataclasses import dataclass, replace
from itertools import compress

SCORERS = ("norm", "dilated", "gla")
ROPE_PLACEMENTS = ("selected", "base")


@dataclass(frozen=True)
class LighthouseConfig:
    """Settings of one Lighthouse Attention layer (paper, section 3).

    Raises:
        ValueError: on construction, for a setting that no sequence length could make legal; each message
            names the field, its value and what would be right.
    """

    levels: int = 3
    """Levels of the pyramid, the base included (at least 2)."""

    pooling_factor: int = 4
    """Entries of one level that one entry of the next level summarises (a power of two)."""

    top_k: int = 1536
    """Winners per head and level: a multiple of `tile_winners`."""

    scorer: str = "norm"
    """What makes an entry matter: its norms (norm), or those of attention's outputs, softmax within residue
    classes of the positions (dilated) or gated linear (gla)."""

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
        # The last rule, so that what it proposes is legal.
        nearest = max(m, (self.top_k + m // 2) // m * m)
        require(
            self.top_k >= m and self.top_k % m == 0,
            "top_k",
            f"must be a multiple of tile_winners = {m}, for example {nearest}",
        )

    @property
    def n_tiles(self) -> int:
        """Contiguous tiles that the sequence is cut into."""
        return self.top_k // self.tile_winners

    def span(self, level: int) -> int:
        """Base positions that one entry of `level` covers."""
        return self.pooling_factor**level

    def level_lens(self, seq_len: int) -> list[int]:
        """Entries at each level, the base first."""
        return [seq_len // self.span(level) for level in range(self.levels)]

    def level_offsets(self, seq_len: int) -> list[int]:
        """Row of each level's first entry in the pyramid (levels one after another), then its length."""
        offsets = [0]
        for n in self.level_lens(seq_len):
            offsets.append(offsets[-1] + n)
        return offsets

    def seq_len_of(self, n_entries: int) -> int:
        """Sequence length whose pyramid has `n_entries` entries."""
        coarsest = n_entries // sum(self.span(level) for level in range(self.levels))
        return coarsest * self.span(self.levels - 1)

    def gathered_len(self, seq_len: int) -> int:
        """Rows S of the gathered sequence: the whole coarsest level and every winner's children."""
        coarsest = seq_len // self.span(self.levels - 1)
        return coarsest + (self.levels - 1) * self.pooling_factor * self.top_k

    def allows(self, seq_len: int, n_chunks: int = 1) -> bool:
        """Whether sequences of `seq_len` are legal, `n_chunks` of which end where tiles do."""
        coarsest = seq_len // self.span(self.levels - 1)
        return (
            seq_len == coarsest * self.span(self.levels - 1)
            and coarsest % self.n_tiles == 0
            and self.n_tiles % n_chunks == 0
            and coarsest >= self.top_k
            and self.gathered_len(seq_len) < seq_len
            and (self.scorer != "dilated" or seq_len % self.dilation == 0)
        )

    def check_seq_len(self, seq_len: int, n_chunks: int = 1) -> None:
        """Raise ValueError unless `allows` is true, naming the nearest values, each of which alone makes it so."""
        if self.allows(seq_len, n_chunks):
            return
        span, m = self.span(self.levels - 1), self.tile_winners
        unit = span * self.n_tiles
        coarsest = max(seq_len // span, 0)
        if seq_len < unit or seq_len % unit:
            problem = (
                f"seq_len = {seq_len}: must be a multiple of pooling_factor^(levels - 1) x tiles"
                f" = {span} x {self.n_tiles} = {unit}"
            )
        elif self.n_tiles % n_chunks:
            problem = (
                f"top_k = {self.top_k}: must be a multiple of tile_winners x chunks"
                f" = {m} x {n_chunks} = {m * n_chunks}, so that tiles end at the chunks' borders"
            )
        elif coarsest < self.top_k:
            problem = (
                f"top_k = {self.top_k}: a tile of seq_len = {seq_len} has {coarsest // self.n_tiles}"
                f" entries at the coarsest level, fewer than tile_winners = {m}"
            )
        elif self.gathered_len(seq_len) >= seq_len:
            problem = (
                f"top_k = {self.top_k}: gathers {self.gathered_len(seq_len)} rows, no fewer than seq_len = {seq_len}"
            )
        else:
            problem = f"dilation = {self.dilation}: must divide seq_len = {seq_len}"

        # Legal lengths are the multiples of `step` with at least `least` entries at the coarsest level.
        step = math.lcm(unit, self.dilation) if self.scorer == "dilated" else unit
        children = (self.levels - 1) * self.pooling_factor * self.top_k
        least = max(self.top_k, children // (span - 1) + 1)
        below = seq_len // step * step
        above = max(below + step, -(-least * span // step) * step)
        legal = {"seq_len": [n for n in (below, above) if self.allows(n, n_chunks)]}
        top_ks = [tiles * m for tiles in _divisors(coarsest)]
        for field, values in (("top_k", top_ks), ("dilation", _divisors(seq_len))):
            fits = [replace(self, **{field: n}).allows(seq_len, n_chunks) for n in values]  # type: ignore[arg-type]
            legal[field] = list(compress(values, fits))
            legal[field].sort(key=lambda n: abs(n - getattr(self, field)))
        proposals = [f"{name} = {' or '.join(map(str, n[:2]))}" for name, n in legal.items() if n]
        raise ValueError("; nearest: ".join(filter(None, [problem, "; ".join(proposals)])))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
