"""Every rule of the settings names the field, the value and a legal value."""

from dataclasses import replace

import pytest
from helpers.lighthouse_cases import proposals_of
from hypothesis import given
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseConfig
from torchtitan_ext.lighthouse.scorers import SCORERS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({k: 4.0}, f"{k} = 4.0: must be of type int") for k, v in vars(LighthouseConfig()).items() if type(v) is int),
        (dict(levels=1), "levels = 1: must be at least 2"),
        (dict(pooling_factor=3), "pooling_factor = 3: must be a power of two"),
        (dict(pooling_factor=1), "pooling_factor = 1: must be a power of two"),
        (dict(top_k=1500), "top_k = 1500: must be a multiple of tile_winners = 128.*1536"),
        (dict(top_k=1500, rope="none"), "rope = 'none': must be one of selected, base"),
        (dict(top_k=0), "top_k = 0: must be a multiple of tile_winners = 128.*128"),
        (dict(tile_winners=127), "tile_winners = 127: must be even"),
        (dict(tile_winners=0), "tile_winners = 0: must be even and at least 2"),
        (dict(scorer="best"), f"scorer = 'best': must be one of {', '.join(SCORERS)}"),
        (dict(dilation=0), "dilation = 0"),
    ],
)
def test_illegal_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LighthouseConfig(**settings)


@given(
    levels=st.integers(2, 4),
    p=st.sampled_from((2, 4)),
    m=st.sampled_from((2, 8, 48)),
    tiles=st.integers(1, 32),
    scorer=st.sampled_from([*SCORERS]),
    dilation=st.integers(1, 12),
    seq_len=st.integers(-9, 20_000) | st.integers(0, 20).map(lambda n: 1024 * n),
)
def test_a_length_is_legal_or_refused_with_values_that_are(levels, p, m, tiles, scorer, dilation, seq_len):
    config = LighthouseConfig(levels, p, m * tiles, scorer, dilation, tile_winners=m)
    span = p ** (levels - 1)
    try:
        config.check_seq_len(seq_len)
    except ValueError as error:
        assert str(error).startswith((f"seq_len = {seq_len}: ", f"top_k = {m * tiles}: ", f"dilation = {dilation}: "))
        proposals = proposals_of(str(error))
    else:
        assert seq_len % (span * tiles) == 0
        assert seq_len // span // tiles >= m
        assert config.gathered_len(seq_len) < seq_len
        assert scorer != "dilated" or seq_len % dilation == 0
        return
    lengths = [int(n) for n in proposals.pop("seq_len")]
    for n in lengths:
        config.check_seq_len(n)
    lower = lengths[0] if lengths[0] < seq_len else seq_len // span * span
    assert not any(config.allows(n) for n in range(lower + span, lengths[-1], span))
    for field, values in proposals.items():
        for value in values:
            replace(config, **{field: int(value)}).check_seq_len(seq_len)
    legal = [k for k in range(m, seq_len // span + 1, m) if replace(config, top_k=k).allows(seq_len)]
    top_ks = proposals.get("top_k", [])
    assert min(2, len(legal)) <= len({*top_ks}) == len(top_ks)
    for wanted in (config.top_k, seq_len / 64) if legal else ():
        distance = min(abs(k - wanted) for k in legal)
        assert distance in {abs(int(k) - wanted) for k in top_ks}
