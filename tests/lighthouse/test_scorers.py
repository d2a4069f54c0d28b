"""The scorers: equal to the fp64 reference, causal, and true to the attention that names them."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from helpers.lighthouse_cases import DEVICE, TOLERANCE, error, pairs, qkv, rotary_table
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseAttention, LighthouseConfig, attention, select_entries, torch_ops
from torchtitan_ext.lighthouse.naive import naive_rotate, naive_scores, naive_select
from torchtitan_ext.lighthouse.scorers import SCORERS, Scorer, chunked_linear_attention, linear_attention

SMALL = LighthouseConfig(levels=3, pooling_factor=2, top_k=16, tile_winners=8)
ATTENTION_SCORERS = [("dilated", 1), ("dilated", 2), ("dilated", 4), ("gla", 4)]
attention_scorers = pytest.mark.parametrize(("scorer", "dilation"), ATTENTION_SCORERS)


def setting(scorer, dilation=4, **changes):
    return dataclasses.replace(SMALL, scorer=scorer, dilation=dilation, **changes)


def base_scores(q, k, v, config):
    return torch_ops.score(q, k, v, config)[..., : q.shape[1]]


def by_reference(q, k, v, config):
    """What base_scores must equal, float64 [2, B, H_kv, N]."""
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    grouped = q.unflatten(2, (k.shape[2], -1))
    heads = ((x[b, :, h] for x in (grouped, k, v)) for b in range(k.shape[0]) for h in range(k.shape[2]))
    scores = [torch.stack(naive_scores(*head, config)) for head in heads]
    return torch.stack(scores, 1).view(2, k.shape[0], k.shape[2], -1)


@patch("torchtitan_ext.lighthouse.scorers._GLA_CHUNK", 16)  # several chunks in few tokens
@settings(max_examples=40)
@given(
    st.sampled_from([("norm", 1), *ATTENTION_SCORERS]),
    st.sampled_from([4, 12, 64, 132, 260]),  # some end within a chunk of gla, or fill several
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([4, 6]),
    st.integers(0, 99),
)
def test_equal_the_reference(scorer, seq_len, batch, n_kv_heads, group, head_dim, seed):
    config, inputs = setting(*scorer), qkv(seq_len, batch, n_kv_heads, group, head_dim, seed=seed)
    scores = base_scores(*inputs, config)
    torch.testing.assert_close(scores, by_reference(*inputs, config), rtol=0, atol=1e-10)


def max_key(q, k, v, dilation, kernel):
    """A scorer that rotation changes."""
    return k.abs().amax(-1).mT.repeat(2, 1, 1, 1)


def test_a_scorer_of_chunks_sees_rows_rotated_at_their_positions(monkeypatch):
    monkeypatch.setitem(SCORERS, "max_key", Scorer(max_key, lambda *_: 0, per_token=True))
    (q, k, v), table = qkv(256, batch=2, n_kv_heads=2, head_dim=8), rotary_table(256, 8)
    config, starts = setting("max_key", rope="base"), (128, 0)

    def chunks(x):
        return torch.stack([x[:, start : start + 128] for start in starts], 1).flatten(0, 1)

    rotated = [torch_ops.rotate(x, table.unsqueeze(1)) for x in (q, k)]
    ours = attention.select_slots(*map(chunks, (q, k, v)), config, table, starts=starts)
    assert torch.equal(ours, attention.select_slots(*map(chunks, (*rotated, v)), config, None, starts=starts))


@pytest.mark.parametrize(
    ("change", "returned"), [(lambda x: x[:1], r"\(1, 1, 2, 64\), torch.float64"), (lambda x: None, "NoneType")]
)
def test_what_a_scorer_returns_is_checked(change, returned, monkeypatch):
    monkeypatch.setitem(SCORERS, "max_key", Scorer(lambda *x: change(max_key(*x)), lambda *_: 0))
    with pytest.raises(ValueError, match=rf"'max_key' returned {returned}: must return .* \(2, 1, 2,"):
        base_scores(*qkv(64, n_kv_heads=2), setting("max_key"))


@attention_scorers
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_are_fp32_and_near_the_reference_for_every_dtype(scorer, dilation, dtype):
    config, inputs = setting(scorer, dilation), qkv(192, 2, 2, 2, 16, dtype, device=DEVICE)
    scores = base_scores(*inputs, config)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    in_fp32 = scorer == "gla" and DEVICE == "cpu"
    assert error(scores, by_reference(*inputs, config)) < TOLERANCE[torch.float32 if in_fp32 else dtype]


@attention_scorers
def test_a_token_is_scored_by_its_past_alone(scorer, dilation):
    config, (q, k, v), t = setting(scorer, dilation), qkv(320, 1, 2, 2), 150
    before = base_scores(q, k, v, config)
    after = base_scores(*(torch.cat([x[:, :t], x[:, t:] + 1.0], 1) for x in (q, k, v)), config)
    assert torch.equal(before[..., :t], after[..., :t])
    assert (before[..., t:] != after[..., t:]).all()


@attention_scorers
@pytest.mark.parametrize("rope", ["selected", "base"])
def test_the_layer_selects_by_the_scores_of_what_it_pools(scorer, dilation, rope):
    config, freqs_cis = setting(scorer, dilation, rope=rope), rotary_table(256, 4)
    q, k, v = qkv(256, 1, 2, 2)
    selection = select_entries(q, k, v, config, freqs_cis=freqs_cis)
    if rope == "base":
        q, k = (naive_rotate(x, freqs_cis[:, None]) for x in (q, k))
    expected = by_reference(q, k, v, config)
    for h in range(2):
        entries = pairs(selection, 0, h)
        assert entries == naive_select(*expected[:, 0, h], config)
        assert {(each, 0) for each in range(config.levels)} <= set(entries)


@pytest.mark.slow
@pytest.mark.parametrize(("scorer", "rope"), [("norm", "selected"), ("dilated", "base"), ("gla", "selected")])
def test_compile_without_a_graph_break_forward_and_backward(scorer, rope):
    inputs = qkv(256, 2, 2, 2, 8, torch.float32)
    freqs_cis = rotary_table(256, 8, torch.complex64)
    if scorer == "gla":  # one of them as cosines and sines
        freqs_cis = freqs_cis.real.repeat(1, 2), freqs_cis.imag.repeat(1, 2)
    layer = LighthouseAttention(setting(scorer, rope=rope))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs, freqs_cis), layer(*inputs, freqs_cis)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


@attention_scorers
def test_are_a_well_formed_torch_library_operator(scorer, dilation):
    for batch, seq_len, dtype in [(1, 64, torch.bfloat16), (2, 64, torch.float32), (2, dilation, torch.float64)]:
        inputs = [x.detach() for x in qkv(seq_len, batch, 2, 2, 8, dtype)]
        torch.library.opcheck(torch.ops.lighthouse.base_scores.default, (*inputs, scorer, dilation, "sdpa"))


@pytest.mark.parametrize("scorer", SCORERS)
def test_leave_no_graph_and_no_parameter(scorer):
    config, saved, inputs = setting(scorer), [], qkv(256, dtype=torch.float32, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        scores = [ops.score(*inputs, config) for ops in (torch_ops, attention.triton_ops)]
    assert not saved and not any(x.requires_grad for x in scores)
    assert not LighthouseAttention(config).state_dict()


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_do_not_depend_on_an_ambient_autocast(scorer):
    config, inputs = setting(scorer), qkv(256, dtype=torch.float32, device=DEVICE)
    expected = base_scores(*inputs, config)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(base_scores(*inputs, config), expected)
    q, k, v = *inputs[:2], inputs[2].bfloat16()  # as autocast mixes dtypes: all are taken as v's
    assert torch.equal(base_scores(q, k, v, config), base_scores(q.bfloat16(), k.bfloat16(), v, config))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seq_len", [1000, 32_768])
def test_linear_attention_on_the_gpu_equals_its_torch_version(seq_len, dtype):
    """Whichever serves the GPU: flash-linear-attention where it is installed."""
    q, k, v = qkv(seq_len, 2, 4, head_dim=128, dtype=dtype, device=DEVICE)
    expected = chunked_linear_attention(q.double(), k.double(), v.double()).cpu()
    assert error(linear_attention(q, k, v).detach(), expected) < TOLERANCE[dtype]
