"""Every rule of the settings names the field, the value and what would be right."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(levels="3"), "levels = '3': must be of type int"),
        (dict(top_k=1536.0), "top_k = 1536.0: must be of type int"),
        (dict(scorer=None), "scorer = None: must be one of norm"),
        (dict(levels=1), "levels = 1: must be at least 2"),
        (dict(pooling_factor=3), "pooling_factor = 3: must be a power of two"),
        (dict(pooling_factor=1), "pooling_factor = 1: must be a power of two"),
        (dict(top_k=1500), "top_k = 1500: must be a multiple of tile_winners = 128.*1536"),
        (dict(top_k=0), "top_k = 0: must be a multiple of tile_winners = 128.*128"),
        (dict(tile_winners=127), "tile_winners = 127: must be even"),
        (dict(tile_winners=0), "tile_winners = 0: must be even and at least 2"),
        (dict(scorer="best"), "scorer = 'best': must be one of norm, dilated, gla"),
        (dict(rope="none"), "rope = 'none': must be one of selected, base"),
        (dict(dilation=0), "dilation = 0"),
    ],
)
def test_illegal_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LighthouseConfig(**settings)


def test_the_published_lengths():
    config = LighthouseConfig(levels=3, pooling_factor=4, top_k=1536)
    config.check_seq_len(98_304)
    assert config.gathered_len(98_304) == 18_432
    assert LighthouseConfig(top_k=8192).gathered_len(524_288) == 98_304


@given(
    st.integers(2, 4),
    st.sampled_from((2, 4)),
    st.sampled_from((2, 8, 32)),
    st.integers(1, 6),
    st.integers(0, 20_000),
)
def test_a_refused_length_names_a_remedy_and_an_accepted_one_is_legal(levels, p, m, tiles, seq_len):
    config = LighthouseConfig(levels, p, m * tiles, tile_winners=m)
    try:
        config.check_seq_len(seq_len)
    except ValueError as error:
        message = str(error)
    else:
        coarsest = seq_len // p ** (levels - 1)
        assert seq_len % (p ** (levels - 1) * tiles) == 0
        assert coarsest // tiles >= m
        assert config.gathered_len(seq_len) < seq_len
        return
    if message.startswith("seq_len"):
        for nearest in map(int, re.search("nearest: (.*)", message).group(1).split(" or ")):
            assert nearest % (p ** (levels - 1) * tiles) == 0
    else:
        most = re.search(r"at most (\d+)", message)
        assert f"seq_len = {seq_len}" in message
        assert most or "lower tile_winners" in message
        if most:
            assert 0 <= int(most.group(1)) < config.top_k


@given(st.integers(1, 64), st.sampled_from((2, 4, 8)), st.integers(2, 5))
def test_levels_stand_one_after_another(coarsest, p, levels):
    config = LighthouseConfig(levels=levels, pooling_factor=p)
    seq_len = coarsest * p ** (levels - 1)
    lens, offsets = config.level_lens(seq_len), config.level_offsets(seq_len)
    assert offsets[0] == 0 and [b - a for a, b in pairwise(offsets)] == lens
    assert all(n * config.span(level) == seq_len for level, n in enumerate(lens))
