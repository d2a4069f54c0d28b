"""The torch path of the layer: equal to the fp64 reference, and the properties that make it the method."""

from itertools import product
from unittest.mock import Mock, patch

import pytest
import torch
from helpers.lighthouse_cases import SCORES, TOLERANCE, cases, error, hard_scores, pairs, qkv, rotary_table, selected
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseConfig, lighthouse_attention, select_entries, torch_ops
from torchtitan_ext.lighthouse.attention import LighthouseAttention
from torchtitan_ext.lighthouse.kernels import causal_attention
from torchtitan_ext.lighthouse.naive import naive_attention, naive_select

SMALL = LighthouseConfig(levels=3, pooling_factor=2, top_k=16, tile_winners=8)


@pytest.mark.slow
@settings(max_examples=25)
@given(cases(128), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_equals_the_reference_forward_and_backward(case, batch, n_kv_heads, group, rotary, seed):
    config, seq_len = case
    freqs_cis = rotary_table(seq_len, 4) if rotary else None
    inputs = qkv(seq_len, batch, n_kv_heads, group, seed=seed)
    out = lighthouse_attention(*inputs, config, freqs_cis=freqs_cis)
    expected = naive_attention(*inputs, config, freqs_cis)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).double()
    ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@settings(max_examples=60)
@given(cases(), st.sampled_from(SCORES), st.sampled_from(SCORES), st.integers(0, 99))
def test_selection_equals_the_reference_for_any_scores(case, q_kind, k_kind, seed):
    config, seq_len = case
    scores = torch.stack([hard_scores(kind, (2, 2, seq_len), seed + i) for i, kind in enumerate((q_kind, k_kind))])
    _, selection = selected(scores, config)
    for b, h in product(range(2), range(2)):
        assert pairs(selection, b, h) == naive_select(*scores[:, b, h], config)


@settings(max_examples=60)
@given(cases(max_seq_len=2048), st.sampled_from(SCORES), st.integers(0, 99))
def test_gathered_entries_are_legal_distinct_ordered_as_many_as_the_formula_and_reach_every_position(case, kind, seed):
    config, seq_len = case
    scores = hard_scores(kind, (1, 2, seq_len), seed)
    slots, (level, index) = selected(torch.stack([scores, scores.flip(-1)]), config)
    p, finer = config.pooling_factor, config.levels - 1
    for number, n_gathered in enumerate([p * config.top_k] * finer + [seq_len // p**finer]):
        assert ((level == number).sum(-1) == n_gathered).all()
    assert level.shape[-1] == finer * p * config.top_k + seq_len // p**finer == config.gathered_len(seq_len)
    end = (index + 1) * p**level - 1
    assert (index >= 0).all() and (end < seq_len).all() and (level < config.levels).all()
    order = end * config.levels + level
    assert (order.diff(dim=-1) > 0).all()  # ends never fall, finer first where equal, none twice
    # From one entry to one of each level reach a position.
    contributors = torch_ops.scatter(torch.ones(1, 2, config.gathered_len(seq_len), 1), slots, config)
    assert contributors.min() >= 1 and contributors.max() <= config.levels


@settings(max_examples=30)
@given(cases(max_seq_len=256), st.data())
def test_with_the_selection_fixed_no_output_sees_a_later_input(case, data):
    config, seq_len = case
    q, k, v = qkv(seq_len, n_kv_heads=2, group=2)
    slots = torch_ops.select(torch_ops.score(q, k, v, config), config)
    freqs_cis = rotary_table(seq_len, 4)
    t = data.draw(st.integers(1, seq_len - 1))

    def run(q, k, v):
        with patch.object(torch_ops, "select", lambda *_: slots):
            return lighthouse_attention(q, k, v, config, freqs_cis=freqs_cis)

    before = run(q, k, v)
    after = run(*(torch.cat([x[:, :t], x[:, t:] + 1.0], 1) for x in (q, k, v)))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("rope", ["selected", "base"])
def test_every_token_gets_a_gradient_through_q_k_and_v(rope):
    config = LighthouseConfig(levels=3, pooling_factor=2, top_k=16, tile_winners=8, rope=rope)
    inputs = qkv(256, 1, 2, 2, head_dim=8)
    out = lighthouse_attention(*inputs, config, freqs_cis=rotary_table(256, 8))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    for grad in torch.autograd.grad((out * weight).sum(), inputs):
        assert (grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_dtype_and_shape_and_stays_near_the_fp64_result(dtype):
    inputs = qkv(256, 2, 2, 2, head_dim=16, dtype=dtype)
    freqs_cis = rotary_table(256, 16, torch.complex64)
    out = lighthouse_attention(*inputs, SMALL, freqs_cis=freqs_cis)
    assert out.dtype == dtype and out.shape == inputs[0].shape
    slots = torch_ops.select(torch_ops.score(*inputs, SMALL), SMALL)
    x, wide = inputs[0], torch.promote_types(dtype, torch.float32)
    for op in (torch_ops.gather, torch_ops.scatter):
        assert torch.equal(op(x, slots, SMALL), op(x.to(wide), slots, SMALL).to(dtype))  # rounded once
        x = op(x, slots, SMALL)
    with patch.object(torch_ops, "select", lambda *_: slots):  # rounding may move a selection: hold it
        exact = lighthouse_attention(*(x.double() for x in inputs), SMALL, freqs_cis=freqs_cis)
    assert error(out, exact) <= TOLERANCE.get(dtype, 0)


def test_rotates_rows_that_start_anywhere_in_memory():
    rows, table = torch.randn(9)[1:].view(2, 4), rotary_table(2, 4, torch.complex64)
    assert torch.equal(torch_ops.rotate(rows, table), torch_ops.rotate(rows.clone(), table))


def test_attention_is_one_call_on_the_gathered_rows():
    attend = Mock(wraps=causal_attention)
    lighthouse_attention(*qkv(256, 2, 2, 3), SMALL, attention=attend)
    [call] = attend.call_args_list
    assert [x.shape for x in call.args] == [(2, heads, SMALL.gathered_len(256), 4) for heads in (6, 2, 2)]
    assert call.kwargs == {"enable_gqa": True}


@pytest.mark.slow
def test_compiles_for_changing_head_counts():
    layer = LighthouseAttention(SMALL)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_heads in (2, 4, 6):
        q, k, v = (torch.randn(1, 128, heads, 8) for heads in (n_heads, 2, 2))
        torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


@pytest.mark.parametrize("layer", [lighthouse_attention, select_entries])
def test_inputs_that_do_not_fit_are_named(layer):
    q, k, v = qkv(256, n_kv_heads=2)
    table = rotary_table(256, 4)
    for inputs, freqs_cis, message in (
        ((q, k, v[:, :-1]), None, r"must be \[B, N, H, D\]"),
        ((q.flatten(2), k, v), None, r"must be \[B, N, H, D\]"),
        ((q, k[:, :, :0], v[:, :, :0]), None, r"k \(1, 256, 0, 4\).* H_kv and D at least 1"),
        ((q[..., :0], k[..., :0], v[..., :0]), None, "H_kv and D at least 1"),
        ((q[:, :, :0], k, v), None, "H_kv and D at least 1"),
        ((torch.randn(1, 256, 3, 4), k, v), None, "3 query heads: must be a multiple of 2"),
        ((q[:, :204], k[:, :204], v[:, :204]), None, "seq_len = 204"),
        ((q, k.to("meta"), v), None, "k on meta: must be on q's device, cpu"),
        ((q, k, v), table.to("meta"), "freqs_cis on meta"),
        ((q, k, v), table[:128], "freqs_cis .*at least N = 256"),
        ((q, k, v), table[:, 0], r"freqs_cis \(256,\).*at least N = 256"),
        ((q, k, v), table.real, "freqs_cis .*torch.float64: must be complex"),
        ((q, k, v), table.clone().requires_grad_(), r"requires a gradient.*detach\(\)"),
        ((q[..., :3], k[..., :3], v[..., :3]), table[:, :1], "D = 3: must be even"),
        ((q, k, v), (table.real, table.imag), r"\(cos, sin\), \(256, 2\) and .*: must be two real .*N, D = 4\]"),
        ((q, k, v), (torch.ones(2, 256, 4),) * 2, r"\(2, 256, 4\) and .* must be two real"),
        ((q, k, v), (torch.ones(128, 4),) * 2, "freqs_cis .*at least N = 256"),
        ((q, k, v), (torch.ones(256, 4), torch.ones(128, 4)), r"and \(128, 4\) .* must be two real"),
        ((q, k, v), (torch.ones(256, 4, requires_grad=True),) * 2, "requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*inputs, SMALL, freqs_cis=freqs_cis)
