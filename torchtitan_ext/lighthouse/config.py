"""The settings of a Lighthouse layer, their rules, and every length derived from them."""

from dataclasses import dataclass

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
    """Winners a head and level: a multiple of `tile_winners`."""

    scorer: str = "norm"
    """What makes an entry matter: its norms (norm), or those of attention's outputs, softmax within residue
    classes of the positions (dilated) or gated linear (gla)."""

    dilation: int = 4
    """Interleaved residue classes of the `dilated` scorer; must divide the sequence length."""

    rope: str = "selected"
    """Rotate each gathered row at its entry's end (selected), or every token before pooling (base)."""

    tile_winners: int = 128
    """Winners a tile, half by query score and half by key score (even)."""

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
        nearest = max(m, round(self.top_k / m) * m)
        require(
            self.top_k >= m and self.top_k % m == 0,
            "top_k",
            f"must be a multiple of tile_winners = {m}, for example {nearest}",
        )
        require(self.scorer in SCORERS, "scorer", f"must be one of {', '.join(SCORERS)}")
        require(self.dilation >= 1, "dilation", "must be at least 1")
        require(
            self.rope in ROPE_PLACEMENTS, "rope", f"must be one of {', '.join(ROPE_PLACEMENTS)}"
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

    def check_seq_len(self, seq_len: int) -> None:
        """Raise ValueError, naming what would be right, unless sequences of `seq_len` are legal."""
        span = self.span(self.levels - 1)
        unit = span * self.n_tiles
        if seq_len < unit or seq_len % unit:
            below = seq_len // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"seq_len = {seq_len}: must be a multiple of pooling_factor^(levels - 1) x tiles"
                f" = {span} x {self.n_tiles} = {unit}; nearest: {nearest}"
            )
        if self.scorer == "dilated" and seq_len % self.dilation:
            nearest = max(n for n in range(1, self.dilation) if seq_len % n == 0)
            raise ValueError(
                f"dilation = {self.dilation}: must divide seq_len = {seq_len}, for example {nearest}"
            )
        m = self.tile_winners
        coarsest = seq_len // span
        if coarsest // self.n_tiles < m:
            raise ValueError(
                f"top_k = {self.top_k}: a tile of seq_len = {seq_len} has {coarsest // self.n_tiles}"
                f" entries at the coarsest level, fewer than tile_winners = {m};"
                f" top_k may be at most {coarsest // m * m}"
                + ("" if coarsest >= m else ": lower tile_winners, levels or pooling_factor")
            )
        gathered = self.gathered_len(seq_len)
        if gathered >= seq_len:
            most = (seq_len - coarsest - 1) // ((self.levels - 1) * self.pooling_factor) // m * m
            raise ValueError(
                f"top_k = {self.top_k}: gathers {gathered} rows, no fewer than seq_len = {seq_len};"
                + (f" top_k may be at most {most}" if most else " lower tile_winners")
            )
